"""Claim: deduplicating documents takes at most 1/20 of the processor's time that it takes with datasketch.

20,000 documents of 600 to 3,000 characters of the standard library's text in two sources, a fifth of them edited copies
of others in which 0.2 to 8 % of the words are other words. Truth is the Jaccard similarity of a planted pair's
shingles: recall is the share of planted copies at 0.85 or more that went, precision the share of removed documents that
have a similarity of at least 0.75 to the one they went for. datasketch signs the same normalised text's same 13-grams
as bytes, by its fastest way (`update_batch`), and searches with its own bands; both sides are compared on `--sample`
documents, as datasketch takes minutes for all. Then: the whole standard library's files, one document each; and memory
a document.
"""

import argparse
import random
import sysconfig
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
from _paired import median_ratio, paired_seconds, report
from datasketch import MinHash, MinHashLSH

from batchlab.data.duplicates.deduplicate import deduplicate
from batchlab.data.duplicates.near_duplicates import jaccard
from batchlab.data.duplicates.shingles import normalised, shingle_hashes

DOCUMENTS, COPIES = 20_000, 4_000


def main() -> None:
    """Prints each figure and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=400, help="documents in the comparison with datasketch")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/deduplicate.json")
    given = parser.parse_args()
    files = library()
    texts, sources, origin = corpus(files, seed=0)
    rows: list[dict[str, Any]] = [against_datasketch(texts[-given.sample :], given.pairs)]
    for scope in ("global", "local"):
        rows.append(quality(texts, sources, origin, scope))
        print(rows[-1], flush=True)
    rows.append(memory(texts, sources))
    start = time.process_time()
    found = deduplicate(files)
    size = sum(map(len, files)) / 1e6
    rows.append({"what": "standard library", "documents": len(files), "megacharacters": size})
    rows[-1] |= {"seconds": time.process_time() - start, "removed": len(files) - len(found.kept)}
    print(*rows[-2:], sep="\n", flush=True)
    report("deduplicate", (__doc__ or "").splitlines()[0], rows, save=given.save)


def library() -> list[str]:
    """The text of every Python file of the standard library, in the order of their paths."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    return [path.read_text("utf-8", "replace") for path in paths]


def corpus(files: list[str], *, seed: int) -> tuple[list[str], list[str], dict[int, int]]:
    """Texts and sources in a random order, and for each copy the place of its original."""
    draw = random.Random(seed)
    words = [word for text in draw.sample(files, 50) for word in text.split()]
    originals = []
    while len(originals) < DOCUMENTS - COPIES:
        text = draw.choice(files)
        length = draw.randrange(600, 3000)
        if len(text) > length:
            start = draw.randrange(len(text) - length)
            originals.append(text[start : start + length])
    made = [(text, draw.choice(("web", "books")), None) for text in originals]
    for of in draw.sample(range(len(originals)), COPIES):
        share = draw.uniform(0.002, 0.08)
        copy = " ".join(draw.choice(words) if draw.random() < share else word for word in originals[of].split())
        made.append((copy, draw.choice(("web", "books")), of))
    places = list(range(DOCUMENTS))
    draw.shuffle(places)
    where = {made_at: place for place, made_at in enumerate(places)}
    texts, sources = zip(*((made[at][0], made[at][1]) for at in places), strict=True)
    return list(texts), list(sources), {where[at]: where[of] for at, (_, _, of) in enumerate(made) if of is not None}


def shingles(text: str) -> Any:
    """Its sorted distinct hashes."""
    return np.unique(shingle_hashes([normalised(text)])[0])


def quality(texts: list[str], sources: list[str], origin: dict[int, int], scope: Any) -> dict[str, Any]:
    """Recall of planted pairs by similarity, and precision of all removals, by the true similarity."""
    start = time.process_time()
    found = deduplicate(texts, sources=sources, scope=scope, priority=("books", "web"))
    seconds = time.process_time() - start
    planted = [(a, b, jaccard(shingles(texts[a]), shingles(texts[b]))) for a, b in origin.items()]
    gone = found.keeper != np.arange(len(texts))
    row: dict[str, Any] = {"what": "quality", "scope": scope, "documents": len(texts), "seconds": seconds}
    gone_at = [gone[a] or gone[b] for a, b, j in planted if j >= 0.85]
    row["recall"] = float(np.mean(gone_at))
    for name, low, high in (("0.85 to 1", 0.85, 1.01), ("0.9 to 1", 0.9, 1.01), ("below 0.5", 0.0, 0.5)):
        for kind in ("own", "other"):
            which = [
                gone[a] or gone[b]
                for a, b, j in planted
                if low <= j < high and (sources[a] == sources[b]) == (kind == "own")
            ]
            row[f"removed of {name}, {kind} source"] = [int(sum(which)), len(which)]
    removed = [r for r in found.removals() if r.by is not None]
    right = [jaccard(shingles(texts[r.index]), shingles(texts[r.by])) >= 0.75 for r in removed]
    return row | {"removed": len(removed), "precision": sum(right) / len(right)}


def against_datasketch(texts: list[str], pairs: int) -> dict[str, Any]:
    """The ratio of times on some documents, and how many verdicts are the same."""
    ours, theirs = set(), set()

    def with_batchlab() -> None:
        ours.clear()
        ours.update(deduplicate(texts).kept.tolist())

    def with_datasketch() -> None:
        theirs.clear()
        index = MinHashLSH(threshold=0.8, num_perm=128)
        for at, text in enumerate(texts):
            plain = normalised(text)
            sketch = MinHash(num_perm=128)
            sketch.update_batch([plain[k : k + 13].encode() for k in range(len(plain) - 12)])
            if not index.query(sketch):
                index.insert(at, sketch)
                theirs.add(at)

    seconds = paired_seconds(with_batchlab, with_datasketch, pairs=pairs, warm_up=1, clock=time.process_time)
    row = {"what": "time over datasketch's", "documents": len(texts)} | median_ratio(seconds)
    row |= {"times_faster": 1 / row["ratio"], "other_verdicts": len(ours ^ theirs), "holds": row["high"] <= 1 / 20}
    print(
        f"{row['times_faster']:.1f} times datasketch, {row['other_verdicts']} of {len(texts)} verdicts differ",
        flush=True,
    )
    return row | {"pairs": seconds}


def memory(texts: list[str], sources: list[str]) -> dict[str, Any]:
    """Bytes of Python's and NumPy's memory a document, of a stream of texts that are not held: peak, and at the end."""
    deduplicate(texts[:100])
    tracemalloc.start()
    found = deduplicate((str(text) for text in texts), sources=iter(sources))
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"what": "bytes a document", "peak": peak / len(texts), "after": after / len(texts), "kept": len(found.kept)}


if __name__ == "__main__":
    main()
