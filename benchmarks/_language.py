"""What benchmarks of batches of documents share: the standard library's files, a small decoder, one training run."""

import ast
import math
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.data.documents.documents import Documents
from batchlab.workloads.corpus import read_up_to
from batchlab.workloads.pystdlib import MAX_BYTES, source_files
from batchlab.workloads.split import hold_out

END = 0  # a byte that no source has, after every file
IGNORED = -100


def standard_library(definitions=False):
    """(train, valid): one file one document, a tenth of the files held out by the hash of their names.

    definitions: one function one document, those within classes too.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts, _ = read_up_to(root, source_files(root), MAX_BYTES)
    parts = [np.frombuffer(text, dtype=np.uint8) for text in texts.values()]
    train, valid = hold_out(list(texts), 0.1)
    if definitions:
        parts = [functions(text) for text in texts.values()]
        return tuple(Documents.of([part for i in each for part in parts[i]], end=END) for each in (train, valid))
    return tuple(Documents.of([parts[i] for i in each], end=END) for each in (train, valid))


def functions(text):
    """The bytes of each function of a source, outermost ones; none of a file that is cut or is no Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines, found, open_ = text.splitlines(keepends=True), [], list(tree.body)
    while open_:
        node = open_.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = b"".join(lines[node.lineno - 1 : node.end_lineno])
            found.append(np.frombuffer(body, dtype=np.uint8))
        elif isinstance(node, ast.ClassDef):
            open_ += node.body
    return found


class Decoder(nn.Module):
    """A pre-norm decoder over bytes, whose attention is causal within the parts of a flattened batch."""

    def __init__(self, context, *, width=64, layers=2, heads=2):
        super().__init__()
        self.heads = heads
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.mixed = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(layers))
        self.joined = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.hidden = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(layers))
        self.back = nn.ModuleList(nn.Linear(4 * width, width, bias=False) for _ in range(layers))
        self.out = nn.Linear(width, 256, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.startswith(("joined", "back"))
                nn.init.normal_(weight, std=(weight.shape[1] * (2 * layers if residual else 1)) ** -0.5)

    def forward(self, tokens, positions, bounds=None):
        """(n, length) to logits (n, length, 256). bounds: of the parts in the flattened batch; None: rows are parts."""
        x = self.tokens(tokens) + self.positions(positions)
        for at in range(len(self.mixed)):
            split = self.mixed[at](self.norms[2 * at](x)).unflatten(-1, (3, self.heads, -1))
            x = x + self.joined[at](self._attend(split, bounds).flatten(2))
            x = x + self.back[at](F.gelu(self.hidden[at](self.norms[2 * at + 1](x)), approximate="tanh"))
        return self.out(self.norms[-1](x))

    def _attend(self, split, bounds):
        if bounds is None:
            q, k, v = split.permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        q, k, v = split.flatten(0, 1).permute(1, 2, 0, 3)[:, None]
        sizes = torch.tensor(bounds).diff().tolist()
        parts = zip(*(each.split(sizes, dim=2) for each in (q, k, v)), strict=True)
        joined = torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts], dim=2)
        return joined[0].transpose(0, 1).unflatten(0, split.shape[:2])


def loss_sum(model, batch):
    """(Σ loss over targets, targets) of a batch (tokens, labels, positions, bounds)."""
    tokens, labels, positions, bounds = batch
    logits = model(tokens, positions, bounds)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, int((labels != IGNORED).sum())


def rows_as_parts(tokens, labels):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return tokens, labels, positions, None


class Training:
    """One AdamW update a batch, a warm-up over a tenth, a cosine to a tenth. seconds: the processor's, of updates.

    noted: the shape of each batch, (rows, length).
    """

    def __init__(self, batches, steps, context, *, lr, seed):
        torch.manual_seed(seed)
        self.model, self.batches, self.steps, self.lr = Decoder(context), iter(batches), steps, lr
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.033)
        self.seconds, self.useful, self.noted = 0.0, 0, []

    def update(self):
        """Nothing after the last step."""
        step = len(self.noted)
        if step == self.steps:
            return
        batch = next(self.batches)
        warm = min(1.0, (step + 1) / (0.1 * self.steps))
        self.optimizer.param_groups[0]["lr"] = self.lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / self.steps))
        start = time.process_time()
        total, targets = loss_sum(self.model, batch)
        self.optimizer.zero_grad()
        (total / targets).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds += time.process_time() - start
        self.useful += targets
        self.noted.append(tuple(batch[0].shape))


def side_by_side(trainings):
    """Update by update in turn, so that what else the machine does hits all alike."""
    for _ in range(max(each.steps for each in trainings)):
        for each in trainings:
            each.update()


@torch.no_grad()
def whole_documents_loss(model, documents, context, *, at_most=60_000):
    """Nats a byte over held-out documents, each from its beginning in windows of `context`; about `at_most` bytes.

    Documents come in order of the hash of their place, whole ones, so that no length is preferred.
    """
    total, targets = 0.0, 0
    for document in np.random.default_rng(0).permutation(len(documents)).tolist():
        begin, length = int(documents.offsets[document]), int(documents.lengths[document])
        for start in range(0, length - 1, context):
            row = documents.rows([begin + start], min(context + 1, length - start))
            loss, many = loss_sum(model, rows_as_parts(row[:, :-1], row[:, 1:]))
            total, targets = total + float(loss), targets + many
        if targets >= at_most:
            break
    return total / targets
