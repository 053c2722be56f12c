"""Claim: decomposition takes at most 0.6 of concat-and-chunk's attention, with a loss on whole documents within 1 %.

Bytes of the standard library's files, one file one document, lengths of 64 to 512, the same tokens for both (check of
Pouransari et al. 2024 in miniature). Concat-and-chunk joins the shuffled files and cuts every 512 bytes, with attention
across files, as is usual. Most files are longer than 512 bytes, so that draws set the lengths: the share of attention
without them is given too. Attention: the sum over steps of tokens times length. All have the same model and rate.
"""

import argparse
import json
import statistics

import numpy as np
import torch
from _language import Training, rows_as_parts, side_by_side, standard_library, whole_documents_loss
from _paired import result, write

from batchlab.data.documents.dataset_decomposition import DatasetDecomposition
from batchlab.data.documents.decompose import PieceDataset, decompose
from batchlab.data.documents.decomposition_plan import plan_decomposition
from batchlab.data.documents.documents import Documents
from batchlab.data.documents.pack import pack
from batchlab.data.documents.packed_batches import PackedBatches

LONGEST, ROWS, RATE = 512, 8, 6e-3
SEEDS = (0, 1, 2)


def chunked(documents, seed):
    """The peer: chunks of 513 bytes of the files end to end, in a random order."""
    order = np.random.default_rng(seed).permutation(len(documents))
    parts = [documents.rows([documents.offsets[at]], int(documents.lengths[at]))[0].numpy() for at in order]
    joined = Documents.of([np.concatenate(parts)])
    packing = pack(joined.lengths, LONGEST + 1, "wrapped")
    for batch in PackedBatches(packing, ROWS, seed=seed):
        if all(packing.length[index] == LONGEST + 1 for index in batch):
            rows = joined.rows(packing.start[batch], LONGEST + 1)
            yield rows_as_parts(rows[:, :-1], rows[:, 1:])


def decomposed(documents, seed, tokens, curriculum):
    pieces = decompose(documents.lengths, 6, 9, seed=seed)
    plan = plan_decomposition(
        pieces.counts, pieces.lengths, tokens_per_step=ROWS * LONGEST, cycles=2, total_tokens=tokens
    )
    data = PieceDataset(documents, pieces)
    for batch in DatasetDecomposition(pieces, plan, curriculum=curriculum, seed=seed):
        yield rows_as_parts(*map(torch.stack, zip(*data.__getitems__(batch), strict=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2**18)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/decomposition.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    train, valid = standard_library()
    steps = given.tokens // (ROWS * LONGEST)
    ways = {
        "concat and chunk": chunked,
        "grow_p2": lambda d, s: decomposed(d, s, given.tokens, "grow_p2"),
        "natural": lambda d, s: decomposed(d, s, given.tokens, "natural"),
    }
    rows = []
    for seed in SEEDS:
        runs = {name: Training(way(train, seed), steps, LONGEST, lr=RATE, seed=seed) for name, way in ways.items()}
        side_by_side(list(runs.values()))
        for name, run in runs.items():
            loss = whole_documents_loss(run.model, valid, LONGEST)
            attention = sum(rows_ * length**2 for rows_, length in run.noted)
            row = {"way": name, "seed": seed, "tokens": run.useful, "attention": attention, "seconds": run.seconds}
            rows.append(row | {"valid_loss": loss})
            print(rows[-1], flush=True)
    found = {(row["way"], row["seed"]): row for row in rows}
    for name in list(ways)[1:]:
        pairs = [(found[name, seed], found["concat and chunk", seed]) for seed in SEEDS]
        ratios = {what: [a[what] / b[what] for a, b in pairs] for what in ("attention", "seconds", "valid_loss")}
        medians = {f"{what}_ratio": statistics.median(each) for what, each in ratios.items()}
        holds = medians["attention_ratio"] <= 0.6 and medians["valid_loss_ratio"] <= 1.01
        rows.append({"way": f"{name} / concat and chunk"} | medians | {"holds": holds, "ratios": ratios})
    whole = decompose(train.lengths, 6, 9, randomize=False)
    sizes = list(zip(whole.counts, whole.lengths, strict=True))
    share = sum(count * length**2 for count, length in sizes) / (LONGEST * sum(count * n for count, n in sizes))
    rows.append({"way": "without draws, untrained", "attention_ratio": share})
    outcome = result("decomposition", __doc__.split("\n")[0], rows)
    if given.save:
        write(outcome)
    print(json.dumps(rows[-3:]))


if __name__ == "__main__":
    main()
