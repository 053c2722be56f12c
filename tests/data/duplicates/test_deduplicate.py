import hashlib
import random
import sys
import sysconfig
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from batchlab.core.errors import BatchlabError, InputError
from batchlab.data.duplicates import deduplicate as module
from batchlab.data.duplicates.deduplicate import deduplicate
from batchlab.data.duplicates.duplicates import Deduplication, DeduplicationHeader, Removal
from batchlab.data.duplicates.near_duplicates import jaccard
from batchlab.data.duplicates.shingles import normalised, shingle_hashes

WORDS = [
    f"{a}{b}{c}" for a in ("ka", "lo", "mi", "nu") for b in ("ter", "san", "vol", "pim") for c in ("e", "or", "ix")
]


def _text(draw, words=80):
    return " ".join(draw.choices(WORDS, k=words))


def _edited(draw, text, share):
    return " ".join(draw.choice(WORDS) if draw.random() < share else word for word in text.split())


def _similarity(a, b):
    return jaccard(*(np.unique(shingle_hashes([normalised(text)])[0]) for text in (a, b)))


def _library():
    """Slices of the standard library's files, exact and edited copies of some in a second source."""
    draw = random.Random(0)
    folder = Path(sysconfig.get_path("stdlib"))
    first = [text[:1500] for path in sorted(folder.glob("*.py")) if len(text := path.read_text("utf-8")) > 1500]
    second = [(text, at) for at, text in enumerate(first[:30])]
    second += [(_edited(draw, text, share), at) for share in (0.005, 0.3) for at, text in enumerate(first[30:110], 30)]
    return first, second


def test_global_finds_copies_across_sources_and_local_does_not():
    first, second = _library()
    texts = {"library": first, "copies": [text for text, _ in second]}
    everywhere, within = deduplicate(texts), deduplicate(texts, scope="local")
    planted = [(len(first) + at, of, _similarity(text, first[of])) for at, (text, of) in enumerate(second)]
    gone = everywhere.verdict[[document for document, _, _ in planted]] > 0
    likeness = np.array([j for _, _, j in planted])
    near, far = likeness >= 0.9, likeness <= 0.5
    assert near.sum() > 80 and far.sum() > 60
    assert gone[near].mean() >= 0.95 and gone[far].mean() <= 0.05
    assert (
        everywhere.counts()["copies"]["across"] >= 0.95 * near.sum() and everywhere.counts()["library"]["across"] == 0
    )
    assert within.counts()["copies"]["across"] == 0 and within.counts()["copies"]["within"] <= 2
    assert {everywhere.sources[everywhere.source[by]] for by in everywhere.groups} == {"library"}


def test_verdicts_agree_with_datasketch_on_the_same_shingles():
    datasketch = pytest.importorskip("datasketch")
    first, second = _library()
    texts = first[25:40] + [text for text, _ in second[25:45]]
    index, kept = datasketch.MinHashLSH(threshold=0.8, num_perm=128, params=(16, 8)), []
    sketches = []
    for at, text in enumerate(texts):
        plain = normalised(text)
        sketch = datasketch.MinHash(num_perm=128)
        sketch.update_batch([plain[k : k + 13].encode() for k in range(len(plain) - 12)])
        sketches.append(sketch)
        if not any(sketch.jaccard(sketches[other]) >= 0.8 for other in index.query(sketch)):
            index.insert(at, sketch)
            kept.append(at)
    assert len(set(kept) ^ set(deduplicate(texts).kept.tolist())) <= 1  # both estimate near the threshold
    assert 15 <= len(kept) < 30


def test_removed_documents_name_the_kept_one():
    draw = random.Random(1)
    a, b = _text(draw), _text(draw)
    near = a + " one more word"
    texts, sources = [b, a, a.upper() + "!", near, "short", b], ["x", "y", "x", "x", "y", "y"]
    found = deduplicate(iter(texts), sources=iter(sources))
    assert found.kept.tolist() == [0, 2] and found.groups == {0: [5], 2: [1, 3]}
    similarity = next(each.similarity for each in found.removals() if each.index == 3)
    assert list(found.removals()) == [
        Removal(1, "y", "exact", 2, "x", 1.0),
        Removal(3, "x", "near", 2, "x", similarity),
        Removal(4, "y", "short", None, None, None),
        Removal(5, "y", "exact", 0, "x", 1.0),
    ]
    assert 0.9 < similarity < 1
    other = deduplicate(texts, sources=sources, priority=["y", "x"])
    assert other.kept.tolist() == [1, 5] and other.header.priority == ("y", "x")
    assert found.counts()["y"] == {"documents": 3, "kept": 0, "short": 1, "within": 0, "across": 2}


def test_the_twin_of_a_removed_document_goes_for_the_same_one():
    draw = random.Random(2)
    a = _text(draw)
    near = a + " one more word"
    found = deduplicate([a, near, near])
    assert [(each.kind, each.by) for each in found.removals()] == [("near", 0), ("near", 0)]
    assert deduplicate([a, near, near], exact=False).keeper.tolist() == found.keeper.tolist()


def test_texts_are_read_once_and_how_they_are_cut_changes_nothing(monkeypatch):
    draw = random.Random(3)
    texts = [_text(draw) for _ in range(40)]
    texts += [_edited(draw, text, draw.random() / 10) for text in texts]
    whole, said = deduplicate(texts), []
    monkeypatch.setattr(module, "_CHUNK", 1500)
    cut = deduplicate((text for text in texts), progress=lambda *news: said.append(news))
    _assert_same(whole, cut)
    assert len(said) > 20 and said[-1] == ("compared", 80) and [done for _, done in said] == sorted(d for _, d in said)


