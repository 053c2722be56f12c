"""Muon equals torch's and plain loops, matches AdamW's step size, and takes each matrix to one rank alone."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim import muon
from batchlab.optim.muon import DMuon, Muon, muon_groups, step_scale
from batchlab.optim.newton_schulz import JORDAN
from batchlab.testing.optimizers import compiled_equals_the_loop, gradients_for, same, small_model, trained
from batchlab.testing.optimizers_spread import model_to_spread, spread, take_steps
from tests.optim.problem import RATES, STEPS, after, close, gradients, weights
from tests.spine.forked import in_ranks

SHAPES = [(64, 32), (24, 48), (20, 20)]


def svd(u):
    """Newton-Schulz as its polynomial in the singular values, in float64."""
    left, s, right = np.linalg.svd(u.reshape(len(u), -1), full_matrices=False)
    s = s / max(np.linalg.norm(s), 1e-7)
    a, b, c = JORDAN
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return ((left * s) @ right).reshape(u.shape)


def loop(*, form, nesterov, scale, decay, betas=(0.95, 0.95), mu=0.9, eps=1e-8):
    """The module's formulas on NumPy arrays; AdamW for vectors."""
    ws = weights()
    ms, vs = [0 * w for w in ws], [0 * w for w in ws]
    for t, rate in enumerate(RATES, 1):
        for i, g in enumerate(gradients(ws, t - 1)):
            if g.ndim < 2:
                ms[i] = betas[0] * ms[i] + (1 - betas[0]) * g
                vs[i] = betas[1] * vs[i] + (1 - betas[1]) * g * g
                u = (ms[i] / (1 - betas[0] ** t)) / (np.sqrt(vs[i] / (1 - betas[1] ** t)) + eps)
                ws[i] = ws[i] - rate * (u + decay * ws[i])
                continue
            ms[i] = mu * ms[i] + ((1 - mu) * g if form == "ema" else g)
            u = ms[i] if not nesterov else ((1 - mu) * g if form == "ema" else g) + mu * ms[i]
            rows, columns = len(g), g.size // len(g)
            s = 0.2 * max(rows, columns) ** 0.5 if scale == "match_rms_adamw" else max(1, rows / columns) ** 0.5
            ws[i] = ws[i] - rate * ((s if scale else 1.0) * svd(u) + decay * ws[i])
    return ws


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    ("form", "nesterov", "scale"), [("ema", True, "match_rms_adamw"), ("sum", True, "jordan"), ("sum", False, None)]
)
def test_a_hundred_steps_are_the_formulas(form, nesterov, scale, foreach):
    options = {"momentum_form": form, "nesterov": nesterov, "scale": scale}
    make = partial(Muon, lr=1.0, weight_decay=0.1, momentum=0.9, use_muon="matrices", foreach=foreach, **options)
    assert len(RATES) == STEPS == 100
    close(after(make), loop(form=form, nesterov=nesterov, scale=scale, decay=0.1))


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def stepped(optimizer, parameters, steps=5):
    generator = torch.Generator().manual_seed(9)
    for _ in range(steps):
        for each in parameters:
            each.grad = torch.randn(each.shape, generator=generator)
        optimizer.step()
    return [each.detach() for each in parameters]


