"""A small net on scikit-learn's digits, in float64 NumPy, trained on one stream of examples at any batch size."""

from functools import lru_cache

import numpy as np

TEST = 360
EVERY = 1024


@lru_cache
def digits():
    """Train images and labels, test images and labels; images in [0, 1]. The same split always."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order] / 16, labels[order]
    return images[TEST:], labels[TEST:], images[:TEST], labels[:TEST]


def initial(seed):
    """Weights and biases of 64-64-10, uniform within 1/√fan-in as torch's Linear has them."""
    draw = np.random.default_rng(seed)
    return [
        draw.uniform(-(fan**-0.5), fan**-0.5, shape)
        for fan, shape in [(64, (64, 64)), (64, 64), (64, (64, 10)), (64, 10)]
    ]


def stream(seed, members, examples):
    """Indices of so many examples: `members` in a new random order each time round."""
    draw = np.random.default_rng([seed, 1])
    rounds = -(-examples // len(members))
    return np.concatenate([draw.permutation(members) for _ in range(rounds)])[:examples]


def logits(w, x):
    """Of the net with weights w, and its hidden layer."""
    hidden = np.maximum(x @ w[0] + w[1], 0)
    return hidden @ w[2] + w[3], hidden


def softmax(z):
    """Along the last axis."""
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def gradient(w, x, targets):
    """Of the mean cross-entropy to the targets, rows of probabilities."""
    z, hidden = logits(w, x)
    dz = (softmax(z) - targets) / len(x)
    dh = dz @ w[2].T * (hidden > 0)
    return [x.T @ dh, dh.sum(0), hidden.T @ dz, dz.sum(0)]


def test_loss(w):
    """Mean cross-entropy on the held-out images."""
    _, _, x, y = digits()
    z = logits(w, x)[0]
    top = z.max(1)
    return float((np.log(np.exp(z - top[:, None]).sum(1)) + top - z[np.arange(len(y)), y]).mean())


test_loss.__test__ = False


class Sgd:
    """w ← w - ηg."""

    def __init__(self, rate):
        self.rate = rate

    def step(self, w, g):
        for each, slope in zip(w, g, strict=True):
            each -= self.rate * slope


class Adam:
    """As torch.optim.Adam."""

    def __init__(self, rate, betas, eps):
        self.rate, (self.first, self.second), self.eps, self.t = rate, betas, eps, 0
        self.m, self.v = None, None

    def step(self, w, g):
        self.t += 1
        self.m = self.m or [np.zeros_like(each) for each in w]
        self.v = self.v or [np.zeros_like(each) for each in w]
        for each, slope, m, v in zip(w, g, self.m, self.v, strict=True):
            m += (1 - self.first) * (slope - m)
            v += (1 - self.second) * (slope * slope - v)
            root = np.sqrt(v / (1 - self.second**self.t)) + self.eps
            each -= self.rate / (1 - self.first**self.t) * m / root


def average(mean, w, decay):
    """ζ ← ρζ + (1 - ρ)θ."""
    for each, weight in zip(mean, w, strict=True):
        each += (1 - decay) * (weight - each)


def distance(a, b):
    """|a - b| over all weights."""
    return float(np.sqrt(sum(((x - y) ** 2).sum() for x, y in zip(a, b, strict=True))))


def supervised(seed, batch, optimizer, examples, decays=()):
    """Trained on all training images. The curve of test losses every 1024 examples, of the weights or, with decays, one
    of each average; and each average at the end, which starts at the initial weights."""
    x, y, *_ = digits()
    w, order, one_hot = initial(seed), stream(seed, np.arange(len(x)), examples), np.eye(10)[y]
    means = [[each.copy() for each in w] for _ in decays]
    curves = [[] for _ in decays or (None,)]
    for start in range(0, examples, batch):
        rows = order[start : start + batch]
        optimizer.step(w, gradient(w, x[rows], one_hot[rows]))
        for mean, decay in zip(means, decays, strict=True):
            average(mean, w, decay)
        if (start + batch) % EVERY == 0:
            for curve, seen in zip(curves, means or [w], strict=True):
                curve.append(test_loss(seen))
    return np.array(curves), means


def self_taught(seed, batch, rate, decay, examples, *, labelled=200, temperature=0.5):
    """Half of each update from labelled images, half towards what the average of the weights says of the others.

    examples: of either kind. Test losses of the weights and of the average, every 1024 of them.
    """
    x, y, *_ = digits()
    w, one_hot = initial(seed), np.eye(10)[y]
    teacher, curves = [each.copy() for each in w], ([], [])
    known = stream(seed, np.arange(labelled), examples)
    others = stream(seed + 1000, np.arange(labelled, len(x)), examples)
    optimizer = Sgd(rate)
    for start in range(0, examples, batch):
        rows, free = known[start : start + batch], others[start : start + batch]
        soft = softmax(logits(teacher, x[free])[0] / temperature)
        parts = gradient(w, x[rows], one_hot[rows]), gradient(w, x[free], soft)
        optimizer.step(w, [a + b for a, b in zip(*parts, strict=True)])
        average(teacher, w, decay)
        if (start + batch) % EVERY == 0:
            for curve, seen in zip(curves, (w, teacher), strict=True):
                curve.append(test_loss(seen))
    return np.array(curves)
