"""Steps that hold collectives: one rank runs out in the middle, and all agree; none waits for ever."""

import dataclasses
import json
import os
import time

import pytest
import torch
import torch._dynamo  # here and not in each of the forked ranks
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from batchlab.core.errors import BatchlabError, InputError
from batchlab.core.job import Job
from batchlab.measure.memory.compiled import compiled_graphs
from batchlab.measure.memory.lockstep import Lockstep, PeerFailed, communicates
from batchlab.measure.memory.micro_batch import find_micro_batch
from tests.measure.memory.limited import without_freeing
from tests.spine.forked import in_ranks

PLACES = ("data", "forward", "between", "backward", "step", "evaluation")


class Failing(nn.Module):
    """Runs out of memory where it is told to, on one rank and above a limit."""

    def __init__(self, place, limit, rank):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 1)
        self.place, self.limit, self.fails, self.size = place, limit, dist.get_rank() == rank, 0

    @torch.compiler.disable
    def check(self, place):
        if self.fails and self.place == place and self.size > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def forward(self, x):
        self.size = len(x)
        self.check("forward" if self.training else "evaluation")
        hidden = self.first(x).relu()
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.check("backward"))
            self.check("between")
        return self.second(hidden)


def sharded(model):
    for layer in (model.first, model.second):
        torch.distributed.fsdp.fully_shard(layer)
    return torch.distributed.fsdp.fully_shard(model)


WRAPPED = {"ddp": nn.parallel.DistributedDataParallel, "fsdp2": sharded}


def failing_job(kind, place, limit, rank):
    """A job whose `place` fails above `limit` on `rank`; the optimizer's step is made to fail by a hook of its own."""
    x = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))
    made = []

    def make():
        made[:] = [Failing(place, limit, rank)]
        return WRAPPED[kind](made[0])

    def collate(batch):
        if place == "data" and dist.get_rank() == rank and len(batch) > limit:
            raise MemoryError
        return torch.stack(batch)

    job = Job(f"{kind} {place}", make, lambda m, x: m(x).square().mean(), x, x[:256], collate=collate)
    return job, lambda *_: made[0].check("step")


class Uncounted:
    """A meter that does not know."""

    usable = 0

    def start(self):
        pass

    def peak(self):
        return None


def _search(folder, kind, cases):
    without_freeing(pytest.MonkeyPatch())
    done = []
    for place, limit, rank in cases:
        job, in_step = failing_job(kind, place, limit, rank)
        hook = register_optimizer_step_pre_hook(in_step)
        began = time.perf_counter()
        found = find_micro_batch(job, start=32, saturation=0, rel_gap=0, device="cpu", memory=Uncounted())
        seconds = time.perf_counter() - began
        hook.remove()
        phases = sorted({each.phase for each in found.tries if each.phase})
        done.append((found.size, [each.size for each in found.tries], phases, seconds))
    (folder / f"{kind}-{dist.get_rank()}").write_text(json.dumps(done))


def agreed(folder, kind, cases):
    """Holds both ranks' records against each other and against the cases; returns the seconds of the slowest."""
    assert in_ranks(2, folder, _search, folder, kind, cases, timeout=300) == [0, 0]
    ranks = [json.loads((folder / f"{kind}-{rank}").read_text()) for rank in (0, 1)]
    assert len(ranks[0]) == len(cases)
    for (place, limit, rank), *found in zip(cases, *ranks, strict=True):
        assert found[0][:2] == found[1][:2], "the ranks differ"
        assert found[0][0] == limit
        expected = "forward" if place == "between" else place
        assert (found[rank][2], found[1 - rank][2]) == ([expected], [])
    return max(case[3] for rank in ranks for case in rank)


