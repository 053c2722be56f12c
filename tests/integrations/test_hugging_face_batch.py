"""A batch that moves inside the real `transformers.Trainer`, against the loop by hand."""

import itertools
import os

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from batchlab.core.errors import InputError
from batchlab.integrations.hugging_face import AdaptiveBatchTrainer
from batchlab.schedule.batches.noise_scale_batch import NoiseScaleBatch
from batchlab.schedule.batches.norm_test_batch import NormTestBatch
from batchlab.schedule.rates.wsd import WSD, wsd_share
from tests.integrations.by_hand import N, Net, Numbered, Table, by_hand, numbers, sgd, stream, weights
from tests.spine.forked import in_ranks

SIZES = [8, 16, 4, 4, 32, 8, 12, 12]


def _arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(**(settings | changes))


def _schedule(optimizer):
    return WSD(optimizer, batch=8, total=400, decay=200)


def _trainer(folder, controller, net=None, kind=AdaptiveBatchTrainer, arguments=None, **options):
    net = Net() if net is None else net
    settings = {"examples": sum(SIZES), "schedule": _schedule, "lr_rule": "sqrt"} | options
    settings.setdefault("train_dataset", Numbered())
    optimizer = sgd(net)
    arguments = _arguments(folder, **(arguments or {}))
    return kind(net, arguments, controller=controller, optimizers=(optimizer, None), **settings)


def _rates(sizes, factor=lambda size: (size / 8) ** 0.5):
    starts = [0, *itertools.accumulate(sizes)][:-1]
    return [0.1 * factor(size) * wsd_share(seen, total=400, decay=200) for seen, size in zip(starts, sizes)]


def _logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if "loss" in line and name in line]


@pytest.mark.parametrize("workers", [0, 1])
def test_it_is_the_loop_by_hand_at_the_sizes_that_came(tmp_path, workers):
    trainer = _trainer(tmp_path, Table(SIZES), noise={}, arguments={"dataloader_num_workers": workers})
    trainer.train()
    sizes = _logged(trainer, "batch_size")
    assert sizes == (SIZES if workers == 0 else [8, *SIZES])[: len(sizes)]  # a worker fetches 2 micro-batches ahead
    assert sum(sizes[:-1]) < sum(SIZES) <= sum(sizes) == trainer.adaptive.seen
    assert numbers(trainer.model.met) == stream(sum(sizes))
    assert _logged(trainer, "examples") == list(itertools.accumulate(sizes))
    assert _logged(trainer, "epoch") == [seen / N for seen in itertools.accumulate(sizes)]
    assert _logged(trainer, "learning_rate") == pytest.approx(_rates(sizes), rel=1e-12)
    expected, noise = by_hand(sizes, _rates(sizes))
    torch.testing.assert_close(weights(trainer.model), expected, rtol=1e-10, atol=1e-10)
    assert _logged(trainer, "noise_scale")[-1] == pytest.approx(noise.value, rel=1e-8)
    assert trainer.state.global_step == trainer.state.max_steps == len(sizes)
    assert not any(p._backward_hooks for p in trainer.model.parameters())


def test_clipping_comes_after_measuring(tmp_path):
    trainer = _trainer(tmp_path, Table([8]), noise={}, examples=80, lr_rule=None, arguments={"max_grad_norm": 1e-9})
    trainer.train()
    _, still = by_hand([8] * 10, [0.0] * 10)
    assert _logged(trainer, "noise_scale")[-1] == pytest.approx(still.value, rel=1e-4)