@pytest.mark.parametrize(("scale", "name"), [("jordan", "original"), ("match_rms_adamw", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_it_takes_the_steps_of_torchs_muon(scale, name, nesterov):
    """In bfloat16 products, to the last bit of a weight or two."""
    ours, theirs = matrices(), matrices()
    found = stepped(Muon(ours, lr=0.01, scale=scale, nesterov=nesterov), ours)
    expected = stepped(torch.optim.Muon(theirs, lr=0.01, adjust_lr_fn=name, nesterov=nesterov), theirs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def like_matrices(count):
    return [nn.Parameter(each) for each in torch.randn(count, 24, 48, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("threads", "foreach", "expected"),
    [(1, None, [1] * 5), (2, None, [2, 2, 1]), (3, None, [3, 2]), (3, False, [1] * 5), (1, True, [2, 2, 1])],
)
def test_threads_share_the_matrices_of_one_shape(threads, foreach, expected, monkeypatch):
    """On a CPU; the same steps, but for rounding, as one matrix at a time takes."""
    sizes, updates = [], muon.updates

    def noting(us, **options):
        sizes.append(len(us))
        return updates(us, **options)

    monkeypatch.setattr(muon, "updates", noting)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ends = []
    for each in (foreach, False):
        sizes.clear()
        ps = like_matrices(5)
        ends.append(stepped(Muon(ps, lr=0.01, ns_dtype=torch.float64, foreach=each), ps, steps=1))
        assert sizes == (expected if each is foreach else [1] * 5)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_two_momenta_part_by_rounding_alone():
    """Under 15 % of one update after five steps in bfloat16, and a thousandth in float32."""
    for dtype, share in ((torch.bfloat16, 0.15), (torch.float32, 1e-3)):
        ends = []
        for form in ("ema", "sum"):
            ps = matrices()
            ends.append(stepped(Muon(ps, lr=0.01, momentum_form=form, ns_dtype=dtype), ps))
        ps = matrices()
        start = [p.detach().clone() for p in ps]
        one = stepped(Muon(ps, lr=0.01, weight_decay=0.0), ps, steps=1)
        update = max(float((a - b).abs().max()) for a, b in zip(one, start, strict=True))
        gap = max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))
        assert gap <= share * update


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (128, 128)])
def test_the_update_has_the_size_of_adamws(shape):
    w = nn.Parameter(torch.zeros(shape))
    w.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer = Muon([w], lr=1.0)
    with optimizer.watching():
        optimizer.step()
    assert 0.165 < w.detach().square().mean().sqrt() < 0.185
    orthogonal = torch.linalg.qr(torch.randn(max(shape), min(shape)))[0] * step_scale(shape, "match_rms_adamw")
    assert orthogonal.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-5)
    assert 0.05 < optimizer.report()["parameter 0 of shape " + str(shape)]["orthogonality_error"] < 0.5


def test_a_convolution_is_one_matrix_of_its_outputs():
    conv, flat = nn.Parameter(torch.ones(6, 3, 2, 2)), nn.Parameter(torch.ones(6, 12))
    conv.grad = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    flat.grad = conv.grad.view(6, 12)
    for each in (conv, flat):
        Muon([each], lr=0.1).step()
    assert torch.equal(conv.detach().view(6, 12), flat.detach())


def test_groups_without_muon_are_adamw():
    """One optimizer and one scheduler for both; torch's AdamW to 1e-14."""
    ours, theirs = small_model(), small_model()
    split = {muon: [p for p in ours.parameters() if (p.ndim > 1) == muon] for muon in (True, False)}
    groups = [{"params": params, "use_muon": muon} for muon, params in split.items()]
    muon = Muon(groups, lr=0.01, adamw_betas=(0.8, 0.9), weight_decay=0.3)
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(vectors, lr=0.01, betas=(0.8, 0.9), weight_decay=0.3)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.8) for each in (muon, adamw)]
    for step in range(5):
        gradients_for(ours, step)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.grad = a.grad.clone()
        muon.step()
        adamw.step()
        for schedule in schedules:
            schedule.step()
    found = [p.detach() for p in ours.parameters() if p.ndim == 1]
    same(found, [p.detach() for p in vectors], 1e-14)
    assert [group["lr"] for group in muon.param_groups] == [0.01 * 0.8**5] * 2


