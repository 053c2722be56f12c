"""`images`: classify the user's own pictures, one sub-folder a class."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.files import existing
from batchlab.core.job import Job, Target
from batchlab.workloads.examples import Batch, Examples, collate
from batchlab.workloads.models import ConvNet
from batchlab.workloads.objectives import accuracy, cross_entropy
from batchlab.workloads.split import hold_out

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
FEWEST_IMAGES = 10


class ImageFiles:
    """A map-style data set that reads its pictures when they are asked for: uint8 (3, size, size) and the label."""

    def __init__(self, files: Sequence[Path], labels: Tensor, size: int, notes: tuple[str, ...] = ()) -> None:
        self.files, self.labels, self.size, self.notes = list(files), labels, size, notes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return read_image(self.files[index], self.size), self.labels[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        return Batch(torch.stack([read_image(self.files[i], self.size) for i in indices]), self.labels[indices])

    def in_memory(self) -> Examples:
        """The same examples, every picture read once and kept."""
        with ThreadPoolExecutor() as readers:
            pictures = list(readers.map(lambda file: read_image(file, self.size), self.files))
        return Examples(torch.stack(pictures), self.labels, self.notes)


def images(
    path: str | Path,
    *,
    size: int = 32,
    hidden: int = 64,
    valid_share: float = 0.2,
    cache_bytes: int = 2**29,
    optimizer: str = "adamw",
    target: Target | None = None,
) -> Job:
    """A small CNN that tells the pictures of a folder's sub-folders apart; accuracy.

    path: a folder with one sub-folder a class, whose pictures may lie in further sub-folders. Hidden files and files
        without an image suffix are left out.
    size: edge to which every picture is brought, as RGB; the sides' proportion is not kept. Of several frames the
        first counts, transparency is dropped, and a camera's orientation is followed.
    valid_share: share held out, each class in proportion, by the hash of the file's path in the folder.
    cache_bytes: if all pictures take no more (3 · size² bytes each), they are read at once and kept; else each is
        read when it is needed.

    Raises `InputError` where there is no path, fewer than two classes or ten pictures, or a damaged picture.
    """
    check_count(size=size, hidden=hidden, cache_bytes=cache_bytes)
    root = existing(path)
    classes = _classes(root)
    files = [file for members in classes.values() for file in members]
    if len(files) < FEWEST_IMAGES:
        raise InputError(f"{path} holds {len(files)} pictures, but at least {FEWEST_IMAGES} are needed")
    of_each = torch.tensor([len(members) for members in classes.values()])
    labels = torch.arange(len(classes)).repeat_interleave(of_each)
    names = [file.relative_to(root).as_posix() for file in files]
    train, valid = (_part(files, labels, size, rows) for rows in hold_out(names, valid_share, labels.tolist()))
    fits = 3 * size**2 * len(files) <= cache_bytes
    return Job(
        f"images:{root.resolve().name}",
        lambda: ConvNet(3, size, len(classes), hidden=hidden),
        cross_entropy,
        train=train.in_memory() if fits else train,
        valid=valid.in_memory() if fits else valid,
        metric=accuracy,
        collate=collate,
        optimizer=optimizer,
        target=target,
    )


def _part(files: Sequence[Path], labels: Tensor, size: int, rows: NDArray[np.int64]) -> ImageFiles:
    return ImageFiles([files[row] for row in rows], labels[rows], size)


def _classes(root: Path) -> dict[str, list[Path]]:
    """The pictures of each sub-folder that has any, by its name, both in order."""
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: it must hold one sub-folder a class")
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    found = {folder.name: _pictures(folder) for folder in folders}
    classes = {name: files for name, files in found.items() if files}
    if len(classes) < 2:
        those = f"one class, {next(iter(classes))!r}" if classes else "no class"
        raise InputError(f"{root} holds {those}: at least two sub-folders with pictures are needed")
    return classes


def _pictures(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not file.name.startswith(".")
    ]


def read_image(file: Path, size: int) -> Tensor:
    """uint8 (3, size, size): red, green, blue. `InputError` naming the file where it cannot be read."""
    from PIL import Image, ImageOps

    damaged = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
    try:
        with Image.open(file) as opened:
            opened.draft("RGB", (size, size))  # a JPEG is decoded no larger than it must be
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits a pixel: a plain conversion would clip at 255
                picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8))
            small = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except damaged as error:
        raise InputError(f"{file} is not a readable picture: {error}") from None
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()
