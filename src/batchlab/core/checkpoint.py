"""Checkpoints: one safetensors file each, named by its step and by the digest of its bytes. No pickle.

Tensors are the file's tensors; all else is strict JSON in its header. The name's digest covers every byte, so that
a cut or flipped file is known before anything of it is believed. torchao's states in few bits are kept as they are, by
the tensors within them.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchlab.core.errors import CheckpointError
from batchlab.core.files import replace_atomic

SCHEMA = 1
_KEY = "batchlab"
_IN_FEW_BITS = {
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}
_NAME = re.compile(r"step-(\d{10})-([0-9a-f]{32})\.safetensors")


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Writes `state` (nested dicts, lists, tuples, tensors, dtypes, numbers, strings) durably; returns its path.

    When it returns, the file is whole on disk under its final name; if it does not, no file bears such a name.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    tree = _encode({"schema": SCHEMA, "torch": torch.__version__, "state": state}, tensors, {})
    header = {_KEY: json.dumps(tree, allow_nan=False)}
    folder.mkdir(parents=True, exist_ok=True)

    def fill(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata=header)
        except Exception as error:  # safetensors wraps the operating system's error in its own type
            if "I/O error" in str(error) or isinstance(error, OSError):
                raise OSError(getattr(error, "errno", None) or 28, f"{error}") from error
            raise

    return replace_atomic(
        folder / "checkpoint",
        fill,
        name=lambda temporary: folder / f"step-{step:010d}-{_digest(temporary)}.safetensors",
    )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first; unfinished ones are not among them."""
    found = [path for path in folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, its tensors on the CPU; `CheckpointError` where any byte differs."""
    from safetensors import safe_open

    match = _NAME.fullmatch(path.name)
    if match is None or _digest(path) != match[2]:
        raise CheckpointError(f"{path} is damaged: its bytes do not have the digest in its name")
    with safe_open(path, framework="pt") as file:
        tree = json.loads((file.metadata() or {}).get(_KEY, "null"))
        if not isinstance(tree, dict) or not isinstance(tree.get("schema"), int):
            raise CheckpointError(f"{path} is not a batchlab checkpoint")
        if tree["schema"] > SCHEMA:
            raise CheckpointError(
                f"{path} has schema {tree['schema']}, from a newer batchlab; this one reads up to {SCHEMA}"
            )
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state: dict[str, Any] = _decode(tree["state"], tensors)
    return state


def newest_whole(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest state that can be read, and what was wrong with newer ones; (None, ...) where there is none."""
    problems: list[str] = []
    for path in checkpoints(folder):
        try:
            return load_checkpoint(path), problems
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
    return None, problems


def drop_old(folder: Path, keep: int = 2) -> None:
    """Deletes all but the newest `keep` checkpoints, and what killed writers left unfinished."""
    for path in checkpoints(folder)[keep:]:
        path.unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _encode(value: Any, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]) -> Any:
    if isinstance(value, Tensor) and type(value).__module__ == _IN_FEW_BITS.get(type(value).__name__):
        names, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {name: _encode(getattr(value, name), tensors, seen) for name in names}
        own = _encode([list(context), list(value.shape), list(value.stride())], tensors, seen)
        return {"$in_few_bits": type(value).__name__, "parts": parts, "own": own}
    if isinstance(value, Tensor):
        return {"$tensor": _stored(value.detach(), tensors, seen)}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return (
            {"$dict": [[_encode(k, tensors, seen), _encode(v, tensors, seen)] for k, v in value.items()]}
            if any(not isinstance(k, str) or k.startswith("$") for k in value)
            else {k: _encode(v, tensors, seen) for k, v in value.items()}
        )
    if isinstance(value, tuple):
        return {"$tuple": [_encode(item, tensors, seen) for item in value]}
    if isinstance(value, list):
        return [_encode(item, tensors, seen) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}: {value!r}")


def _stored(tensor: Tensor, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]) -> str:
    """Stores a tensor once, also when it stands in several places (tied weights)."""
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
    if tensor.numel() and place in seen:
        return seen[place]
    key = str(len(tensors))
    tensors[key] = tensor.cpu().contiguous().clone()
    seen[place] = key
    return key


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]].clone()
    if "$in_few_bits" in tree:
        return _made(tree["$in_few_bits"], _decode(tree["parts"], tensors), *_decode(tree["own"], tensors))
    if "$dtype" in tree:
        return _dtype(tree["$dtype"])
    if "$tuple" in tree:
        return tuple(_decode(item, tensors) for item in tree["$tuple"])
    if "$dict" in tree:
        return {_decode(k, tensors): _decode(v, tensors) for k, v in tree["$dict"]}
    if "$float" in tree:
        return float(tree["$float"])
    return {key: _decode(item, tensors) for key, item in tree.items()}


def _made(name: str, parts: dict[str, Tensor], context: list[Any], shape: list[int], stride: list[int]) -> Any:
    """The tensor of a class that is known here; no other name is ever imported."""
    if name not in _IN_FEW_BITS:
        raise CheckpointError(f"the checkpoint holds a {name}, which this batchlab does not know")
    try:
        module = importlib.import_module(_IN_FEW_BITS[name])
    except ImportError as error:
        message = f'the checkpoint holds a {name}, which needs torchao: pip install "batchlab[lowbit]"'
        raise CheckpointError(message) from error
    return getattr(module, name).__tensor_unflatten__(parts, context, shape, stride)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"the checkpoint holds the dtype {name}, which this torch does not know")
    return found
