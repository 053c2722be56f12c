"""The law of memory: the authors' numbers, recovery under noise, its intervals, and what the points leave open."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.planner.fine_tune.measured_batch import MeasuredBatch
from batchlab.planner.fine_tune.memory_model import BatchMemoryModel

CODE = BatchMemoryModel.of(c0_per_gb=62, sparse_share=0.89, model_bytes=23.35e9)
PAPER = BatchMemoryModel.of(c0_per_gb=82, sparse_share=0.95, model_bytes=23.35e9)


def unfloored(model, gpu_gb, length, sparsity=0.25):
    return (gpu_gb * 1e9 - model.model_bytes.value) / model.query_bytes(length, sparsity)


def test_the_largest_batch_is_the_closed_form():
    """The code's constants: 6, 8, 20 at 40, 48, 80 GB; 62·56.65/(512·0.3325) = 20.63 before flooring."""
    assert [CODE.max_batch(gpu * 1e9, 512, 0.25) for gpu in (40, 48, 80)] == [6, 8, 20]
    assert [round(unfloored(CODE, gpu, 512), 2) for gpu in (40, 48, 80)] == [6.06, 8.98, 20.63]
    assert [round(unfloored(CODE, gpu, 512), 1) for gpu in (100, 120)] == [27.9, 35.2]
    assert CODE.c0_per_gb == pytest.approx(62)


def test_the_papers_constants_need_longer_queries():
    """82 and 0.95 with the code's model draw the same line at L = 768: 6.2, 9.2, 21.0, 28.5, 35.9."""
    drawn = [round(unfloored(PAPER, gpu, 768), 1) for gpu in (40, 48, 80, 100, 120)]
    assert drawn == [6.2, 9.2, 21.0, 28.5, 35.9]


