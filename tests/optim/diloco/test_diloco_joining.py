"""DiLoCo's replicas come and go: another number of them, one that is killed, one that is new, one left behind."""

import copy
import multiprocessing
import os
import signal

import pytest
import torch
import torch.distributed as dist

from batchlab.optim.diloco.diloco import DiLoCo
from tests.optim.diloco.diloco_fixture import ByHand, network, weights
from tests.optim.diloco.in_rank import adamw, optimizer_of, save, saved, train
from tests.spine.forked import in_ranks


def _resume(folder, state):
    model = network()
    model.load_state_dict(state["model"])
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(state["optimizer"])
    train(model, optimizer, range(3, 9))
    save(folder, weights=weights(model))


def test_a_state_goes_into_another_number_of_replicas(tmp_path):
    """Saved by one replica after an outer step; each of three goes on with its moments."""
    model = network()
    optimizer = DiLoCo(adamw(model.parameters()), inner_steps=3, outer_lr=0.6)
    train(model, optimizer, range(3), replica=0)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    assert in_ranks(3, tmp_path, _resume, tmp_path, state) == [0] * 3
    hand = ByHand(adamw, lr=0.6)
    hand.rounds([0], 0, 3, 3)
    for number in (1, 2):
        hand.replicas[number] = copy.deepcopy(hand.replicas[0])
    hand.rounds(range(3), 3, 9, 3)
    for each in saved(tmp_path, 3):
        torch.testing.assert_close(each["weights"], hand.theta, rtol=1e-12, atol=1e-12)


def _world(folder, name, rank, size):
    dist.init_process_group("gloo", init_method=f"file://{folder / name}", rank=rank, world_size=size)
    dist.barrier()


def _survivor(folder, number):
    _world(folder, "three", number, 3)
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(7), replica=number)  # two rounds and a step
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError):
        train(model, optimizer, range(7, 9), replica=number)
    assert (optimizer.rounds, optimizer.position) == (2, 3)  # the outer step is still to be made
    dist.destroy_process_group()
    _world(folder, "two", number, 2)
    optimizer.set_process_group(dist.group.WORLD)
    assert not optimizer.join()
    optimizer.synchronize()
    after = weights(model)
    train(model, optimizer, range(9, 12), replica=number)
    dist.destroy_process_group()
    _world(folder, "four", number, 3)
    optimizer.set_process_group(dist.group.WORLD)
    assert not optimizer.join()
    train(model, optimizer, range(12, 18), replica=number)
    save(folder, after=after, weights=weights(model))


def _newcomer(folder):
    _world(folder, "four", 2, 3)
    model = network(7)
    optimizer = optimizer_of(model, process_group=None, outer_lr=0.1)
    optimizer.set_process_group(dist.group.WORLD)
    assert optimizer.join()
    assert (optimizer.rounds, optimizer.position, optimizer.steps) == (4, 0, 12)
    train(model, optimizer, range(12, 18), replica=3)
    save(folder, weights=weights(model))


def test_a_killed_replica_leaves_the_rest_consistent_and_a_new_one_joins(tmp_path):
    """SIGKILL within a round: the survivors' outer step fails, is made without it, and a fourth process takes over."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_survivor, args=(tmp_path, number)) for number in range(3)]
    children.append(context.Process(target=_newcomer, args=(tmp_path,)))
    for child in children:
        child.start()
    for child in children:
        child.join(90)
        if child.exitcode is None:
            child.kill()
    assert [child.exitcode for child in children] == [0, 0, -signal.SIGKILL, 0]
    hand = ByHand(adamw, lr=0.6)
    hand.rounds(range(3), 0, 6, 3)
    hand.rounds(range(2), 6, 9, 3)
    first, second, third = saved(tmp_path, 3)
    assert torch.equal(first["after"], second["after"])
    torch.testing.assert_close(first["after"], hand.theta, rtol=1e-12, atol=1e-12)
    hand.rounds(range(2), 9, 12, 3)
    hand.rounds([0, 1, 3], 12, 18, 3)
    for each in (first, second, third):
        assert torch.equal(each["weights"], first["weights"])
        torch.testing.assert_close(each["weights"], hand.theta, rtol=1e-12, atol=1e-12)


def _left_behind(folder):
    """Rank 1 missed an outer step that rank 0 made: the newest is the source, and within a round none is disturbed."""
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    optimizer.set_process_group(None)
    train(model, optimizer, range(3, 6 if dist.get_rank() == 1 else 5))
    if dist.get_rank() == 1:
        train(model, optimizer, range(6, 7))
    own = weights(model)
    optimizer.set_process_group(dist.group.WORLD)
    took = optimizer.join()
    assert took == (dist.get_rank() == 0) and (optimizer.rounds, optimizer.position) == (2, 1)
    assert took or torch.equal(weights(model), own)
    optimizer.synchronize()
    save(folder, weights=weights(model))


def test_a_replica_left_behind_takes_the_newest_state(tmp_path):
    assert in_ranks(2, tmp_path, _left_behind, tmp_path) == [0, 0]
    first, second = saved(tmp_path, 2)
    assert torch.equal(first["weights"], second["weights"])
