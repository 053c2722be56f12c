import pytest

from batchlab.core.errors import InputError
from batchlab.data.duplicates.deduplicate import deduplicate
from batchlab.data.mixtures.mixture import mixture_report, rrgs


def test_rrgs():
    assert rrgs([0.25] * 5) == 1.0 and rrgs([0.25, 0.75]) == 0.75 and rrgs([1.0, 1.0]) == 0.25
    assert rrgs([0.5, 1.0], chance=0.5) == 0.75
    for scores in ([], [1.1], [-0.1], [float("nan")]):
        with pytest.raises(InputError):
            rrgs(scores)


def test_a_report_adds_up():
    found = mixture_report(list("aabc"), [10, 20, 30, 40], weights={"a": 1, "b": 1, "c": 2}, budget=400)
    assert [(each.documents, each.tokens, each.weight, each.epochs) for each in found] == [
        (2, 30, 0.25, 100 / 30),
        (1, 30, 0.25, 100 / 30),
        (1, 40, 0.5, 5.0),
    ]
    assert sum(each.share_of_tokens for each in found) == pytest.approx(1) == sum(e.share_of_documents for e in found)
    assert [each.weight for each in mixture_report(list("aab"), [1, 1, 2])] == [0.5, 0.5]


def test_after_deduplication_kept_documents_count():
    text = "some words that are many enough to be kept by the least length of two hundred characters " * 4
    texts, sources = [text, text, "short", text + "and a few more"], ["a", "a", "b", "b"]
    found = mixture_report(
        sources, [90, 90, 1, 93], deduplication=deduplicate([*texts], sources=sources), weights={"a": 1, "b": 0}
    )
    assert [(each.documents, each.tokens, each.within, each.across, each.short) for each in found] == [
        (1, 90, 1, 0, 0),
        (0, 0, 0, 1, 1),
    ]
    with pytest.raises(InputError, match="deduplication must be of the 1 documents given, got one of 4"):
        mixture_report(["a"], [1], deduplication=deduplicate(texts, sources=sources))


@pytest.mark.parametrize("told", [None, ["web", "books", "web", "books"]])
def test_after_a_deduplication_that_was_told_of_other_sources_it_is_of_those_given_here(told):
    text = "some words that are many enough to be kept by the least length of two hundred characters " * 4
    found = deduplicate([text, text, "short", text], sources=told)
    shares = mixture_report(["web", "web", "books", "books"], [10, 10, 10, 10], deduplication=found)
    assert [(each.documents, each.within, each.across, each.short) for each in shares] == [(1, 1, 0, 0), (0, 0, 1, 1)]


def test_bad_input():
    for bad, message in (
        (("web", [1, 2, 3]), "sources must hold an entry for each document, got 'web'"),
        ((["a"], 5), "tokens must hold an entry for each document, got 5"),
        (([None, "a"], [1, 1]), "sources must be texts, got None at 0"),
    ):
        with pytest.raises(InputError, match=f"^{message}$"):
            mixture_report(*bad)
    with pytest.raises(InputError, match=r"^weights must name the sources \['a'\], got \[1\]$"):
        mixture_report(["a"], [1], weights=[1])
    for sources, tokens, shorter in ((["a"], [1, 2], "sources end after 1"), (["a", "b"], [1], "tokens end after 1")):
        with pytest.raises(InputError, match=f"must have one entry for each document: {shorter}"):
            mixture_report(sources, tokens)
    with pytest.raises(UnicodeDecodeError):
        mixture_report(["a", "b"], (len(text.decode()) for text in (b"a", b"\xff")))
    with pytest.raises(InputError, match="tokens must be integers of at least 0, got -1 at 1"):
        mixture_report(["a", "b"], [1, -1])
    with pytest.raises(InputError, match="tokens must not all be 0"):
        mixture_report([], [])
    with pytest.raises(InputError, match=r"weights must name the sources \['a'\], got \['b'\]"):
        mixture_report(["a"], [1], weights={"b": 1})
