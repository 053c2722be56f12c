"""Running a function in a child, which may be killed; forked, torch is imported already, so that it is quick."""

import multiprocessing

import torch


def in_child(function, *arguments, timeout=60, method="fork"):
    """Runs `function(*arguments)` in a child; returns its exit code, negative for the signal that killed it.

    method: "spawn" for what is told by the memory of a process: a fork has what its parent freed and did not return.
    """
    torch.set_num_threads(1)
    child = multiprocessing.get_context(method).Process(target=function, args=arguments)
    child.start()
    child.join(timeout)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def _join(rank, world, store, function, arguments):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    dist.barrier()  # a rank that leaves before another has heard of its connection leaves it hanging
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def in_ranks(world, folder, function, *arguments, timeout=90):
    """Runs `function(*arguments)` in `world` forked gloo ranks; returns their exit codes."""
    torch.set_num_threads(1)
    store = folder / f"store-{len(list(folder.glob('store-*')))}"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_join, args=(rank, world, store, function, arguments)) for rank in range(world)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout)
    hanging = [child for child in children if child.exitcode is None]
    for child in hanging:
        child.kill()
    assert not hanging, "a rank hangs"
    return [child.exitcode for child in children]
