"""Figures of the ratio study hold the numbers that it found, with units on the axes."""

import numpy as np
import pytest

from batchlab.rules.ratio import RatioRun, lr_to_batch, sweep
from batchlab.viz import ratio

CELLS = sweep([8, 16, 32, 64], learning_rates=[0.01, 0.02, 0.04, 0.08], steps=10)


@pytest.fixture(scope="module")
def found():
    random = np.random.default_rng(0)
    runs = [
        RatioRun(c.learning_rate, c.batch_size, c.steps, seed, {"a": np.log(c.ratio) + noise, "b<i>": -noise})
        for c in CELLS
        for seed, noise in enumerate(0.2 * random.standard_normal(3))
    ]
    return lr_to_batch(runs)


def trace(figure, name):
    (each,) = (each for each in figure.data if each.name == name)
    return each


def titles(figure):
    return figure.layout.xaxis.title.text, figure.layout.yaxis.title.text


def test_the_map_has_every_cell_its_score_and_the_lines_of_equal_ratio(found):
    figure = ratio.score_map(found, "a", unit="sequences")
    assert titles(figure) == ("batch size (sequences)", "peak learning rate")
    squares = trace(figure, "a")
    assert list(zip(squares.x, squares.y, strict=True)) == [(c.batch_size, c.learning_rate) for c in found.cells]
    assert list(squares.marker.color) == [score.value for score in found.task("a").scores]
    lines = [each for each in figure.data if each.name == "equal ratio"]
    slopes = [each.y[0] / each.x[0] for each in lines]
    assert slopes == pytest.approx([1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2])
    assert [each.y[1] / each.x[1] for each in lines] == pytest.approx(slopes)
    assert [each.showlegend for each in lines] == [True] + [False] * 7
    low, high = (10**end for end in figure.layout.xaxis.range)
    assert low < 8 and high > 64 and lines[0].x == (low, high)
    best, all_tasks = found.cells[found.task("a").best], found.cells[found.compromise]
    assert (*trace(figure, "best").x, *trace(figure, "best").y) == (best.batch_size, best.learning_rate)
    assert list(trace(figure, "best for all tasks").x) == [all_tasks.batch_size]


def test_the_score_by_ratio_has_a_series_a_batch_size_and_the_means(found):
    figure = ratio.score_by_ratio(found, "a")
    assert titles(figure) == ("learning rate / batch size", "a")
    for size in (8, 16, 32, 64):
        series = trace(figure, f"batch size {size} (examples)")
        own = [(c, s) for c, s in zip(found.cells, found.task("a").scores, strict=True) if c.batch_size == size]
        assert sorted(series.x) == list(series.x) == [c.ratio for c, _ in own]
        assert list(series.y) == [score.value for _, score in own]
        assert list(series.error_y.array) == pytest.approx([score.high - score.value for _, score in own])
    means = trace(figure, "mean at equal ratio")
    assert list(means.y) == [point.score.value for point in found.task("a").by_ratio if point.cells > 1]
    assert len(means.y) == 5


def test_no_mean_where_each_ratio_has_one_cell():
    cells = sweep([8, 16, 32], learning_rates=[0.01, 0.03, 0.09], steps=10)
    runs = [RatioRun(c.learning_rate, c.batch_size, 10, s, {"a": c.product + s}) for c in cells for s in (0, 1)]
    figure = ratio.score_by_ratio(lr_to_batch(runs), "a")
    assert {each.name for each in figure.data} == {f"batch size {size} (examples)" for size in (8, 16, 32)}


def test_a_name_is_text_and_no_markup(found):
    for draw in (ratio.score_map, ratio.score_by_ratio):
        said = draw(found, "b<i>").to_json()
        assert "b&lt;i&gt;" in said and "b<i>" not in said
