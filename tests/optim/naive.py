"""The published update rules as plain loops over NumPy arrays in float64, written from the papers' formulas.

Each takes the weights, a function that gives the gradients at a step, and numbers; returns the weights after the steps.
"""

import math

import numpy as np


def norm(x):
    return math.sqrt(float((x * x).sum()))


def lars(ws, gradients, steps, *, rates, momentum, decay, trust, lr_in_momentum, adapt):
    ws, vs = [w.copy() for w in ws], [0 * w for w in ws]
    for t in range(steps):
        for i, g in enumerate(gradients(ws, t)):
            w, rate = ws[i], rates[t]
            ratio, lam = 1.0, decay
            if not adapt(w):
                lam = 0.0
            elif norm(w) > 0 and norm(g) > 0:
                ratio = trust * norm(w) / (norm(g) + lam * norm(w))
            step = ratio * (g + lam * w)
            vs[i] = momentum * vs[i] + (rate * step if lr_in_momentum else step)
            ws[i] = w - (vs[i] if lr_in_momentum else rate * vs[i])
    return ws


def lamb(ws, gradients, steps, *, rates, betas, eps, decay, adapt, correct=True):
    (b1, b2), ws = betas, [w.copy() for w in ws]
    ms, vs = [0 * w for w in ws], [0 * w for w in ws]
    for t in range(steps):
        for i, g in enumerate(gradients(ws, t)):
            ms[i] = b1 * ms[i] + (1 - b1) * g
            vs[i] = b2 * vs[i] + (1 - b2) * g * g
            c1, c2 = (1 - b1 ** (t + 1), 1 - b2 ** (t + 1)) if correct else (1.0, 1.0)
            r = (ms[i] / c1) / (np.sqrt(vs[i] / c2) + eps)
            u = r + (decay * ws[i] if adapt(ws[i]) else 0.0)
            ratio = norm(ws[i]) / norm(u) if adapt(ws[i]) and norm(ws[i]) > 0 and norm(u) > 0 else 1.0
            ws[i] = ws[i] - rates[t] * ratio * u
    return ws


def lion(ws, gradients, steps, *, rates, betas, decay):
    (b1, b2), ws, ms = betas, [w.copy() for w in ws], [0 * w for w in ws]
    for t in range(steps):
        for i, g in enumerate(gradients(ws, t)):
            direction = np.sign(b1 * ms[i] + (1 - b1) * g)
            ws[i] = ws[i] * (1 - rates[t] * decay) - rates[t] * direction
            ms[i] = b2 * ms[i] + (1 - b2) * g
    return ws


def signum(ws, gradients, steps, *, rates, momentum, decay, nesterov):
    ws, bs = [w.copy() for w in ws], [0 * w for w in ws]
    for t in range(steps):
        for i, g in enumerate(gradients(ws, t)):
            bs[i] = momentum * bs[i] + g
            direction = np.sign(g + momentum * bs[i] if nesterov else bs[i])
            ws[i] = ws[i] - rates[t] * decay * ws[i] - rates[t] * direction
    return ws


def ademamix(ws, gradients, steps, *, rates, betas, alpha, alpha_warmup, beta3_warmup, eps, decay):
    (b1, b2, b3), ws = betas, [w.copy() for w in ws]
    fast, slow, vs = ([0 * w for w in ws] for _ in range(3))

    def half_life(beta):
        return math.log(0.5) / math.log(beta + 1e-8) - 1

    for t in range(1, steps + 1):
        b3t = b3
        if t < beta3_warmup:
            between = (1 - t / beta3_warmup) * half_life(b1) + t / beta3_warmup * half_life(b3)
            b3t = 0.5 ** (1 / (between + 1))
        at = alpha * min(t / alpha_warmup, 1.0)
        for i, g in enumerate(gradients(ws, t - 1)):
            fast[i] = b1 * fast[i] + (1 - b1) * g
            slow[i] = b3t * slow[i] + (1 - b3t) * g
            vs[i] = b2 * vs[i] + (1 - b2) * g * g
            scale = np.sqrt(vs[i]) / math.sqrt(1 - b2**t) + eps
            u = (fast[i] / (1 - b1**t) + at * slow[i]) / scale + decay * ws[i]
            ws[i] = ws[i] - rates[t - 1] * u
    return ws


def mars(ws, gradients, steps, *, rates, betas, vector_lr, vector_betas, gamma, eps, decay):
    ws = [w.copy() for w in ws]
    ms, vs, last = ([0 * w for w in ws] for _ in range(3))
    for t in range(1, steps + 1):
        for i, g in enumerate(gradients(ws, t - 1)):
            matrix = g.ndim > 1
            b1, b2 = betas if matrix else vector_betas
            rate = rates[t - 1] * (1.0 if matrix else vector_lr)
            c = g
            if matrix:
                c = g + gamma * b1 / (1 - b1) * (g - last[i])
                c = c / norm(c) if norm(c) > 1 else c
                last[i] = g
            ms[i] = b1 * ms[i] + (1 - b1) * c
            vs[i] = b2 * vs[i] + (1 - b2) * c * c
            r = (ms[i] / (1 - b1**t)) / (np.sqrt(vs[i] / (1 - b2**t)) + eps)
            ws[i] = ws[i] - rate * (r + decay * ws[i])
    return ws