def test_dmuon_is_moonlights_recipe():
    """The sum form, the decay everywhere, large vocabularies to AdamW."""
    tall, short, b = (nn.Parameter(torch.ones(shape)) for shape in ((10_000, 2), (9_999, 2), (3,)))
    for each in (tall, short, b):
        each.grad = torch.randn(each.shape, generator=torch.Generator().manual_seed(0))
    optimizer = DMuon([tall, short, b], lr=0.1)
    optimizer.step()
    assert [set(optimizer.state[p]) - {"step"} for p in (tall, short, b)] == [
        {"exp_avg", "exp_avg_sq"},
        {"momentum_buffer"},
        {"exp_avg", "exp_avg_sq"},
    ]
    assert torch.equal(optimizer.state[short]["momentum_buffer"], short.grad)
    np.testing.assert_allclose(b.detach(), 1 - 0.1 * 0.1 - 0.1 * b.grad.sign(), atol=1e-6)  # 1 - ηλ - η of Adam's first
    ours, theirs = small_model(), small_model()
    groups = [{"params": [tall], "use_muon": True}]  # as `muon_groups` makes them
    assert not DMuon(groups).is_orthogonalised(tall.shape, groups[0] | {"rows_below": 10_000})
    a = trained(DMuon(ours.parameters(), lr=0.01), ours, range(4))
    options = {"use_muon": "matrices", "momentum_form": "sum", "adamw_betas": (0.8, 0.999)}
    same(a, trained(Muon(theirs.parameters(), lr=0.01, **options), theirs, range(4)))


def test_groups_of_a_model():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "mlp": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
    model["head"].weight = model["embed"].weight
    names = [[name for name, _ in group["params"]] for group in muon_groups(model)]
    assert names == [["mlp.weight"], ["embed.weight"], ["mlp.bias", "head.bias"]]
    assert [group["weight_decay"] for group in muon_groups(model, weight_decay=0.2)] == [0.2, 0.2, 0.0]
    untied = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9), "mlp": nn.Linear(4, 4)})
    assert [name for name, _ in muon_groups(untied, adamw=["head"])[0]["params"]] == ["mlp.weight"]
    Muon(muon_groups(untied, adamw=["head"]), lr=0.01)
    with pytest.raises(InputError, match="adamw names 'lm_head', and the model has no such module or parameter"):
        muon_groups(untied, adamw=["lm_head"])


def test_a_parametrized_embedding_is_one_and_the_head_may_be_told_by_a_text():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Embedding(20, 8)), nn.Linear(8, 8))
    model.append(nn.Linear(8, 20))
    hidden, outer, _ = [[name for name, _ in group["params"]] for group in muon_groups(model, adamw="2")]
    assert hidden == ["1.weight"] and outer == ["0.parametrizations.weight.original", "2.weight"]


def test_a_gradient_that_is_not_finite_moves_nothing():
    good, bad = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 2))
    for value in (float("nan"), float("inf")):
        good.grad, bad.grad = torch.ones(3, 2), torch.ones(2, 2)
        bad.grad[0, 1] = value
        optimizer = Muon([("good", good), ("bad", bad)], lr=0.1)
        with pytest.raises(InputError, match="the gradient of bad is not finite: Muon took no step"):
            optimizer.step()
        assert (good == 1).all() and (bad == 1).all()
        assert not optimizer.state[good]["momentum_buffer"].any()
        assert [float(optimizer.state[each]["step"]) for each in (good, bad)] == [0, 0]
    Muon([good, bad], lr=0.1, check_finite=False).step()
    assert good.isfinite().all() and not bad.isfinite().any()


def test_a_gradient_whose_sum_alone_is_not_finite_is_taken():
    w = nn.Parameter(torch.randn(8, 8))
    w.grad, before = torch.full((8, 8), 1e37), w.detach().clone()
    Muon([w], lr=0.1).step()
    assert w.isfinite().all() and not torch.equal(w, before)


