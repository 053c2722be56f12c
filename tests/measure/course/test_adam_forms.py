"""Every form of Adam is read by parameter or layer, resumed and over ranks, and trains as if it were not watched."""

import json
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.data.fetch import fetch
from batchlab.measure.course.adam_reading import StabilityReading
from batchlab.measure.course.adam_stability import AdamStability
from batchlab.workloads.digits import digits
from tests.measure.course.adam_runs import last, run, white
from tests.spine.forked import in_ranks


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2)])
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return F.linear(x, self.embedding.weight)


def _train(make, steps=12, model=None, **options):
    torch.manual_seed(1)
    model = model or _Net()
    optimizer = make(model.parameters())
    readings = []
    stability = AdamStability(optimizer, model=model, on_reading=readings.append, **options) if options else None
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(10, (6, 5), generator=generator)
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, readings, stability


FORMS = [
    lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=False),
    lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=True),
    lambda ps: torch.optim.Adam(ps, lr=torch.tensor(0.01), betas=(0.9, 0.95), capturable=False),
    lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True, weight_decay=0.1),
    lambda ps: torch.optim.AdamW(ps, lr=0.01, amsgrad=True),
    lambda ps: torch.optim.NAdam(ps, lr=0.01),
    lambda ps: torch.optim.RAdam(ps, lr=0.01),
    lambda ps: torch.optim.Adam(ps, lr=0.01, maximize=True),
    lambda ps: torch.optim.Adam([{"params": list(ps)[:2], "eps": 1e-6}, {"params": []}], lr=0.01, betas=(0.0, 0.9)),
]


@pytest.mark.parametrize("make", FORMS)
def test_every_form_of_adam_is_read_and_left_as_it_is(make):
    plain, _, _ = _train(make)
    watched, readings, stability = _train(make, every=3, coordinates=50)
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [reading.step for reading in readings] == [3, 6, 9, 12]
    optimizer = stability._state.optimizer
    for layer in readings[-1].layers:
        assert 0 < layer.rms <= layer.bound * (1 + 1e-6) and layer.t == 12 and layer.coordinates <= 50
        assert math.isfinite(layer.lag1) and layer.cosine > 0
    hooks = len(optimizer._optimizer_step_post_hooks)
    stability.close()
    assert len(optimizer._optimizer_step_post_hooks) == hooks - 1


def test_update_is_what_the_optimizer_adds():
    model = _Net().double()
    _, _, stability = _train(lambda ps: torch.optim.Adam(ps, lr=0.01), model=model, every=1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = stability._state.optimizer
    tokens = torch.randint(10, (6, 5), generator=torch.Generator().manual_seed(9))
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        if p.requires_grad and name != "embedding.weight":
            torch.testing.assert_close(stability.updates(name), ((old - p) / 0.01).flatten(), rtol=1e-9, atol=1e-9)


def test_layers_gather_their_parameters():
    make = lambda ps: torch.optim.Adam(ps, lr=0.01)  # noqa: E731
    _, by_parameter, _ = _train(make, every=6)
    _, by_layer, _ = _train(make, every=6, by="layer")
    assert [layer.name for layer in by_layer[-1].layers] == [
        "embedding",
        *(f"blocks.{i}.{j}" for i in range(2) for j in (0, 2)),
    ]
    weight, bias = (by_parameter[-1].layer(f"blocks.0.0.{each}") for each in ("weight", "bias"))
    whole = by_layer[-1].layer("blocks.0.0")
    assert whole.coordinates == 128 + 16 == weight.coordinates + bias.coordinates
    assert whole.rms**2 * 144 == pytest.approx(weight.rms**2 * 128 + bias.rms**2 * 16, rel=1e-6)


def test_an_optimizer_that_knows_its_names_needs_no_model():
    model = _Net()
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.01)
    stability = AdamStability(optimizer, every=1, by="layer")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [layer.name for layer in stability.reading.layers][:2] == ["embedding", "blocks.0.0"]