@pytest.mark.slow
def test_workers_change_nothing(monkeypatch):
    draw = random.Random(4)
    texts = [_text(draw) for _ in range(60)]
    texts += [_edited(draw, text, draw.random() / 10) for text in texts]
    monkeypatch.setattr(module, "_CHUNK", 3000)
    for verify in (False, True):
        _assert_same(deduplicate(texts, verify=verify), deduplicate(texts, verify=verify, workers=2))


def _assert_same(a, b):
    assert a.header == b.header
    for name in ("source", "verdict", "keeper", "similarity", "characters"):
        assert np.array_equal(getattr(a, name), getattr(b, name), equal_nan=name == "similarity")


def test_verify_decides_by_the_true_similarity():
    draw = random.Random(5)
    texts = [_text(draw) for _ in range(60)]
    texts += [_edited(draw, text, 0.02) for text in texts]
    found = deduplicate(texts, verify=True)
    for each in found.removals():
        assert (
            each.similarity == pytest.approx(_similarity(texts[each.index], texts[each.by])) and each.similarity >= 0.8
        )
    kept = set(found.kept.tolist())
    missed = [
        at for at in range(60) if at in kept and 60 + at in kept and _similarity(texts[at], texts[60 + at]) >= 0.8
    ]
    assert len(missed) <= 6 and len(texts) - len(kept) > 20  # the search finds 0.95 at the threshold, more above


def test_memory_a_document_is_as_stated(monkeypatch):
    """Of 500 texts of 2,000 bytes each, which would show if they were held."""
    monkeypatch.setattr(module, "_CHUNK", 1 << 12)
    texts = (hashlib.shake_128(str(at).encode()).hexdigest(1000) for at in range(500))
    deduplicate([next(texts)])
    tracemalloc.start()
    found = deduplicate(texts, permutations=16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    working = 4_000 * 100  # of one chunk
    assert len(found.kept) == 499 and 4 * 16 < peak / 500 < 8 * 16 + 60 + working / 500 < 1000


def test_words_and_characters_are_a_choice_on_record():
    draw = random.Random(7)
    text = _text(draw)
    edited = " ".join("changed" if at in (20, 60) else word for at, word in enumerate(text.split()))
    by_char, by_word = (deduplicate([text, edited], shingle=each, ngram=5) for each in ("char", "word"))
    assert by_char.kept.tolist() == [0] and by_word.kept.tolist() == [0, 1]
    assert by_char.header != by_word.header and by_word.header.shingle == "word"
    assert DeduplicationHeader.from_json(by_char.header.to_json()) == by_char.header


def test_short_documents_go_by_characters_without_blanks_and_punctuation():
    assert deduplicate(["a, b. " * 100]).kept.tolist() == [0]
    assert deduplicate(["a, b. " * 99 + "a"]).kept.tolist() == []
    assert deduplicate(["", "", "a"], min_characters=0).kept.tolist() == [0, 2]


def test_no_documents():
    found = deduplicate([])
    assert isinstance(found, Deduplication) and len(found) == 0 and found.groups == {} and found.counts() == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"texts": "one text"}, "texts must be an iterable of documents, got one str"),
        ({"texts": {"x": ["a"], "y": "one text"}}, "texts['y'] must be an iterable of documents, got one str"),
        ({"texts": ["a", b"b"]}, "texts must be str, got bytes at 1"),
        ({"sources": ["x", 2]}, "sources must be str, got int at 1"),
        ({"sources": ["x"]}, "sources must have one entry for each text: sources end after 1"),
        ({"sources": ["x", "y", "x"]}, "sources must have one entry for each text: texts end after 2"),
        ({"seed": 2**64}, f"seed must be below 2^64, got {2**64}"),
        ({"texts": {"x": ["a"]}, "sources": ["x"]}, "sources must be None where texts is a mapping"),
        ({"scope": "both"}, 'scope must be "global" or "local", got \'both\''),
        ({"threshold": 1.0}, "threshold must lie in (0, 1), got 1.0"),
        ({"threshold": float("nan")}, "threshold must lie in (0, 1), got nan"),
        ({"permutations": 0}, "permutations must be an integer of at least 1, got 0"),
        ({"bands": 129}, "bands must be at most the 128 permutations, got 129"),
        ({"min_characters": -1}, "min_characters must be an integer of at least 0, got -1"),
        ({"sources": ["x", "y"], "priority": ["x"]}, "priority must name every source, got ['x'] without 'y'"),
        ({"sources": ["x", "x"], "priority": ["x", "x"]}, "priority must be distinct names"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(InputError) as caught:
        deduplicate(**({"texts": ["a", "b"]} | given))
    assert message in str(caught.value)


def test_an_error_of_the_texts_own_comes_through():
    with pytest.raises(UnicodeDecodeError):
        deduplicate((text.decode() for text in (b"a", b"\xff")), sources=["x", "y"])


def test_without_rensa_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(BatchlabError, match=r"pip install 'batchlab\[dedup\]'"):
        deduplicate(["a"])


def test_the_header_holds_pythons_truths():
    found = deduplicate(["one text that is long enough " * 9], verify=np.bool_(True), exact=np.bool_(True))
    assert '"verify": true' in found.header.to_json()
