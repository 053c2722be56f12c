"""Text of the user's own: which files are read, what is held out, and what is refused."""

import numpy as np
import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.data.fetch import fetch
from batchlab.workloads import text
from batchlab.workloads.corpus import split_documents

PROSE = "Größe, 批次 and size. " * 100


def folder(tmp_path, **files):
    for name, content in files.items():
        file = tmp_path / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return tmp_path


def learnt_bytes(job):
    """All bytes that are a target in training, but the first one."""
    return bytes(fetch(job.train, list(range(len(job.train))), job.collate).targets.flatten().to(torch.uint8).tolist())


def test_a_file_of_text_is_cut_at_nine_tenths(tmp_path):
    file = tmp_path / "prose.md"
    file.write_text(PROSE)
    job = text(file, context=16)
    size = len(PROSE.encode())
    assert job.name == "text:prose.md" and job.units_per_example == 16
    cut = size - round(0.1 * size)
    assert (len(job.train), len(job.valid)) == ((cut - 1) // 16, (size - cut - 1) // 16)
    assert PROSE.encode()[1:].startswith(learnt_bytes(job))
    assert bytes(job.valid[0][0].to(torch.uint8).tolist()) == PROSE.encode()[cut : cut + 16]
    assert job.train.notes == ("the last 10 % of each file is held out",)


def test_any_bytes_are_text_in_a_file_that_is_named(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(range(256)) * 10)
    assert len(text(file, context=16).train) == (2304 - 1) // 16


def test_of_a_folder_the_textual_files_are_read(tmp_path):
    files = {"a_dot_txt": PROSE, "sub__b_dot_rst": PROSE, "c_dot_dat": "x" * 999, "_dot_git__d_dot_txt": "hidden" * 99}
    job = text(folder(tmp_path, **files, e_dot_txt=b"\0" * 2000), context=16)
    learnt = learnt_bytes(job)
    assert b"hidden" not in learnt and b"xxx" not in learnt
    assert learnt.count(b"\0") == 1  # between two files
    assert job.train.notes[0] == "files skipped, for they are not text: 2"


def test_without_textual_names_what_looks_like_text_is_read(tmp_path):
    job = text(folder(tmp_path, README=PROSE, picture=b"\x89PNG\0" + b"\1" * 5000), context=16)
    assert b"\1\1" not in learnt_bytes(job)
    assert job.train.notes[0] == "files skipped, for they are not text: 1"


def test_of_ten_files_whole_ones_are_held_out():
    documents = {f"{i}.txt": bytes([65 + i]) * 100 for i in range(20)}
    corpus, again = split_documents(documents, 0.1), split_documents(dict(reversed(documents.items())), 0.1)
    train, valid = (set(part.tolist()) - {0} for part in (corpus.train, corpus.valid))
    assert corpus.split == "files held out: 2 of 20" and len(valid) == 2
    assert train == set(range(65, 85)) - valid
    assert len(corpus.train) + len(corpus.valid) == 2000 + 18  # a zero byte between two files
    assert set(again.valid.tolist()) - {0} == valid


def test_whole_files_are_held_out_for_no_less_than_half_the_share():
    giants = {f"{i}": bytes([65 + i]) * 10_000 for i in range(9)} | {"small": b"z" * 10}
    corpus = split_documents(giants, 0.1)
    assert corpus.split == "the last 10 % of each file is held out"
    assert set(corpus.valid.tolist()) - {0} == {65 + i for i in range(9)} | {ord("z")}


def test_a_large_corpus_is_sampled_and_says_so(tmp_path):
    files = {f"f{i}_dot_txt": chr(65 + i) * 1000 for i in range(20)}
    job = text(folder(tmp_path, **files), context=8, max_bytes=4500)
    assert "15,500 bytes were left out: max_bytes is 4,500" in job.train.notes
    assert len({byte for byte in learnt_bytes(job) if byte}) <= 5


def test_windows_held_out_are_bounded(tmp_path):
    job = text(folder(tmp_path, a_dot_txt="abcdefgh" * 10_000), context=8, valid_windows=20)
    assert len(job.valid) == 20
    assert len(text(tmp_path, context=8, valid_windows=2000).valid) == (8000 - 1) // 8


def test_it_learns_a_simple_language(tmp_path):
    rng = np.random.default_rng(0)
    words = rng.choice(["batch ", "size ", "step "], size=3000)
    job = text(folder(tmp_path, words_dot_txt="".join(words)), context=16, width=32, layers=1, heads=2)
    torch.manual_seed(0)
    model = job.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        batch = fetch(job.train, torch.randint(len(job.train), (16,)).tolist(), job.collate)
        optimizer.zero_grad()
        job.loss(model, batch).backward()
        optimizer.step()
    entropy = np.log2(3) / 5.33  # bits a byte, three equally likely words of 5.33 bytes
    with torch.no_grad():
        held = fetch(job.valid, list(range(len(job.valid))), job.collate)
        measured = float(job.metric(model, held)["bits_per_byte"])
    assert entropy < measured < 1.5  # a byte's frequency alone gives 3.1


@pytest.mark.parametrize(
    "make, options, message",
    [
        (lambda p: p / "none", {}, "none does not exist"),
        (lambda p: p, {}, "holds no file"),
        (lambda p: folder(p, a=b"\0\1", b_dot_txt=b"\0"), {}, "holds no text: all 2 files in it are binary"),
        (lambda p: folder(p, a_dot_txt="short"), {}, "too little text, 5 bytes: windows of 128 bytes need"),
        (lambda p: folder(p, a_dot_txt=""), {}, "too little text, 0 bytes"),
        (lambda p: folder(p, a_dot_txt=PROSE), {"context": 0}, "context must be an integer of at least 1, got 0"),
        (lambda p: folder(p, a_dot_txt=PROSE), {"width": 10}, "multiple of heads, got width=10, heads=3"),
        (lambda p: folder(p, a_dot_txt=PROSE), {"valid_share": 2}, r"must lie in \(0, 1\), got 2"),
        (lambda p: folder(p, a_dot_txt=PROSE), {"max_bytes": 2.5}, "max_bytes must be an integer of at least 1"),
    ],
)
def test_what_is_refused(tmp_path, make, options, message):
    with pytest.raises(InputError, match=message) as caught:
        text(make(tmp_path), **options)
    assert "\n" not in str(caught.value)


def test_the_least_text_that_is_asked_for_is_enough(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("short")
    with pytest.raises(InputError, match=r"about (\d+) bytes") as caught:
        text(file, context=20)
    file.write_text("x" * int(str(caught.value).split("about ")[1].split()[0]))
    assert len(text(file, context=20).valid) == 1