def _noisy():
    return NoiseScaleBatch(8, exchange_rate=8.0, maximum=64, multiple_of=4, patience=2, deadband=1.0)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """With dropout, across changes of the size, and to the last bit."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_grad_norm": 1.0}
    whole = _trainer(tmp_path / "whole", _noisy(), Net(dropout=0.3), arguments=saving)
    whole.train()
    sizes = _logged(whole, "batch_size")
    assert len(set(sizes)) > 1
    for at in (3, len(sizes) - 1):
        resumed = _trainer(tmp_path / "again", _noisy(), Net(dropout=0.3), arguments=saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
        assert _logged(resumed, "batch_size") == sizes
        assert numbers(resumed.model.met) == numbers(whole.model.met)[sum(sizes[:at]) :]
        assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(resumed.model), strict=True))
        assert resumed.adaptive.state_dict() == whole.adaptive.state_dict()
    done = _trainer(tmp_path / "done", _noisy(), Net(dropout=0.3), arguments=saving)
    done.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{len(sizes)}"))
    assert done.state.global_step == len(sizes) and not done.model.met


def test_a_second_run_begins_anew(tmp_path):
    trainer = _trainer(tmp_path, Table([8, 16]), examples=40)
    for _ in range(2):
        trainer.train()
        assert trainer.last_update.step == 3 and trainer.last_update.batch_size == 16
        assert _logged(trainer, "batch_size") == [8, 16, 16]
        assert _logged(trainer, "learning_rate") == pytest.approx(_rates([8, 16, 16]))
    assert numbers(trainer.model.met) == stream(40) * 2


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    net = Net()
    Trainer(net, _arguments(tmp_path, **saving), train_dataset=Numbered(), optimizers=(sgd(net), None)).train()
    with pytest.raises(InputError, match="holds no state of an adaptive batch"):
        _trainer(tmp_path, Table([8])).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_run_ends_by_epochs_or_by_steps(tmp_path):
    trainer = _trainer(tmp_path, Table([8, 40]), examples=None, arguments={"num_train_epochs": 1.5})
    trainer.train()
    assert trainer.adaptive.seen == 168 and trainer.state.epoch == 1.68
    trainer = _trainer(tmp_path, Table([8, 40]), arguments={"max_steps": 2})
    trainer.train()
    assert trainer.adaptive.seen == 48
    trainer = _trainer(tmp_path, Table([8, 40]), examples=None, arguments={"max_steps": 10})
    done = trainer.train()
    assert trainer.adaptive.seen == 368 > 3 * N
    speed = done.metrics["train_samples_per_second"] * done.metrics["train_runtime"]
    assert speed == pytest.approx(368, rel=1e-2)


def test_the_end_is_saved_and_evaluated_as_any_end(tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    steps["label_names"] = ["y"]
    trainer = _trainer(tmp_path, Table([8]), examples=40, eval_dataset=Numbered(12), arguments=steps)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == [3, 5]


def test_the_norm_test_moves_the_batch(tmp_path):
    """It asks for what the four micro-batches' gradients say, and the training is not disturbed."""
    trainer = _trainer(tmp_path, NormTestBatch(8, maximum=64, multiple_of=4, eta=0.5), lr_rule=None, examples=120)
    trainer.train()
    sizes = _logged(trainer, "batch_size")
    data, net, batch = Numbered(), Net(), torch.tensor(stream(8))
    rows = []
    for piece in batch.chunk(4):
        gradients = torch.autograd.grad(net(data.x[piece], data.y[piece], piece)["loss"], list(net.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    stack = torch.stack(rows)
    asked = 2 * stack.var(0).sum() / (0.25 * stack.mean(0).square().sum())
    assert sizes[1] == max(8, min(64, int(asked.ceil()) // 4 * 4)) > 8
    expected, _ = by_hand(sizes, _rates(sizes, lambda size: 1.0))
    torch.testing.assert_close(weights(trainer.model), expected, rtol=1e-10, atol=1e-10)


class _Tokens(nn.Module):
    """Takes `num_items_in_batch`, as language models do: the loss is the mean over the update's labels."""

    accepts_loss_kwargs = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(5, 3).double()

    def forward(self, x, labels, num_items_in_batch=None):
        total = nn.functional.cross_entropy(self.line(x), labels, ignore_index=-100, reduction="sum")
        return {"loss": total / (num_items_in_batch if num_items_in_batch is not None else labels.ne(-100).sum())}


def test_a_loss_by_tokens_is_the_mean_over_the_update(tmp_path):
    data = [{"x": row, "labels": torch.tensor(i % 4 if i % 4 < 3 else -100)} for i, row in enumerate(Numbered().x)]
    trainer = _trainer(tmp_path, Table([8, 16]), _Tokens(), train_dataset=data, examples=40, lr_rule=None)
    trainer.train()
    net, at = _Tokens(), 0
    optimizer = sgd(net)
    for size in (8, 16, 16):
        rows, at = [data[i] for i in stream(40)[at : at + size]], at + size
        net(torch.stack([row["x"] for row in rows]), torch.stack([row["labels"] for row in rows]))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(trainer.model), weights(net), rtol=1e-10, atol=1e-10)


class _Own(Trainer):
    """Another library's `Trainer`, with a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, **named):
        return 2 * super().compute_loss(model, inputs, return_outputs, **named)


class _Both(AdaptiveBatchTrainer, _Own):
    pass


def test_it_goes_before_another_trainer(tmp_path):
    both = _trainer(tmp_path, Table([8]), kind=_Both, examples=24, lr_rule=None)
    both.train()
    expected, _ = by_hand([8] * 3, [0.2] * 3)  # as twice the rate, for plain SGD with momentum
    torch.testing.assert_close(weights(both.model), expected, rtol=1e-10, atol=1e-10)


class _Endless(IterableDataset):
    def __iter__(self):
        yield from itertools.count()


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ({"max_steps": 1}, {"train_dataset": _Endless(), "examples": 8}, "map-style dataset with a length"),
        ({}, {"train_dataset": _Endless(), "examples": 8}, "map-style dataset with a length"),
        ({"train_sampling_strategy": "group_by_length"}, {}, "must be \"random\", got 'group_by_length'"),
        ({}, {"schedule": None, "lr_rule": None}, 'lr_scheduler_type must be "constant" without schedule'),
        ({"logging_strategy": "epoch"}, {}, 'strategy of logging must be "steps"'),
        ({"auto_find_batch_size": True}, {}, "auto_find_batch_size must be False"),
        ({"per_device_train_batch_size": 4}, {}, "start at per_device_train_batch_size 4 x .* 4 x processes 1, got 8"),
        ({}, {"examples": 0}, "examples must be"),
    ],
)
def test_bad_set_ups(tmp_path, arguments, options, message):
    with pytest.raises(InputError, match=message):
        _trainer(tmp_path, Table([8]), arguments=arguments, **options)


def test_more_bad_set_ups(tmp_path):
    with pytest.raises(InputError, match="args must be TrainingArguments, got NoneType"):
        AdaptiveBatchTrainer(Net(), controller=Table([8]))
    with pytest.raises(InputError, match="controller must be a BatchController, got int"):
        AdaptiveBatchTrainer(Net(), _arguments(tmp_path), controller=8)
    with pytest.raises(InputError, match="fp16 scales the loss"):
        arguments = _arguments(tmp_path)
        arguments.fp16 = True
        AdaptiveBatchTrainer(Net(), arguments, controller=_noisy(), train_dataset=Numbered(), schedule=_schedule)
    net = Net()
    optimizers = (sgd(net), torch.optim.lr_scheduler.ConstantLR(sgd(net)))
    with pytest.raises(InputError, match="optimizers must hold no scheduler: give schedule"):
        AdaptiveBatchTrainer(
            net, _arguments(tmp_path), controller=Table([8]), train_dataset=Numbered(), optimizers=optimizers
        )
    with pytest.raises(InputError, match="schedule must make a Counted, got ConstantLR"):
        _trainer(tmp_path, Table([8]), schedule=torch.optim.lr_scheduler.ConstantLR).train()
    with pytest.raises(InputError, match="max_micro_batch 3 x ranks 1 = 12, got 32"):
        _trainer(tmp_path, Table([8, 32]), max_micro_batch=3).train()
    with pytest.raises(InputError, match="the 2 that the sampler|the 8 that the sampler gave rank 0"):
        _trainer(tmp_path, Table([8]), count=lambda batch: 1).train()
    with pytest.raises(InputError, match="compares micro-batches, of which an update must have 2 at least, got 1"):
        alone = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        _trainer(tmp_path, NormTestBatch(8, maximum=16), arguments=alone).train()
    with pytest.raises(InputError, match="noise must be None with a NormTestBatch"):
        _trainer(tmp_path, NormTestBatch(8, maximum=16, multiple_of=4), noise={}).train()


def _rank(folder):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    rank = torch.distributed.get_rank()
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    os.environ.update({"ACCELERATE_USE_CPU": "true"} | {name: str(value) for name, value in here.items()})
    arguments = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 3, "max_grad_norm": 1e9}
    sizes = [8, 16, 8, 32, 8]
    trainer = _trainer(folder, Table(sizes, multiple_of=8), noise={}, examples=80, arguments=arguments)
    assert trainer.args.world_size == 2
    trainer.train()
    met = numbers(trainer.model.met)
    torch.save({"met": met, "weights": weights(trainer.model), "log": trainer.state.log_history}, folder / f"{rank}.pt")
    again = _trainer(folder, Table(sizes, multiple_of=8), noise={}, examples=80, arguments=arguments)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(weights(again.model), weights(trainer.model), strict=True))


def test_two_processes_are_one(tmp_path):
    assert in_ranks(2, tmp_path, _rank, tmp_path) == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    sizes = [line["batch_size"] for line in ranks[0]["log"] if "batch_size" in line]
    assert sizes == [8, 16, 8, 32, 8, 8]
    at, order, shares = 0, stream(80), ([], [])
    for size in sizes:
        shares[0].extend(order[at : at + size // 2])
        shares[1].extend(order[at + size // 2 : at + size])
        at += size
    expected, noise = by_hand(sizes, _rates(sizes), pieces=8)
    for rank, share in zip(ranks, shares):
        assert rank["met"] == share
        torch.testing.assert_close(rank["weights"], expected, rtol=1e-10, atol=1e-10)
    assert ranks[0]["log"][5]["noise_scale"] == pytest.approx(noise.value, rel=1e-8)