@pytest.mark.parametrize("kind", WRAPPED)
def test_one_rank_runs_out_wherever_and_both_agree(kind, tmp_path):
    agreed(tmp_path, kind, [(place, 40, at % 2) for at, place in enumerate(PLACES)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRAPPED)
def test_fifty_of_fifty_within_ten_seconds(kind, tmp_path):
    cases = [(PLACES[at % len(PLACES)], 3 + 4 * at, at % 2) for at in range(50)]
    assert agreed(tmp_path, kind, cases) < 10


def note(folder, value):
    (folder / f"{dist.get_rank()}").write_text(json.dumps(value))


def notes(world, folder):
    return [json.loads((folder / f"{rank}").read_text()) for rank in range(world)]


class Sums:
    """A step that gathers in the middle, and runs out between two collectives on one rank."""

    def __init__(self, limit, rank, error=None):
        self.limit, self.fails = limit, dist.get_rank() == rank
        self.error, self.ran = error or torch.OutOfMemoryError("CUDA out of memory."), []

    def __call__(self, size):
        total = torch.ones(4)
        dist.all_reduce(total)
        assert total.tolist() == [dist.get_world_size()] * 4
        if self.fails and size > self.limit:
            raise self.error
        dist.all_reduce(total)
        assert total.tolist() == [dist.get_world_size() ** 2] * 4
        self.ran.append(size)


def _function(folder):
    without_freeing(pytest.MonkeyPatch())
    step = Sums(50, rank=2)
    found = find_micro_batch(step, max_size=512, rel_gap=0, collective=True)
    assert found.size in step.ran
    note(folder, [found.size, found.why, [each.size for each in found.tries]])


def test_a_function_with_collectives_on_three_ranks(tmp_path):
    assert in_ranks(3, tmp_path, _function, tmp_path) == [0, 0, 0]
    first, second, third = notes(3, tmp_path)
    assert first == second and first[0] == third[0] == 50 and first[2] == third[2]
    assert (first[1], third[1]) == ("51 does not fit (on another rank)", "51 does not fit (step)")


def _renewed(folder):
    without_freeing(pytest.MonkeyPatch())
    held, renewals = {}, []

    def renew():
        torch.manual_seed(0)
        held["model"] = nn.parallel.DistributedDataParallel(Failing("backward", 20, 1))
        renewals.append(dist.get_rank())

    def step(size):
        held["model"](torch.ones(size, 6)).mean().backward()

    renew()
    found = find_micro_batch(step, max_size=64, rel_gap=0, collective=True, renew=renew)
    failed = sum(not each.fits for each in found.tries)
    note(folder, [found.size, failed, len(renewals) - 1, found.tries[-1].fits])


def test_what_a_broken_off_step_spoils_is_renewed_on_all_ranks(tmp_path):
    assert in_ranks(2, tmp_path, _renewed, tmp_path) == [0, 0]
    (size, failed, renewals, last_fits), other = notes(2, tmp_path)
    assert size == 20 and [size, failed, renewals, last_fits] == other
    assert renewals == failed - (not last_fits), "once before each size that came after a failure"


def _fails_otherwise(folder):
    error = KeyError("broken")
    try:
        find_micro_batch(Sums(40, 1, error), max_size=64, collective=True, start=64)
    except (KeyError, BatchlabError) as caught:
        note(folder, [type(caught).__name__, str(caught), caught is error, caught.__context__ is None])


def test_another_error_in_mid_step_passes_and_lets_the_others_go(tmp_path):
    assert in_ranks(2, tmp_path, _fails_otherwise, tmp_path) == [0, 0]
    other, own = notes(2, tmp_path)
    assert own == ["KeyError", "'broken'", True, True]
    assert other[:2] == ["BatchlabError", "another rank failed in a step with 64 examples; its own error says why"]


def _unlike(folder):
    def step(size):
        (dist.all_reduce if dist.get_rank() else dist.broadcast)(torch.ones(2), *([] if dist.get_rank() else [0]))

    def longer(size):
        for _ in range(1 + dist.get_rank()):
            dist.all_reduce(torch.ones(2))

    said = []
    for each in (step, longer):
        try:
            find_micro_batch(each, max_size=64, collective=True)
        except BatchlabError as caught:
            said.append(str(caught))
    note(folder, said)


def test_collectives_that_differ_end_in_an_error_and_not_in_waiting(tmp_path):
    assert in_ranks(2, tmp_path, _unlike, tmp_path) == [0, 0]
    text = "the ranks do not issue the same collectives in the same order in this step"
    assert notes(2, tmp_path) == [[text, text]] * 2


def _too_large(folder):
    def make():
        if dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return nn.parallel.DistributedDataParallel(nn.Linear(6, 1))

    x = torch.randn(8, 6)
    try:
        find_micro_batch(Job("big", make, lambda m, x: m(x).mean(), x, x), device="cpu")
    except InputError as caught:
        note(folder, str(caught))


def test_a_model_too_large_for_one_rank(tmp_path):
    assert in_ranks(2, tmp_path, _too_large, tmp_path) == [0, 0]
    assert notes(2, tmp_path) == ["the model with its gradients and optimizer state does not fit in memory"] * 2


def _lockstep_itself(folder):
    """Results and numerics are those without it, user code cannot swallow a peer's failure, nothing stays behind."""
    lock, rank = Lockstep(), dist.get_rank()
    torch.manual_seed(rank)
    x, gradients = torch.randn(8, 6), []

    def step(model):
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        return rank

    for run in (lambda f, m: f(m), lock.run):
        torch.manual_seed(0)
        assert run(step, nn.parallel.DistributedDataParallel(Failing("never", 0, 0))) == rank
    assert all(map(torch.equal, *gradients))

    def swallowing():
        if rank == 0:
            raise MemoryError("mine")
        for _ in range(3):
            try:
                dist.all_reduce(torch.ones(1))
            except Exception:
                continue
        return "as if nothing had been"

    with pytest.raises(MemoryError if rank == 0 else PeerFailed, match="mine" if rank == 0 else "another rank failed"):
        lock.run(swallowing)
    assert lock.run(lambda: "again") == "again" and lock.most(rank, -rank) == [1, 0]
    assert torch._C._len_torch_dispatch_stack() == 0
    open_files = [len(os.listdir("/proc/self/fd"))]
    for _ in range(2):
        for _ in range(10):
            assert Lockstep().most(rank) == [1]
        dist.barrier()
        open_files.append(len(os.listdir("/proc/self/fd")))
    assert open_files[2] <= open_files[1] + 4, open_files


def test_the_lockstep_itself(tmp_path):
    assert in_ranks(2, tmp_path, _lockstep_itself, tmp_path) == [0, 0]


def _compiled(folder):
    without_freeing(pytest.MonkeyPatch())
    sizes = []
    for kind in WRAPPED:
        job, _ = failing_job(kind, "between", 20, 1)
        make = job.model
        job = dataclasses.replace(job, model=lambda make=make: torch.compile(make(), backend="aot_eager"))
        graphs = compiled_graphs()
        found = find_micro_batch(job, start=8, max_size=64, saturation=0, rel_gap=0, device="cpu", memory=Uncounted())
        assert compiled_graphs() > graphs
        sizes.append([found.size, [each.size for each in found.tries]])
    note(folder, sizes)


@pytest.mark.slow
def test_compiled_models_that_communicate(tmp_path):
    assert in_ranks(2, tmp_path, _compiled, tmp_path) == [0, 0]
    first, second = notes(2, tmp_path)
    assert first == second and [size for size, _ in first] == [20, 20]


def test_which_models_communicate():
    assert not communicates(nn.Linear(2, 2))
