import json
from itertools import chain, islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from batchlab.core.errors import InputError
from batchlab.data.mixtures.unmixed_tasks import TaskData, UnmixedTasks
from batchlab.optim.mt_adamw import MTAdamW
from batchlab.testing import samplers
from batchlab.testing.samplers import Subject
from tests.spine.forked import in_ranks

SIZES = {"class": 50, "parity": 31, "pairs": 20}
BATCHES = {"class": 8, "parity": 4, "pairs": 12}
RATIOS = {"class": 0.5, "parity": 0.3, "pairs": 0.2}


def _made(n, **given):
    return UnmixedTasks({"a": n - n // 3, "b": n // 3}, {"a": 16, "b": 12}, ratios={"a": 0.75, "b": 0.25}, **given)


SUBJECTS = {
    "draw": Subject(_made, visits="any"),
    "turn": Subject(lambda n, **given: UnmixedTasks({"a": n - 9, "b": 9}, 6, mode="turn", **given), visits="any"),
    "drop_last": Subject(
        lambda n, **given: UnmixedTasks({"a": n - 9, "b": 9}, 6, drop_last=True, **given), visits="any"
    ),
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("check", samplers.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SUBJECTS)
def test_contract(name, check):
    check(SUBJECTS[name])


def _task_of(batch):
    (task,) = {"class" if index < 50 else "parity" if index < 81 else "pairs" for index in batch}
    return task


def test_each_batch_is_of_one_task_by_its_ratio():
    tasks = UnmixedTasks(SIZES, BATCHES, ratios=RATIOS)
    drawn = [tasks.task_at(step) for step in range(10_000)]
    for step, batch in enumerate(islice(tasks, 500)):
        assert _task_of(batch) == drawn[step] and len(batch) == BATCHES[drawn[step]]
    for task, ratio in RATIOS.items():
        assert abs(drawn.count(task) / 10_000 - ratio) < 3 * (ratio * (1 - ratio) / 10_000) ** 0.5
        assert tasks.steps()[task] == drawn[:500].count(task) and tasks.steps(10_000)[task] == drawn.count(task)
        assert tasks.epochs()[task] == drawn[:500].count(task) * BATCHES[task] / SIZES[task]


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_example_comes_again_only_when_its_task_is_through(drop_last):
    seen = {task: [] for task in SIZES}
    for batch in islice(UnmixedTasks(SIZES, BATCHES, ratios=RATIOS, drop_last=drop_last), 300):
        seen[_task_of(batch)] += batch
        assert not drop_last or len(set(batch)) == len(batch)
    for task, size in SIZES.items():
        epoch = size - size % BATCHES[task] if drop_last else size
        for start in range(0, len(seen[task]) - epoch, epoch):
            assert len(set(seen[task][start : start + epoch])) == epoch


def test_turn_is_a_round_robin():
    tasks = UnmixedTasks(SIZES, 4, mode="turn")
    assert [_task_of(batch) for batch in islice(tasks, 7)] == ["class", "parity", "pairs"] * 2 + ["class"]
    assert tasks.steps() == {"class": 3, "parity": 2, "pairs": 2} and tasks.steps(0) == dict.fromkeys(SIZES, 0)
    assert tasks.ratios == pytest.approx(dict.fromkeys(SIZES, 1 / 3))


def _of_rank(folder):
    import torch.distributed as dist

    batches = islice(UnmixedTasks(SIZES, BATCHES, seed=3, ratios=RATIOS), 200)
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(list(batches)))


def test_four_ranks_draw_the_same_task(tmp_path):
    assert in_ranks(4, tmp_path, _of_rank, tmp_path) == [0] * 4
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    whole = islice(UnmixedTasks(SIZES, BATCHES, seed=3, ratios=RATIOS, rank=0, world_size=1), 200)
    for alone, shares in zip(whole, zip(*ranks, strict=True), strict=True):
        assert len({_task_of(share) for share in shares}) == 1 and list(chain(*shares)) == alone


def test_a_state_goes_on_where_it_was():
    tasks = UnmixedTasks(SIZES, BATCHES, ratios=RATIOS)
    batches = iter(tasks)
    for _ in range(77):
        next(batches)
    again = UnmixedTasks(SIZES, BATCHES, ratios=RATIOS, rank=1, world_size=2)
    again.load_state_dict(json.loads(json.dumps(tasks.state_dict())))
    for whole, share in islice(zip(batches, again, strict=True), 40):
        assert whole[len(whole) // 2 :] == share
    with pytest.raises(InputError, match="state_dict must have ratios"):
        UnmixedTasks(SIZES, BATCHES).load_state_dict(tasks.state_dict())
    for number in (np.float32, torch.tensor):  # of other libraries, in JSON too
        given = {"ratios": {"a": number(0.5), "b": number(0.5)}}
        assert json.loads(json.dumps(UnmixedTasks({"a": 9, "b": 9}, 2, **given).state_dict()))["ratios"]["a"] == 0.5


def test_micro_batches_are_of_the_task_and_add_up():
    tasks = UnmixedTasks(SIZES, BATCHES, micro_batch_sizes={"class": 3, "parity": 9, "pairs": 5})
    assert (tasks.pieces("class"), tasks.pieces("parity"), tasks.pieces("pairs")) == ([3, 3, 2], [4], [5, 5, 2])
    half = UnmixedTasks(SIZES, BATCHES, micro_batch_sizes=3, rank=1, world_size=2)
    assert half.pieces("pairs") == [3, 3] and UnmixedTasks(SIZES, 8).pieces("class") == [8]
    with pytest.raises(InputError, match="task must be one of"):
        tasks.pieces("other")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_and_the_optimizer_take_it(workers):
    """Micro-batches of the task's size give the update that the whole batch gives."""
    generator = torch.Generator().manual_seed(0)
    datasets = {task: TensorDataset(torch.randn(size, 3, generator=generator)) for task, size in SIZES.items()}
    data = TaskData(datasets)
    weights = []
    for micro in (None, 3):
        tasks = UnmixedTasks(data.sizes, BATCHES, ratios=RATIOS, micro_batch_sizes=micro)
        w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = MTAdamW([w], lr=0.1, ratios=tasks.ratios)
        loader = DataLoader(data, batch_sampler=tasks, collate_fn=data.collate, num_workers=workers)
        for step, (task, (x,)) in enumerate(islice(loader, 12)):
            assert task == tasks.task_at(step) and len(x) == BATCHES[task]
            for part in x.double().split(tasks.pieces(task)):
                loss = ((part @ w) ** 2).mean()
                (loss * len(part) / len(x)).backward()
            optimizer.step(task=task)
            optimizer.zero_grad()
        weights.append(w.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-12)


def test_task_data():
    data = TaskData({"a": [1, 2, 3], "b": ["x", "y"]}, collates={"b": "".join})
    assert data.collate(data.__getitems__([4, 3])) == ("b", "yx") and data[1] == ("a", 2)
    with pytest.raises(InputError, match=r"a batch must be of one task, got \['a', 'b'\]: take batches from UnmixedT"):
        data.__getitems__([0, 3])
    with pytest.raises(IndexError, match="index must be from 0 to 4, got 5"):
        data[5]
    with pytest.raises(InputError, match="datasets must hold one task at least"):
        TaskData({})
    with pytest.raises(InputError, match="collates must name tasks of datasets"):
        TaskData({"a": [1]}, collates={"b": list})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratios": {"class": 1.0, "parity": 1.0, "pairs": 0.0}}, "ratios['pairs'] must be finite and > 0, got 0.0"),
        ({"ratios": {"class": 1.0}}, "ratios must name the tasks ['class', 'parity', 'pairs'], got ['class']"),
        ({"ratios": RATIOS, "mode": "turn"}, 'ratios must be equal with mode "turn"'),
        ({"mode": "uniform"}, 'mode must be "draw" or "turn", got \'uniform\''),
        ({"batch_sizes": {"class": 1}}, "batch_sizes must name the tasks ['class', 'parity', 'pairs'], got ['class']"),
        ({"batch_sizes": 1, "world_size": 2, "rank": 0}, "batch_sizes must be an integer of at least 2, got 1"),
        ({"batch_sizes": 21, "drop_last": True}, "batch_sizes['pairs'] must be at most its 20 examples with drop_last"),
        ({"micro_batch_sizes": 0}, "micro_batch_sizes must be an integer of at least 1, got 0"),
        ({"sizes": {}}, "sizes must give the examples of each task"),
        ({"sizes": [50, 31]}, 'as {"caption": 9000, "retrieval": 3000}, got [50, 31]'),
        ({"ratios": [0.5, 0.5]}, "ratios must name the tasks ['class', 'parity', 'pairs'], got [0.5, 0.5]"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(InputError) as caught:
        UnmixedTasks(**({"sizes": SIZES, "batch_sizes": BATCHES} | given))
    assert message in str(caught.value)


def test_ratios_that_do_not_sum_to_one_are_divided_with_a_warning():
    with pytest.warns(UserWarning, match="ratios sum to 2, not 1"):
        tasks = UnmixedTasks({"a": 9, "b": 9}, 2, ratios={"a": 1.5, "b": 0.5})
    assert tasks.ratios == {"a": 0.75, "b": 0.25}


def test_examples_of_several_tasks_or_none_are_no_batch():
    data = TaskData({"a": [1], "b": [3]})
    mixed = [(2, 1), ("b", 3)], r"\[2, 'b'\]"
    for examples, tasks in (([data[0], data[1]], r"\['a', 'b'\]"), ([], r"\[\]"), mixed):
        with pytest.raises(InputError, match=f"a batch must be of one task, got {tasks}: take batches from Unmixed"):
            data.collate(examples)


@pytest.mark.parametrize("mode", ["turn", "draw"])
def test_steps_before_the_start_are_refused(mode):
    with pytest.raises(InputError, match="got -5"):
        UnmixedTasks({"a": 4, "b": 3}, 2, mode=mode).steps(-5)
