"""Claim: decomposed and packed batches train on 1.3 times the useful tokens a second of padded ones, at the same loss.

Bytes of the standard library's files, one file one document; with --functions one function, of which most are shorter
by far than the context, as in fine-tuning. Useful tokens are targets that are no padding. The peer is a random batch of
parts of at most 2048 bytes, each padded to 2048: torch's shuffled `BatchSampler` over a data set cut to length. Every
way has the same model, rate and useful tokens an update, to a row of the peer; pieces are of 64 to 2048 bytes, in the
proportion of 1 to 32 of the paper. Attention within a packed sequence goes part by part, as a kernel for ragged
sequences does. Seconds are the processor's, of updates alone, taken in turn.
"""

import argparse
import json
import statistics

import numpy as np
import torch
from _language import IGNORED, Training, rows_as_parts, side_by_side, standard_library, whole_documents_loss
from _paired import result, write
from torch.utils.data import BatchSampler, RandomSampler

from batchlab.data.documents.dataset_decomposition import DatasetDecomposition
from batchlab.data.documents.decompose import PieceDataset, decompose
from batchlab.data.documents.decomposition_plan import plan_decomposition
from batchlab.data.documents.pack import pack
from batchlab.data.documents.packed_batch import cu_seqlens, packed_batch
from batchlab.data.documents.packed_batches import PackedBatches

CONTEXT, ROWS, RATE = 2048, 2, 6e-3
SEEDS = (0, 1, 2)


def padded(documents, seed, many):
    """The peer: parts of at most 2048 bytes, one a row, `many` of them a batch."""
    rows = []
    for begin, length in zip(documents.offsets[:-1].tolist(), documents.lengths.tolist(), strict=True):
        rows += [(begin + at, min(CONTEXT + 1, length - at)) for at in range(0, length - 1, CONTEXT)]
    shuffle = RandomSampler(rows, generator=torch.Generator().manual_seed(seed))
    for indices in BatchSampler(shuffle, many, drop_last=True):
        tokens = torch.zeros(many, CONTEXT, dtype=torch.long)
        labels = torch.full_like(tokens, IGNORED)
        for row, index in enumerate(indices):
            begin, length = rows[index]
            part = documents.rows([begin], length)[0]
            tokens[row, : length - 1], labels[row, : length - 1] = part[:-1], part[1:]
        yield rows_as_parts(tokens, labels)


def packed(documents, seed):
    packing = pack(documents.lengths, CONTEXT)
    for batch in PackedBatches(packing, ROWS, seed=seed):
        made = packed_batch(documents, packing, batch)
        yield made.input_ids, made.labels, made.position_ids, cu_seqlens(made.position_ids)[0].tolist()


def decomposed(documents, seed, useful):
    pieces = decompose(documents.lengths, 6, 11, seed=seed)
    plan = plan_decomposition(
        pieces.counts, pieces.lengths, tokens_per_step=ROWS * CONTEXT, cycles=2, total_tokens=useful
    )
    data = PieceDataset(documents, pieces)
    for batch in DatasetDecomposition(pieces, plan, seed=seed):
        inputs, targets = map(torch.stack, zip(*data.__getitems__(batch), strict=True))
        yield rows_as_parts(inputs, targets)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2**18, help="useful tokens of a run")
    parser.add_argument("--functions", action="store_true", help="one function one document, not one file")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/useful_tokens.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    train, valid = standard_library(given.functions)
    shares = {"padded": int(np.sum(train.lengths - 1)) / (CONTEXT * int(np.sum(-(-(train.lengths - 1) // CONTEXT))))}
    shares |= {"packed": 1 - pack(train.lengths, CONTEXT).padding_share, "decomposed": 1.0}
    many = dict.fromkeys(shares, ROWS) | {"padded": round(ROWS / shares["padded"])}
    ways = {
        "padded": lambda d, s: padded(d, s, many["padded"]),
        "packed": packed,
        "decomposed": lambda d, s: decomposed(d, s, given.tokens),
    }
    rows = []
    for seed in SEEDS:
        steps = {name: round(given.tokens / (many[name] * CONTEXT * shares[name])) for name in ways}
        runs = {n: Training(way(train, seed), steps[n], CONTEXT, lr=RATE, seed=seed) for n, way in ways.items()}
        side_by_side(list(runs.values()))
        for name, run in runs.items():
            loss = whole_documents_loss(run.model, valid, CONTEXT)
            rows.append({"way": name, "seed": seed, "useful": run.useful, "seconds": run.seconds, "valid_loss": loss})
            print(rows[-1], flush=True)
    found = {(row["way"], row["seed"]): row for row in rows}
    for name in ("packed", "decomposed"):
        pairs = [(found[name, seed], found["padded", seed]) for seed in SEEDS]
        speed = [a["useful"] / a["seconds"] / (b["useful"] / b["seconds"]) for a, b in pairs]
        loss = [a["valid_loss"] / b["valid_loss"] for a, b in pairs]
        row = {"way": f"{name} / padded", "ratio": statistics.median(speed), "low": min(speed), "high": max(speed)}
        row |= {"loss_ratio": statistics.median(loss), "loss_ratios": loss, "useful_a_second": speed}
        rows.append(row | {"holds": row["ratio"] >= 1.3 and row["loss_ratio"] <= 1.01})
    name = "useful_tokens_functions" if given.functions else "useful_tokens"
    outcome = result(name, __doc__.split("\n")[0], [*rows, {"way": "useful share"} | shares])
    if given.save:
        write(outcome)
    print(json.dumps(rows[-2:] + [shares]))


if __name__ == "__main__":
    main()
