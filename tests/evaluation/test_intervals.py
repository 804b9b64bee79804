"""Intervals against published values and against what can be counted."""

import numpy as np
import pytest

from phi_mm.evaluation.intervals import bootstrap, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_newcombe(right: int, n: int, low: float, high: float) -> None:
    found = wilson(right, n)
    assert found == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_stays_in_range() -> None:
    low, high = wilson(29, 29)
    assert high == 1.0
    assert 1 - low == pytest.approx(wilson(0, 29)[1])


@pytest.mark.parametrize(("right", "n"), [(3, 2), (-1, 2), (0, 0)])
def test_wilson_refuses_impossible_counts(right: int, n: int) -> None:
    with pytest.raises(ValueError, match="expected at least one trial"):
        wilson(right, n)


def test_bootstrap_of_equal_scores_has_no_width() -> None:
    assert bootstrap([0.25] * 9, [1, 5] * 4 + [2], np.random.default_rng(0)) == (0.25, 0.25)


def test_bootstrap_of_two_items_spans_what_can_be_drawn() -> None:
    # Means that can be drawn: 1 (one time in four), 3/4 (two), 0 (one).
    assert bootstrap([1.0, 0.0], [3, 1], np.random.default_rng(0)) == (0.0, 1.0)


def test_bootstrap_agrees_with_the_normal_interval_and_repeats() -> None:
    scores = [1.0] * 100 + [0.0] * 300
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    found = bootstrap(scores, [1.0] * 400, np.random.default_rng(3), draws=4000)
    assert found == pytest.approx((0.25 - half, 0.25 + half), abs=0.006)
    assert found == bootstrap(scores, [1.0] * 400, np.random.default_rng(3), draws=4000)


def test_bootstrap_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="2 scores and 1 weights"):
        bootstrap([1.0, 0.0], [1], np.random.default_rng(0))
