"""`text`: a byte-level language model of the user's own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.files import existing
from batchlab.core.job import Job, Target
from batchlab.workloads.corpus import Windows, read_up_to, split_documents
from batchlab.workloads.examples import collate
from batchlab.workloads.models import ByteTransformer
from batchlab.workloads.objectives import bits_per_byte, cross_entropy

_SUFFIXES = """
    .txt .text .md .rst .adoc .org .tex .bib .log .srt .csv .tsv .json .jsonl .xml .html .htm .css .yaml .yml .toml
    .ini .cfg .py .pyi .ipynb .c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala .js .jsx .ts .tsx .rb .php .pl .lua .jl
    .r .m .f90 .hs .ml .lisp .clj .swift .cs .sh .sql .proto .cmake
"""
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
_LOOKED_AT = 8192


def text(
    path: str | Path,
    *,
    context: int = 128,
    width: int = 96,
    layers: int = 2,
    heads: int = 3,
    valid_share: float = 0.1,
    valid_windows: int = 256,
    max_bytes: int = 2**30,
    optimizer: str = "adamw",
    target: Target | None = None,
) -> Job:
    """A pre-norm transformer that predicts each next byte of a file, or of all text in a folder; bits per byte.

    path: a file of any bytes; or a folder, whose files with a textual suffix are read, or all its files if none has
        one. Hidden files are left out, and so are binary ones (a zero byte among the first 8192), which are counted
        in `job.train.notes`.
    context: bytes an example predicts; an example is a window of context + 1 bytes, and windows share one byte.
        The batch is counted in tokens, which are bytes here.
    width, layers, heads: of the transformer; the default has 283,584 weights.
    valid_share: share of the bytes held out, whole files where there are ten or more, else the tail of each.
    valid_windows: at most so many held-out windows are kept, evenly spaced, so that an evaluation stays short; the
        default's 32,768 bytes know the mean to about 2 %.
    max_bytes: of a larger corpus, files are sampled by the hash of their names.

    Raises `InputError` where there is no path, no text, or too little of it.
    """
    root = existing(path)
    files, skipped = ([root], 0) if root.is_file() else _text_files(root)
    folder = root.parent if root.is_file() else root
    check_count(max_bytes=max_bytes)
    documents, left_out = read_up_to(folder, files, max_bytes)
    notes = [f"files skipped, for they are not text: {skipped}"] if skipped else []
    notes += [f"{left_out:,} bytes were left out: max_bytes is {max_bytes:,}"] if left_out else []
    return language_model(
        f"text:{root.resolve().name}",
        documents,
        source=str(path),
        notes=notes,
        context=context,
        width=width,
        layers=layers,
        heads=heads,
        valid_share=valid_share,
        valid_windows=valid_windows,
        optimizer=optimizer,
        target=target,
    )


def language_model(
    name: str,
    documents: Mapping[str, bytes],
    *,
    source: str,
    notes: list[str],
    context: int,
    width: int,
    layers: int,
    heads: int,
    valid_share: float,
    valid_windows: int,
    optimizer: str,
    target: Target | None,
) -> Job:
    """The job over documents of bytes by name; arguments as in `text`. source: what an error calls the documents."""
    check_count(context=context, width=width, layers=layers, heads=heads, valid_windows=valid_windows)
    if width % heads:
        raise InputError(f"width must be a multiple of heads, got width={width}, heads={heads}")
    corpus = split_documents(documents, valid_share)
    train = Windows(corpus.train, context, notes=(*notes, corpus.split))
    valid = Windows(corpus.valid, context, at_most=valid_windows)
    if len(train) < 2 or len(valid) < 1:
        held = sum(map(len, documents.values()))
        raise InputError(
            f"{source} holds too little text, {held} bytes: windows of {context} bytes need at least two to learn "
            f"from and one held out, about {round((context + 1) / min(valid_share, (1 - valid_share) / 2))} bytes"
        )
    return Job(
        name,
        lambda: ByteTransformer(context, width=width, layers=layers, heads=heads),
        cross_entropy,
        train=train,
        valid=valid,
        metric=bits_per_byte,
        collate=collate,
        unit="token",
        units_per_example=context,
        optimizer=optimizer,
        target=target,
    )


def _text_files(folder: Path) -> tuple[list[Path], int]:
    """The text files of a folder and its sub-folders, and how many others were skipped."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(f"{folder} holds no file")
    textual = [file for file in files if file.suffix.lower() in TEXT_SUFFIXES]
    chosen = [file for file in textual or files if _looks_like_text(file)]
    if not chosen:
        raise InputError(f"{folder} holds no text: all {len(files)} files in it are binary")
    return chosen, len(files) - len(chosen)


def _looks_like_text(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return b"\0" not in stream.read(_LOOKED_AT)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