def test_a_vector_is_checked_too_and_a_refused_step_does_not_count():
    """AdamW's first step after it is as long as a first one is."""
    w, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(2))
    optimizer = Muon([("w", w), ("b", b)], lr=0.1, weight_decay=0.0, use_muon="matrices")
    w.grad, b.grad = torch.ones(2, 2), torch.tensor([1.0, float("nan")])
    with pytest.raises(InputError, match="the gradient of b is not finite: Muon took no step"):
        optimizer.step()
    b.grad = torch.ones(2)
    optimizer.step()
    np.testing.assert_allclose(b.detach(), -0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"momentum must lie in \(0, 1\), got 1.0"),
        ({"ns_steps": 0}, "ns_steps must be an integer of at least 1, got 0"),
        ({"ns_coefficients": (1.0, 2.0)}, r"ns_coefficients must be three finite numbers, got \(1.0, 2.0\)"),
        ({"ns_coefficients": 3.0}, "ns_coefficients must be three finite numbers, got 3.0"),
        ({"ns_dtype": torch.float16}, "ns_dtype must be one of .*, got torch.float16"),
        ({"scale": "original"}, r"scale must be one of \('match_rms_adamw', 'jordan', None\), got 'original'"),
        ({"momentum_form": "mean"}, r"momentum_form must be one of \('ema', 'sum'\), got 'mean'"),
        ({"use_muon": "yes"}, r"use_muon must be one of \(True, False, 'matrices'\), got 'yes'"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0, got -0.1"),
        ({"adamw_betas": (0.9, 1.0)}, r"adamw_betas must be 2 numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"rows_below": 0}, "rows_below must be an integer of at least 1, got 0"),
        ({"eps": 0.0}, "eps must be finite and > 0, got 0.0"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(InputError, match=message):
        Muon([nn.Parameter(torch.ones(2, 2))], **options)


def test_a_vector_is_sent_to_adamw():
    message = r"got bias of shape \(3,\): give it to a group with use_muon=False, or use batchlab.optim.create\('muon'"
    with pytest.raises(InputError, match=message):
        Muon([("bias", nn.Parameter(torch.ones(3)))])


def _errors(optimizer):
    return {name: each["orthogonality_error"] for name, each in optimizer.report().items() if len(each) == 3}


def _counted(folder):
    """Saves which matrices this rank makes orthogonal in two steps, and the errors that it reports."""
    from batchlab.optim import muon

    plain, shapes = muon.orthogonalised, []
    muon.orthogonalised = lambda g, how: shapes.append(tuple(g.shape)) or plain(g, how)
    model, world, rank = spread("hsdp", model_to_spread(torch.float64))
    optimizer = Muon(model.named_parameters(), lr=0.01, use_muon="matrices")
    with optimizer.watching():
        take_steps(model, optimizer.step, range(2), world, rank)
    found = {"shapes": shapes, "errors": _errors(optimizer)}
    torch.save(found, folder / f"found{torch.distributed.get_rank()}.pt")


def test_each_matrix_is_made_orthogonal_once_over_the_ranks(tmp_path):
    """Three matrices over two replicas of two shards: one call for each in a step; all ranks know the errors."""
    assert in_ranks(4, tmp_path, _counted, tmp_path) == [0] * 4
    found = [torch.load(file) for file in sorted(tmp_path.glob("found*.pt"))]
    assert sorted(shape for each in found for shape in each["shapes"]) == sorted([(8, 6), (6, 8), (9, 6)] * 2)
    assert all(len(each["shapes"]) <= 2 for each in found)
    alone = model_to_spread(torch.float64)
    optimizer = Muon(alone.named_parameters(), lr=0.01, use_muon="matrices")
    with optimizer.watching():
        take_steps(alone, optimizer.step, range(2))
    expected = _errors(optimizer)
    assert list(expected) == ["up.weight", "down.weight", "head.weight"]
    for each in found:
        assert each["errors"] == pytest.approx(expected, rel=1e-9)


def _nan_somewhere():
    model, world, rank = spread("fsdp", model_to_spread(torch.float32))
    optimizer = Muon(model.named_parameters(), lr=0.01, use_muon="matrices")
    take_steps(model, lambda: None, range(1), world, rank)
    weight = model.get_parameter("down.weight")
    if rank == 0:
        weight.grad.to_local()[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"the gradient of down.weight is not finite"):
        optimizer.step()


def test_all_ranks_refuse_what_one_of_them_sees(tmp_path):
    assert in_ranks(4, tmp_path, _nan_somewhere) == [0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("make", [partial(Muon, lr=0.01, use_muon="matrices"), partial(DMuon, lr=0.01)])
def test_the_compiled_rule_is_the_same(make):
    compiled_equals_the_loop(make)