def limits(seed, noise=0.02):
    """3 cards × 3 lengths × 2 sparsities with noise on the batch that fits, not floored."""
    rng = np.random.default_rng(seed)
    return [
        MeasuredBatch(unfloored(PAPER, gpu, length, s) * math.exp(noise * rng.normal()), None, gpu * 1e9, length, s)
        for gpu in (40, 48, 80)
        for length in (128, 512, 1024)
        for s in (0.25, 1.0)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_limits_recover_the_constants(seed):
    """2 % noise: within 5 %, C1 within 0.02; the sheet measured 2.2 %, 2.1 % and 0.01 over five seeds."""
    fit = BatchMemoryModel.fit_limits(limits(seed))
    assert fit.c0_per_gb == pytest.approx(82, rel=0.05) and fit.model_bytes.value == pytest.approx(23.35e9, rel=0.05)
    assert fit.sparse_share.value == pytest.approx(0.95, abs=0.02)
    exact = BatchMemoryModel.fit_limits(limits(seed, noise=0.0))
    assert (exact.c0_per_gb, exact.model_bytes.value / 1e9, exact.sparse_share.value) == pytest.approx(
        (82, 23.35, 0.95)
    )


def test_limits_intervals_cover_at_their_rate():
    """400 seeds, 2 % noise, 15 degrees of freedom: within 4 standard errors (4.4 %) of 95 %."""
    held = np.zeros(3)
    for seed in range(400):
        fit = BatchMemoryModel.fit_limits(limits(1000 + seed))
        truth = ((fit.bytes_per_token, 1e9 / 82), (fit.sparse_share, 0.95), (fit.model_bytes, 23.35e9))
        held += [estimate.low <= value <= estimate.high for estimate, value in truth]
    assert (abs(held / 400 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 400)).all(), held


def peaks(seed, deviation=2e8):
    rng = np.random.default_rng(seed)
    return [
        MeasuredBatch(b, 1.0, CODE.bytes(b, length, s) + deviation * rng.normal(), length, s)
        for b in (1, 2, 4, 8)
        for length in (128, 512)
        for s in (0.25, 1.0)
    ]


def test_intervals_of_peaks_cover_at_their_rate():
    """1000 seeds, errors of one size in bytes: all three within 4 standard errors of 95 %."""
    held = np.zeros(3)
    for seed in range(1000):
        fit = BatchMemoryModel.fit(peaks(seed))
        truth = ((fit.bytes_per_token, 1e9 / 62), (fit.sparse_share, 0.89), (fit.model_bytes, 23.35e9))
        held += [estimate.low <= value <= estimate.high for estimate, value in truth]
    assert (abs(held / 1000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1000)).all(), held


def test_exact_peaks_give_the_constants_back():
    fit = BatchMemoryModel.fit(peaks(0, deviation=0.0))
    found = (fit.c0_per_gb, fit.sparse_share.value, fit.model_bytes.value / 1e9)
    assert found == pytest.approx((62, 0.89, 23.35), rel=1e-9)
    assert max(map(abs, fit.residuals)) < 1e-12 and fit.largest_batch == 8
    assert BatchMemoryModel.from_json(fit.to_json()) == fit


def test_what_is_known_need_not_be_fitted():
    """M_model alone, C1 alone, both; a dense model has no C1, and predicts at any length."""
    points = peaks(0, deviation=0.0)
    one = [p for p in points if (p.batch, p.sequence_length) == (8, 512)]
    fit = BatchMemoryModel.fit(one, model_bytes=23.35e9)
    assert (fit.c0_per_gb, fit.sparse_share.value) == pytest.approx((62, 0.89))
    sparse = [p for p in points if p.sparsity == 0.25]
    shared = BatchMemoryModel.fit(sparse, sparse_share=0.89)
    assert (shared.c0_per_gb, shared.model_bytes.value) == pytest.approx((62, 23.35e9))
    assert shared.sparse_share.method == "given"
    single = BatchMemoryModel.fit(sparse[:1], sparse_share=0.89, model_bytes=23.35e9)
    assert single.c0_per_gb == pytest.approx(62) and single.bytes_per_token.high == math.inf
    dense = BatchMemoryModel.fit([(1, 1.0, 3e9, 100), (2, 1.0, 4e9, 100), (4, 1.0, 6e9, 100)])
    assert dense.bytes(3, 200) == pytest.approx(2e9 + 600 * 1e7) and dense.sparse_share.value == 0.0


constants = {"c0": st.floats(1, 1e4), "share": st.floats(0, 1), "model": st.floats(0, 100)}


@given(
    **constants,
    gpu=st.floats(1, 200),
    more=st.floats(1, 3),
    length=st.integers(1, 4096),
    longer=st.integers(1, 4096),
    sparsity=st.floats(0.01, 1),
    sparser=st.floats(0.01, 1),
    reserve=st.floats(0, 0.9),
)
def test_more_room_shorter_and_sparser_never_fit_less(
    c0, share, model, gpu, more, length, longer, sparsity, sparser, reserve
):
    law = BatchMemoryModel.of(c0_per_gb=c0, sparse_share=share, model_bytes=model * 1e9)
    most = law.max_batch(gpu * 1e9, length, sparsity, reserve=reserve)
    assert law.max_batch(gpu * more * 1e9, length, sparsity, reserve=reserve) >= most
    assert law.max_batch(gpu * 1e9, length + longer, sparsity, reserve=reserve) <= most
    assert law.max_batch(gpu * 1e9, length, sparsity * sparser, reserve=reserve) >= most
    assert law.max_batch(gpu * 1e9, length, sparsity) >= most


@given(**constants, gpu=st.floats(1, 200), length=st.integers(1, 4096), sparsity=st.floats(0.01, 1))
def test_the_largest_batch_fits_and_one_more_does_not(c0, share, model, gpu, length, sparsity):
    law = BatchMemoryModel.of(c0_per_gb=c0, sparse_share=share, model_bytes=model * 1e9)
    most = law.max_batch(gpu * 1e9, length, sparsity)
    assert law.bytes(most + 1, length, sparsity) > gpu * 1e9
    assert law.missing_bytes(gpu * 1e9, length, sparsity, batch=most + 1) > 0
    if most:
        assert (
            law.bytes(most, length, sparsity) <= gpu * 1e9
            and law.missing_bytes(gpu * 1e9, length, sparsity, batch=most) == 0
        )


def test_whole_numbers_are_not_floored_away():
    """0.1 + 0.2 of bytes: 3 queries of 0.1 in 0.3 fit by the same arithmetic that says what they take."""
    law = BatchMemoryModel.of(c0_per_gb=1e9 / 0.1, sparse_share=0.0, model_bytes=0.0)
    for count in range(1, 200):
        assert law.max_batch(law.bytes(count, 1), 1) == count


def test_the_length_is_the_points_own_or_must_be_given():
    """Peaks at one length: that one. At two, or with constants alone, nothing says it."""
    rows = [(b, 1.0, 20e9 + b * 512e6, 512) for b in (1, 2, 4)]
    fit = BatchMemoryModel.fit(rows)
    assert fit.length() == 512 and fit.max_batch(40e9) == fit.max_batch(40e9, 512) == 39
    assert fit.bytes(4) == pytest.approx(20e9 + 4 * 512e6) and fit.missing_bytes(20e9) == pytest.approx(512e6)
    two = BatchMemoryModel.fit([*rows, (1, 1.0, 20e9 + 128e6, 128)])
    with pytest.raises(InputError, match=r"sequence_length must be given, .*: the points have \[128.0, 512.0\]"):
        two.max_batch(40e9)
    with pytest.raises(InputError, match=r"sequence_length must be given, .*: no points say it"):
        CODE.max_batch(48e9)
    assert BatchMemoryModel.fit_limits([(10, 1.0, 30e9, 64), (20, 1.0, 40e9, 64)]).sequence_lengths == (64.0,)


def test_the_unit_of_a_gb_is_one_for_all():
    """6, 8, 20 in GB of either kind; C0 per 1e9 with a card's GiB gives 10 for 8."""
    cards = BatchMemoryModel.of(c0_per_gb=62, sparse_share=0.89, model_bytes=23.35 * 2**30, gb=2**30)
    assert [cards.max_batch(gpu * 2**30, 512, 0.25) for gpu in (40, 48, 80)] == [6, 8, 20]
    assert cards.c0_per_gb == pytest.approx(62) and CODE.max_batch(48 * 2**30, 512, 0.25) == 10
    assert BatchMemoryModel.from_json(cards.to_json()) == cards
    with pytest.raises(InputError, match=r"gb must be 1e9 or 2\*\*30 bytes, got 1024"):
        BatchMemoryModel.of(c0_per_gb=62, sparse_share=0.89, model_bytes=0, gb=1024)


def test_numpy_numbers_give_an_integer():
    found = CODE.max_batch(np.float64(48e9), np.int64(512), np.float32(0.25))
    assert found == 8 and type(found) is int


def test_what_the_points_leave_open_is_refused():
    sparse = [p for p in peaks(0) if p.sparsity == 0.25]
    with pytest.raises(InputError, match=r"C1 is not identified: all points have the sparsity 0.25; measure a second"):
        BatchMemoryModel.fit(sparse)
    card = [p for p in limits(0) if p.peak_bytes == 48e9]
    with pytest.raises(InputError, match=r"M_model is not identified: all points have one memory, 4.8e\+10 bytes"):
        BatchMemoryModel.fit_limits(card)
    known = BatchMemoryModel.fit_limits(card, model_bytes=23.35e9)
    assert known.sparse_share.value == pytest.approx(0.95, abs=0.05) and known.model_bytes.method == "given"
    same = [p for p in peaks(0) if (p.batch, p.sequence_length) == (2, 512)]
    with pytest.raises(
        InputError, match=r"M_model, C0 and C1 are not identified by these 2 points: vary batch x length"
    ):
        BatchMemoryModel.fit(same)
    with pytest.raises(InputError, match=r"M_model, C0 and C1 are not identified by these 2 points"):
        BatchMemoryModel.fit_limits([limits(0)[0], limits(0)[-1]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BatchMemoryModel.fit([]), r"points must be one or more, each with peak_bytes, got 0"),
        (
            lambda: BatchMemoryModel.fit([(1, 1.0), (2, 1.0)]),
            r"points must be one or more, each with peak_bytes, got 2",
        ),
        (
            lambda: BatchMemoryModel.fit([(1, 1, 4e9), (2, 1, 3e9)]),
            r"peak_bytes must grow with batch x length, got -1e\+09",
        ),
        (
            lambda: BatchMemoryModel.fit([(1, 1, 4e9), (2, 1, 5e9)], model_bytes=4e9),
            r"model_bytes must be less than every",
        ),
        (lambda: BatchMemoryModel.fit(peaks(0), sparse_share=89), r"sparse_share must lie in \[0, 1\], got 89"),
        (lambda: BatchMemoryModel.of(c0_per_gb=0, sparse_share=0, model_bytes=0), r"c0_per_gb must be finite and > 0"),
        (lambda: CODE.max_batch(0, 512), r"gpu_bytes must be finite and > 0, got 0"),
        (
            lambda: CODE.max_batch(80e9, 512, 0.0),
            r"sparsity must lie in \(0, 1\], the share of experts at work, got 0.0",
        ),
        (lambda: CODE.max_batch(80e9, 0), r"sequence_length must be finite and > 0, got 0"),
        (lambda: CODE.max_batch(80e9, 512, reserve=1.0), r"reserve must lie in \[0, 1\), got 1.0"),
        (lambda: CODE.bytes(math.nan), r"batch must be >= 0, got nan"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
