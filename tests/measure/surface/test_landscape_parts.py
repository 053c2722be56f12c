"""A landscape that is filled in parts: it goes on where it ended, and ranks share its points."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from batchlab.core.errors import InputError
from batchlab.measure.surface.landscape import Landscape, landscape
from tests.measure.surface.small import Quadratic, quadratic, quadratic_data, quadratic_loss
from tests.spine.forked import in_ranks


def test_a_partly_filled_landscape_goes_on_where_it_ended():
    _, data = quadratic_data()
    model, calls = quadratic(), []

    def loss(model, batch):
        calls.append(1)
        return quadratic_loss(model, batch)

    whole = landscape(model, loss, data, dimensions=2, points=5)
    passes, held = len(calls), []

    def stop(so_far):
        held.append(so_far)
        if len(held) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        landscape(model, loss, data, dimensions=2, points=5, progress=stop)
    assert [each.unfilled for each in held] == list(range(24, 14, -1))
    part = Landscape.from_json(held[-1].to_json())
    assert part.unfilled == 15
    calls.clear()
    assert landscape(model, loss, data, dimensions=2, points=5, resume=part) == whole
    assert len(calls) == passes - 10 * 4
    for name, change in (
        ("seed", {"seed": 1}),
        ("norm", {"norm": "layer"}),
        ("x", {"span": 2.0}),
        ("x", {"points": 7}),
    ):
        with pytest.raises(InputError, match=f"resume must have the same {name}: "):
            landscape(model, loss, data, **({"dimensions": 2, "points": 5, "resume": part} | change))
    with pytest.raises(InputError, match="resume must be of the same weights, data and directions"):
        landscape(quadratic(seed=2), loss, data, dimensions=2, points=5, resume=part)
    with pytest.raises(InputError, match="resume must be a Landscape, got dict"):
        landscape(model, loss, data, dimensions=2, points=5, resume={})


def _in_a_rank(folder, dimensions):
    model, (_, data), calls = quadratic(), quadratic_data(), []
    part = None
    if dimensions == 2:  # each rank has another part of it already
        part = Landscape.from_json((folder / f"part-{dist.get_rank()}").read_text())

    def loss(model, batch):
        calls.append(1)
        return quadratic_loss(model, batch)

    group = dist.group.WORLD
    settings = {"dimensions": dimensions, "points": 5, "resume": part, "process_group": group}
    found = landscape(model, loss, data, **settings)
    (folder / f"{dist.get_rank()}").write_text(found.to_json())
    (folder / f"calls-{dist.get_rank()}").write_text(str(len(calls)))
    different = Quadratic(torch.full((3, 4), 1.0 + dist.get_rank(), dtype=torch.float64))
    with pytest.raises(InputError, match="all ranks must hold the same weights and data: they differ"):
        landscape(different, loss, data, process_group=group)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_two_ranks_share_the_points_and_get_what_one_process_gets(tmp_path, dimensions):
    _, data = quadratic_data()
    whole = landscape(quadratic(), quadratic_loss, data, dimensions=dimensions, points=5)
    if dimensions == 2:
        for rank in range(2):
            rows = [[x if (i == rank and j < 3) else math.nan for j, x in enumerate(row)]
                    for i, row in enumerate(whole.losses)]  # fmt: skip
            (tmp_path / f"part-{rank}").write_text(replace(whole, losses=tuple(map(tuple, rows))).to_json())
    assert in_ranks(2, tmp_path, _in_a_rank, tmp_path, dimensions) == [0, 0]
    calls = []
    for rank in range(2):
        assert Landscape.from_json((tmp_path / f"{rank}").read_text()) == whole
        calls.append(int((tmp_path / f"calls-{rank}").read_text()))
    points = 10 * 5 - 10 if dimensions == 1 else 25 - 6 - 1  # without the centres, which no pass is made for
    assert sum(calls) == 4 * (points + 2) and max(calls) - min(calls) <= 4 * 10