def test_state_goes_round_and_a_resumed_run_reads_the_same():
    make = lambda ps: torch.optim.Adam(ps, lr=0.01, betas=(0.9, 0.7))  # noqa: E731

    def go(cuts):
        torch.manual_seed(1)
        model, readings = _Net(), []
        optimizer = make(model.parameters())
        stability = AdamStability(optimizer, model=model, every=5, coordinates=40, on_reading=readings.append)
        generator = torch.Generator().manual_seed(0)
        for step in range(30):
            if step in cuts:
                state = stability.state_dict()
                plain = json.loads(json.dumps({key: value for key, value in state.items() if key != "before"}))
                stability.close()
                stability = AdamStability(optimizer, model=model, every=5, coordinates=40, on_reading=readings.append)
                stability.load_state_dict(plain | {"before": state["before"]})
            tokens = torch.randint(20, (6, 5), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
        return readings

    assert [each.to_json() for each in go({4, 9, 16})] == [each.to_json() for each in go(set())]


def test_a_state_of_other_coordinates_is_refused():
    _, _, stability = _train(FORMS[0], every=3, coordinates=50)
    _, _, other = _train(FORMS[0], every=3, coordinates=40)
    with pytest.raises(InputError, match="this state was read with .*'coordinates': 50.*, got .*'coordinates': 40"):
        other.load_state_dict(stability.state_dict())


def test_json_both_ways():
    _, readings, _ = _train(FORMS[0], every=3)
    assert StabilityReading.from_json(readings[-1].to_json()) == readings[-1]


def test_training_digits_is_the_same_in_every_bit():
    def weights(monitored):
        job = digits()
        torch.manual_seed(0)
        model = job.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        stability = AdamStability(optimizer, every=5) if monitored else None
        for step in range(20):
            batch = fetch(job.train, list(range(step * 32, step * 32 + 32)), job.collate)
            job.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        assert stability is None or stability.reading.step == 20
        return [p.detach().clone() for p in model.parameters()], torch.get_rng_state()

    (with_it, generator), (without, other) = weights(True), weights(False)
    assert all(map(torch.equal, with_it, without)) and torch.equal(generator, other)


def _halves(folder):
    """Plain tensors that each hold half of a layer, as flat shards do."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(300 if rank else 700))
    optimizer = torch.optim.Adam([p], lr=0.0)
    stability = AdamStability(optimizer, every=5, process_group=dist.group.WORLD)
    for _ in range(20):
        p.grad = torch.randn(1000, generator=generator).split([700, 300])[rank].clone()
        optimizer.step()
    (folder / f"{rank}.json").write_text(stability.reading.to_json())


def _close(ours, theirs):
    for name, value in theirs.__dict__.items():
        if isinstance(value, float):
            assert getattr(ours, name) == pytest.approx(value, rel=1e-6, nan_ok=True), name
        else:
            assert getattr(ours, name) == value, name


def test_moments_over_ranks_are_those_of_one_process(tmp_path):
    assert in_ranks(2, tmp_path, _halves, tmp_path) == [0, 0]
    expected = last(run(white(n=1000), n=1000, steps=20, every=5)[0])
    for rank in range(2):
        reading = StabilityReading.from_json((tmp_path / f"{rank}.json").read_text())
        _close(reading.layers[0], expected)


def _fully_sharded(folder):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    model = _Net().double()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    stability = AdamStability(optimizer, model=model, every=4)
    _steps(model, optimizer, dist.get_rank())
    (folder / f"{dist.get_rank()}.json").write_text(stability.reading.to_json())


def _steps(model, optimizer, rank=None):
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        tokens = torch.randint(20, (6, 5), generator=generator)
        tokens = tokens if rank is None else tokens.split(3)[rank]
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_fully_sharded_layers_are_read_as_one_process_reads_them(tmp_path):
    assert in_ranks(2, tmp_path, _fully_sharded, tmp_path) == [0, 0]
    torch.manual_seed(1)
    model = _Net().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    stability = AdamStability(optimizer, model=model, every=4)
    _steps(model, optimizer)
    for rank in range(2):
        reading = StabilityReading.from_json((tmp_path / f"{rank}.json").read_text())
        assert [layer.name for layer in reading.layers] == [layer.name for layer in stability.reading.layers]
        for ours, theirs in zip(reading.layers, stability.reading.layers, strict=True):
            _close(ours, theirs)


def test_names_and_complex_parameters():
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    with pytest.raises(InputError, match="view them as real ones"):
        AdamStability(optimizer)
    _, readings, stability = _train(FORMS[0], every=3)
    for call in (stability.updates, readings[-1].layer):
        with pytest.raises(InputError, match="name must be one of .*, got 'nothing'"):
            call("nothing")
