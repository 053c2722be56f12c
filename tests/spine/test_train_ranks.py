"""Training on two real gloo processes."""

import dataclasses
import os
import signal

import pytest
import torch
import torch.distributed as dist

from batchlab.core.errors import BatchlabError, Interrupted, StorageError
from batchlab.core.run import Run
from batchlab.spine.learner import Learner
from batchlab.spine.train import train
from tests.spine.forked import in_ranks
from tests.spine.hard_run import lines, same, state
from tests.spine.jobs import squared_error, toy_job, toy_plan


def _weights(learner):
    return torch.cat([p.detach().flatten() for p in learner.model.parameters()])


def _train_and_save_weights(folder, plan, steps):
    learner = Learner(toy_job(), plan, device="cpu")
    for _ in range(steps):
        update = learner.update()
    torch.save(
        {"weights": _weights(learner), "loss": update.loss, "evaluation": learner.evaluate()},
        folder / f"{dist.get_rank()}.pt",
    )


@pytest.mark.parametrize(("batch", "micro"), [(64, 16), (64, 64), (65, 16), (3, 2)])
def test_two_ranks_take_the_steps_of_one(tmp_path, batch, micro):
    plan = toy_plan(batch, micro)
    assert in_ranks(2, tmp_path, _train_and_save_weights, tmp_path, plan, 20) == [0, 0]
    single = Learner(toy_job(), plan, device="cpu")
    for _ in range(20):
        update = single.update()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["weights"], _weights(single), rtol=0, atol=1e-10)
        assert found["loss"] == pytest.approx(update.loss, rel=1e-12)
        assert found["evaluation"] == pytest.approx(single.evaluate(), rel=1e-12)


def _nan_on_one_rank(folder):
    calls = []

    def loss(module, batch):
        calls.append(None)
        bad = dist.get_rank() == 1 and len(calls) == 6
        return squared_error(module, batch) * (float("nan") if bad else 1.0)

    learner = Learner(toy_job(loss=loss), toy_plan(ema_half_life=100.0), device="cpu")
    skipped = []
    for _ in range(6):
        before = _weights(learner).clone()
        update = learner.update()
        skipped.append(update.skipped)
        assert torch.equal(before, _weights(learner)) == update.skipped
    torch.save({"weights": _weights(learner), "skipped": torch.tensor(skipped)}, folder / f"{dist.get_rank()}.pt")


def test_nan_on_one_rank_is_skipped_on_both(tmp_path):
    assert in_ranks(2, tmp_path, _nan_on_one_rank, tmp_path) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["skipped"].tolist() == [False, False, True, False, False, False]
    assert torch.equal(first["skipped"], second["skipped"]) and torch.equal(first["weights"], second["weights"])


def _train(folder, plan, resume=False):
    train(toy_job(), plan, out=folder / "r", resume=resume, device="cpu")


def test_resuming_on_another_number_of_ranks_goes_on_with_the_same_batches(tmp_path):
    plan = toy_plan(steps=12)
    whole = train(toy_job(), plan, out=tmp_path / "whole", device="cpu")
    _train(tmp_path, dataclasses.replace(plan, steps=4))
    assert in_ranks(2, tmp_path, _train, tmp_path, dataclasses.replace(plan, steps=8), True) == [0, 0]
    _train(tmp_path, plan, resume=True)
    for a, b in zip(lines(whole.path), lines(tmp_path / "r"), strict=True):
        assert (a["step"], a["position"], a["batch_size"], a["lr"]) == (
            b["step"],
            b["position"],
            b["batch_size"],
            b["lr"],
        )
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-11)


def test_two_ranks_resume_bit_identically(tmp_path):
    plan = toy_plan(steps=8, ema_half_life=200.0, evaluate_every=4)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    assert in_ranks(2, tmp_path, _train, tmp_path / "whole", plan) == [0, 0]
    assert in_ranks(2, tmp_path, _train, tmp_path / "parts", dataclasses.replace(plan, steps=4)) == [0, 0]
    assert in_ranks(2, tmp_path, _train, tmp_path / "parts", plan, True) == [0, 0]
    assert lines(tmp_path / "whole" / "r") == lines(tmp_path / "parts" / "r")
    assert same(state(tmp_path / "whole" / "r")["learner"], state(tmp_path / "parts" / "r")["learner"])


def _signalled(folder):
    def ask(line):
        if line["step"] == 5 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM after step 5"):
        train(toy_job(), toy_plan(), out=folder / "r", callbacks=[ask], device="cpu")


def test_a_signal_to_one_rank_stops_both_at_the_same_step(tmp_path):
    assert in_ranks(2, tmp_path, _signalled, tmp_path) == [0, 0]
    assert state(tmp_path / "r")["learner"]["step"] == 5
    assert Run.open(tmp_path / "r").summary["status"] == "interrupted"


def _full_disk(folder):
    if dist.get_rank() == 0:
        import batchlab.core.jsonl as jsonl

        write = os.write

        def full(descriptor, data):
            if b'"step": 3,' in bytes(data):
                raise OSError(28, "No space left on device")
            return write(descriptor, data)

        jsonl.os.write = full
    with pytest.raises(StorageError if dist.get_rank() == 0 else BatchlabError):
        train(toy_job(), toy_plan(), out=folder / "r", device="cpu")


def test_a_full_disk_on_the_writing_rank_ends_both(tmp_path):
    assert in_ranks(2, tmp_path, _full_disk, tmp_path) == [0, 0]
    assert [line["step"] for line in Run.open(tmp_path / "r").steps()] == [1, 2]


def _locked(folder):
    with pytest.raises(BatchlabError):
        train(toy_job(), toy_plan(), out=folder / "r", device="cpu")


def test_a_folder_that_cannot_be_opened_stops_both(tmp_path):
    train(toy_job(), toy_plan(steps=2), out=tmp_path / "r", device="cpu")
    assert in_ranks(2, tmp_path, _locked, tmp_path) == [0, 0]
