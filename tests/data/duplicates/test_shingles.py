import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.data.duplicates.shingles import normalised, shingle_hashes

TEXTS = st.lists(st.text(alphabet="ab cé\U0001f600", max_size=40).map(normalised), max_size=12)


def _naive(text, shingle, n):
    units = list(text) if shingle == "char" else text.split()
    return [tuple(units[at : at + n]) for at in range(max(1, len(units) - n + 1))]


@given(texts=TEXTS, shingle=st.sampled_from(["char", "word"]), n=st.integers(1, 14))
def test_hashes_are_equal_exactly_where_runs_of_units_are(texts, shingle, n):
    hashes, offsets = shingle_hashes(texts, shingle, n)
    of = {}
    for at, text in enumerate(texts):
        mine, right = hashes[offsets[at] : offsets[at + 1]].tolist(), _naive(text, shingle, n)
        assert len(mine) == len(right)
        for run, found in zip(right, mine, strict=True):
            assert of.setdefault(run, found) == found
    assert len(set(of.values())) == len(of)


@given(texts=TEXTS, shingle=st.sampled_from(["char", "word"]))
def test_a_text_alone_has_the_hashes_that_it_has_among_others(texts, shingle):
    hashes, offsets = shingle_hashes(texts, shingle, 3)
    for at, text in enumerate(texts):
        assert np.array_equal(shingle_hashes([text], shingle, 3)[0], hashes[offsets[at] : offsets[at + 1]])


def test_what_is_compared():
    assert normalised("  It's\tÉTÉ —\n\n(again)! ") == "its été — again"
    assert normalised("?!") == ""


def test_bad_input():
    with pytest.raises(InputError, match='shingle must be "char" or "word", got \'words\''):
        shingle_hashes(["a"], "words")
    with pytest.raises(InputError, match="ngram must be an integer of at least 1, got 0"):
        shingle_hashes(["a"], ngram=0)
