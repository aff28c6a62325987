"""Statistics against closed forms, enumeration and known tables."""

import math
from itertools import product

import numpy as np
import pytest

from macbench import stats


def test_standard_error_of_one_subtask_and_of_several():
    a, b = np.array([0.0, 1, 1, 0, 1]), np.array([0.5, 0.5, 1.0])
    assert stats.standard_error([a]) == pytest.approx(math.sqrt(0.6 * 0.4 / 4))  # sqrt(p (1 - p) / (n - 1))
    both = math.sqrt(0.6 * 0.4 / 4 + (1 / 12) / 3) / 2
    assert stats.standard_error([a, b]) == pytest.approx(both)
    assert math.isnan(stats.standard_error([a, np.array([1.0])]))


def every_resample(values: np.ndarray) -> np.ndarray:
    """Means of all equally likely draws of n - 1 of n values."""
    return np.array([np.mean(draw) for draw in product(values, repeat=len(values) - 1)])


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_bootstrap_interval_is_that_of_all_resamples(level):
    first, second = np.array([0.0, 0.31, 0.77, 1.0]), np.array([-0.4, 0.13, 0.9])
    exact = ((every_resample(first)[:, None] + every_resample(second)) / 2).ravel()
    low, high = stats.bootstrap_interval([first, second], draws=200_000, level=level)
    # Quantiles of a discrete distribution: the share below is right, up to the share of one atom and the noise of the draws.
    assert np.mean(exact < low) - 0.005 <= (1 - level) / 2 <= np.mean(exact <= low + 1e-9) + 0.005
    assert np.mean(exact < high - 1e-9) - 0.005 <= (1 + level) / 2 <= np.mean(exact <= high + 1e-9) + 0.005


def test_spread_of_resamples_is_the_unbiased_variance():
    values = np.random.default_rng(3).normal(size=6)
    assert np.var(every_resample(values)) == pytest.approx(stats.standard_error([values]) ** 2)


def test_bootstrap_of_many_examples_is_normal():
    generator = np.random.default_rng(5)
    strata = [generator.normal(i, 1 + i, 400) for i in range(3)]
    low, high = stats.bootstrap_interval(strata)
    half = 1.959964 * stats.standard_error(strata)
    assert (high - low) / 2 == pytest.approx(half, rel=0.03)
    assert (high + low) / 2 == pytest.approx(stats.mean(strata), abs=0.03 * half)


@pytest.mark.parametrize(("subtasks", "examples"), [(13, 5), (13, 20), (1, 60)])
def test_interval_covers_the_truth(subtasks, examples):
    """Wins 20%, losses 10%: the true difference is 0.1."""
    generator = np.random.default_rng(11)
    covered = 0
    for _ in range(600):
        data = generator.choice([1.0, -1.0, 0.0], p=[0.2, 0.1, 0.7], size=(subtasks, examples))
        low, high = stats.bootstrap_interval(list(data), draws=800)
        covered += low <= 0.1 <= high
    assert 0.92 <= covered / 600 <= 0.975


def test_interval_depends_on_the_rows_not_on_their_order_and_in_blocks_is_the_same(monkeypatch):
    values = np.random.default_rng(0).integers(-2, 3, 50) / 4
    whole = stats.bootstrap_interval([values])
    assert stats.bootstrap_interval([values[::-1]]) == whole
    monkeypatch.setattr(stats, "_BLOCK", 64)
    assert stats.bootstrap_interval([values]) == pytest.approx(whole)


@pytest.mark.parametrize(("n", "fewer", "p"), [(5, 0, 0.0625), (6, 0, 0.03125), (10, 1, 0.0215), (10, 2, 0.1094), (20, 5, 0.0414), (25, 7, 0.0433)])
def test_mcnemar_is_the_sign_tests_table(n, fewer, p):
    """Twice the tails of the binomial tables for p = 1/2 (Siegel 1956, table D)."""
    assert stats.mcnemar(fewer, n - fewer) == pytest.approx(p, abs=5e-5)
    assert stats.mcnemar(n - fewer, fewer) == stats.mcnemar(fewer, n - fewer)


@pytest.mark.parametrize("n", range(11))
def test_mcnemar_is_a_count_of_coin_tosses(n):
    for wins in range(n + 1):
        uneven = abs(2 * wins - n)
        count = sum(abs(2 * sum(tosses) - n) >= uneven for tosses in product((0, 1), repeat=n))
        assert stats.mcnemar(wins, n - wins) == pytest.approx(min(1, count / 2**n))


def test_mcnemar_of_many_pairs():
    """Normal approximation with continuity correction: z = (|b - c| - 1) / sqrt(b + c)."""
    z = (320 - 1) / math.sqrt(20_000)
    assert stats.mcnemar(10_160, 9_840) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=2e-3)


def test_examples_needed():
    """(1.959964 + 0.841621)^2 = 7.848880 times the variance over 0.01 squared."""
    halves = np.array([1.0, -1.0] * 500)
    assert stats.examples_needed([halves]) == math.ceil(78488.80 * 1000 / 999)
    assert stats.examples_needed([halves, np.zeros(10)]) == math.ceil(78488.80 * 1000 / 999 / 2)
    assert math.isnan(stats.examples_needed([np.zeros(10)])) and math.isnan(stats.examples_needed([np.array([1.0])]))


def test_examples_needed_gives_that_power():
    generator = np.random.default_rng(2)
    spread = 0.1
    n = int(stats.examples_needed([generator.normal(0, spread, 100_000)]))
    found = 0
    for _ in range(2000):
        data = generator.normal(stats.POINT, spread, n)
        found += abs(data.mean()) / stats.standard_error([data]) > 1.959964
    assert found / 2000 == pytest.approx(0.8, abs=0.03)


def test_paired():
    ours, theirs = [np.array([1.0, 1, 0, 1]), np.array([0.0, 1])], [np.array([0.0, 1, 1, 0]), np.array([0.0, 0])]
    found = stats.paired(ours, theirs)
    assert (found.pairs, found.wins, found.losses, found.ties) == (6, 3, 1, 2)
    assert found.difference == pytest.approx((0.25 + 0.5) / 2)
    assert found.difference_low <= found.difference <= found.difference_high
    assert found.mcnemar_p == pytest.approx(2 * (1 + 4) / 16)
    part = stats.paired([np.array([0.5, 1.0])], [np.array([0.5, 0.25])])
    assert math.isnan(part.mcnemar_p) and part.difference == pytest.approx(0.375)


def test_paired_with_one_pair_claims_no_interval():
    found = stats.paired([np.array([1.0])], [np.array([0.0])])
    assert found.difference == 1 and found.wins == 1
    assert all(math.isnan(x) for x in (found.difference_se, found.difference_low, found.difference_high, found.examples_needed))
