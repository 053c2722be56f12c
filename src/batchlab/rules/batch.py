"""How large a batch should be, by the published laws: each answers another question, and says which.

Optimal: of least loss for given tokens or compute. Critical: where more batch begins to cost more tokens, 20 % more
("cbs" of Zhang et al.) or twice the least (`power_lines_crit`, `kaplan_cbs`). All take plain counts, never millions,
and give a `TokenBatch`, whose unit cannot be mistaken. Constants and ranges stand in `laws.toml`.

The absolute laws belong to the data, tokenizer and optimizer that they were fitted with. From a batch that you have
tuned, move by `data_budget(..., base=...)` and the like, or fit the law to your own runs (`rules.fit`). A `TokenBatch`
says in `outside` where a law extrapolates, from a base too: there the exponent does, of either run.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.rules.published import Law, law
from batchlab.rules.token_batch import TokenBatch

Algorithm = Literal["data_parallel", "diloco"]
DILOCO_REPLICAS = (1, 2, 4, 8)
COMPUTE_SLACK = 2.0


class Base(NamedTuple):
    """A batch that was tuned, and the tokens it was tuned for: a law's prefactor from your own run."""

    batch_tokens: float
    tokens: float


def power_lines_opt(*, tokens: float, base: Base | None = None) -> TokenBatch:
    """B_opt = 0.0306·D^0.383 sequences of 2048: of least loss for D training tokens (Bergsma et al. 2025).

    tokens: D, all that are trained on. base: its own prefactor, B = B₀·(D/D₀)^0.383.

    >>> round(power_lines_opt(tokens=1.22e10).sequences(2048))
    223
    """
    check_positive(tokens=tokens)
    rule = law("power_lines_opt")
    return _power(rule, rule["a"] * tokens ** rule["p"] * rule["sequence_length"], rule["p"], tokens, base)


def power_lines_crit(*, least_tokens: float, base: Base | None = None) -> TokenBatch:
    """B_crit = 0.0471·D_min^0.462 sequences of 2048, which takes twice the least tokens (Bergsma et al. 2025).

    least_tokens: D_min, what a small batch takes to the loss; the tokens of a run at B are D_min(1 + B/B_crit).

    >>> round(power_lines_crit(least_tokens=1.22e10).sequences(2048))
    2152
    """
    check_positive(least_tokens=least_tokens)
    rule = law("power_lines_crit")
    batch = rule["a"] * least_tokens ** rule["p"] * rule["sequence_length"]
    return _power(rule, batch, rule["p"], least_tokens, base, name="least_tokens")


def chinchilla_cbs(*, params: float) -> TokenBatch:
    """B* = 93.20·(N/10⁶)^0.468 sequences of 512, at 20 tokens a parameter (Zhang et al. 2024).

    B* costs 20 % more tokens than 256 sequences. params: N.

    >>> round(chinchilla_cbs(params=302e6).sequences(512))
    1349
    """
    return _cbs("chinchilla_cbs", params=params)


def data_cbs(*, tokens: float) -> TokenBatch:
    """B* = 22.91·(D/10⁶)^0.47 sequences of 512, by training tokens alone (Zhang et al. 2024).

    A widely copied note has billions for millions: 1.7e9 tokens would give 29 sequences.

    >>> round(data_cbs(tokens=1.7e9).sequences(512))
    756
    """
    return _cbs("data_cbs", tokens=tokens)


def model_cbs(*, params: float) -> TokenBatch:
    """B* = 621.34·(N/10⁶)^0.087 sequences of 512, tokens fixed: almost flat (Zhang et al. 2024)."""
    return _cbs("model_cbs", params=params)


def kaplan_cbs(*, loss: float, constants: Literal["kaplan", "trajectory"] = "kaplan") -> TokenBatch:
    """B_crit = B_*/L^(1/α_B) tokens at a loss L, whatever the model (Kaplan et al. 2020).

    loss: nats a token, with the law's own tokenizer. constants: Kaplan et al.'s (0.21, 2.0e8 tokens) or those of Su
    et al. 2024 ("trajectory": 0.205, 1.7e8, unverified).

    >>> round(kaplan_cbs(loss=3.0).tokens)
    1069114
    """
    if constants not in ("kaplan", "trajectory"):
        raise InputError(f'constants must be "kaplan" or "trajectory", got {constants!r}')
    check_positive(loss=loss)
    rule = law(f"{constants}_cbs")
    outside = rule.outside(loss=loss)
    return TokenBatch(rule["B_star"] / loss ** (1 / rule["alpha_B"]), rule.name, outside)


def data_budget(*, tokens: float, base: Base | None = None) -> TokenBatch:
    """B_opt = 3.24e3·D^0.264 tokens: of least loss for D training tokens (Shuai et al. 2024).

    base: its own prefactor, B = B₀·(D/D₀)^0.264. Not for a fixed compute: there it is `compute_budget`.

    >>> [float(f"{data_budget(tokens=d).tokens:.2g}") for d in (1e9, 1e11)]
    [770000.0, 2600000.0]
    """
    check_positive(tokens=tokens)
    rule = law("data_budget")
    return _power(rule, rule["a"] * tokens ** rule["p"], rule["p"], tokens, base)


class ComputeBudget(NamedTuple):
    """What to train with a compute budget. params: N. tokens: D. steps: S = D/B. batch: B."""

    params: float
    tokens: float
    steps: float
    batch: TokenBatch


def compute_budget(
    *, compute: float, base_compute: float, base_params: float, base_tokens: float, base_batch_tokens: float
) -> ComputeBudget:
    """N ∝ C^0.464, D ∝ C^0.536, S ∝ C^0.434, B ∝ C^0.102, from a run that was optimal (Shuai et al. 2024).

    compute: C = 6ND, in FLOP; base_compute: of the optimal run, with its N, D and B. The paper's prefactors are not
    published, so the law moves a run of yours and gives none by itself. base_compute is refused where it is more than
    twice or less than half of 6ND, which leaves room for another count of attention and embeddings.

    >>> moved = compute_budget(compute=1e21, base_compute=1e19, base_params=3e8, base_tokens=6e9, base_batch_tokens=5e5)
    >>> round(moved.batch.tokens), round(moved.tokens / moved.steps / moved.batch.tokens, 9)
    (799779, 1.0)
    """
    check_positive(
        compute=compute,
        base_compute=base_compute,
        base_params=base_params,
        base_tokens=base_tokens,
        base_batch_tokens=base_batch_tokens,
    )
    _check_run(base_batch_tokens, base_tokens)
    accounted = 6 * base_params * base_tokens
    if not 1 / COMPUTE_SLACK <= base_compute / accounted <= COMPUTE_SLACK:
        raise InputError(
            f"base_compute must be about 6*base_params*base_tokens = {accounted:.4g} FLOP, got {base_compute:.4g}"
        )
    rule, growth = law("compute_budget"), compute / base_compute
    batch = TokenBatch(base_batch_tokens * growth ** rule["b"], rule.name)
    steps = base_tokens / base_batch_tokens * growth ** rule["s"]
    return ComputeBudget(base_params * growth ** rule["n"], base_tokens * growth ** rule["d"], steps, batch)


def diloco_opt(
    *,
    params: float,
    replicas: int | None = None,
    algorithm: Algorithm = "data_parallel",
    fit: Literal["joint", "independent"] = "joint",
) -> TokenBatch:
    """The best global batch of data-parallel training, or of DiLoCo with M replicas (Charles et al. 2025).

    B = A·N^α·M^β (`fit="joint"`, which the source recommends) or A·N^α with constants for each M of 1, 2, 4, 8, in
    sequences of 2048 tokens: the paper says tokens, which would be less than one sequence. params: N, at 20 tokens a
    parameter. replicas: M, for `algorithm="diloco"`; each of them takes 1/M of the batch.

    >>> [round(diloco_opt(params=2.4e9, algorithm="diloco", replicas=m).sequences(2048)) for m in (1, 2, 4, 8)]
    [180, 227, 288, 364]
    """
    rule = law("diloco_batch")
    value = diloco_law(rule, params=params, replicas=replicas, algorithm=algorithm, fit=fit)
    outside = rule.outside(params=params, **({} if replicas is None else {"replicas": replicas}))
    return TokenBatch.of_sequences(value, rule["sequence_length"], law=rule.name, outside=outside)


def diloco_law(
    rule: Law, *, params: float, replicas: int | None, algorithm: Algorithm, fit: Literal["joint", "independent"]
) -> float:
    """A·N^α or A·N^α·M^β by the constants of a DiLoCo law, in the law's own unit."""
    check_positive(params=params)
    if algorithm == "data_parallel":
        if replicas is not None:
            raise InputError(f'replicas is for algorithm="diloco", got {replicas!r} with "data_parallel"')
        return float(rule["dp_A"] * params ** rule["dp_alpha"])
    if algorithm != "diloco":
        raise InputError(f'algorithm must be "data_parallel" or "diloco", got {algorithm!r}')
    if replicas is None:
        raise InputError('algorithm="diloco" needs replicas, got None')
    check_count(replicas=replicas)
    if fit == "joint":
        return float(rule["joint_A"] * params ** rule["joint_alpha"] * replicas ** rule["joint_beta"])
    if fit != "independent":
        raise InputError(f'fit must be "joint" or "independent", got {fit!r}')
    if replicas not in DILOCO_REPLICAS:
        raise InputError(f'replicas must be one of {DILOCO_REPLICAS} for fit="independent", got {replicas!r}')
    return float(rule[f"m{replicas}_A"] * params ** rule[f"m{replicas}_alpha"])


def _power(
    rule: Law, batch: float, exponent: float, tokens: float, base: Base | None, *, name: str = "tokens"
) -> TokenBatch:
    """The absolute law, or moved from a base."""
    if base is None:
        outside = rule.outside(**{name: tokens})
    else:
        if not isinstance(base, Base):
            raise InputError(f"base must be a rules.batch.Base, got {base!r}")
        check_positive(base_batch_tokens=base.batch_tokens, base_tokens=base.tokens)
        _check_run(base.batch_tokens, base.tokens)
        batch = base.batch_tokens * (tokens / base.tokens) ** exponent
        outside = rule.extrapolates(**{name: tokens, f"base_{name}": base.tokens})
    _check_run(batch, tokens, name=name, given="the law gives")
    return TokenBatch(batch, rule.name, outside)


def _check_run(batch_tokens: float, tokens: float, *, name: str = "tokens", given: str = "got") -> None:
    if batch_tokens > tokens:
        raise InputError(
            f"{name} must be those of the whole run, at least one batch of {batch_tokens:.4g} ({given}), "
            f"got {tokens:.6g}"
        )


def _cbs(name: str, **given: float) -> TokenBatch:
    """d·(x/10⁶)^β sequences: the source counts x in millions."""
    rule, (value,) = law(name), given.values()
    outside = rule.outside(**given)
    sequences = rule["d"] * (value / 1e6) ** rule["beta"]
    return TokenBatch.of_sequences(sequences, rule["sequence_length"], law=name, outside=outside)
