"""What scores, and differences of scores on the same examples, can and cannot tell. docs/statistics.md has the formulas.

A score is the plain mean over subtasks of the mean over examples, so everything here takes one array of values per subtask (a stratum).
A single subtask is a list of one array.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95  # of intervals; two-sided tests are at 1 - LEVEL
POWER = 0.8
POINT = 0.01  # the difference that ``examples_needed`` is about: one point of a hundred
DRAWS = 10_000
SEED = 0  # the same rows give the same interval
# Numbers per block of the bootstrap, 32 MB.
_BLOCK = 1 << 22

Strata = Sequence[np.ndarray]


@dataclass(frozen=True)
class Paired:
    """A method against another one on the same examples.

    ``difference``: mean over subtasks of the mean difference, ``difference_se`` its standard error, ``difference_low`` and ``_high`` its
    95% bootstrap interval; NaN where a subtask has one pair only. ``wins``, ``losses``, ``ties``: pairs. ``mcnemar_p``: NaN unless all
    scores are 0 or 1. ``examples_needed``: see ``examples_needed``.
    """

    pairs: int
    difference: float
    difference_se: float
    difference_low: float
    difference_high: float
    wins: int
    losses: int
    ties: int
    mcnemar_p: float
    examples_needed: float


def paired(ours: Strata, theirs: Strata) -> Paired:
    """Compare scores, one array per subtask; ``ours[i][j]`` and ``theirs[i][j]`` are of the same example."""
    differences = [np.asarray(a, float) - np.asarray(b, float) for a, b in zip(ours, theirs, strict=True)]
    every = np.concatenate(differences)
    wins, losses = int((every > 0).sum()), int((every < 0).sum())
    right_or_wrong = np.isin(np.concatenate([*ours, *theirs]), (0, 1)).all()
    low, high = bootstrap_interval(differences)
    return Paired(
        pairs=len(every),
        difference=mean(differences),
        difference_se=standard_error(differences),
        difference_low=low,
        difference_high=high,
        wins=wins,
        losses=losses,
        ties=len(every) - wins - losses,
        mcnemar_p=mcnemar(wins, losses) if right_or_wrong else math.nan,
        examples_needed=examples_needed(differences),
    )


def mean(strata: Strata) -> float:
    """Plain mean of the subtasks' means."""
    return float(np.mean([np.mean(x) for x in strata]))


def standard_error(strata: Strata) -> float:
    """Of ``mean``: sqrt(sum of s_h^2 / n_h) / H over H subtasks, s_h^2 with n_h - 1 below. NaN if one has a single example."""
    if any(len(x) < 2 for x in strata):
        return math.nan
    return math.sqrt(sum(np.var(x, ddof=1) / len(x) for x in strata)) / len(strata)


def bootstrap_interval(strata: Strata, draws: int = DRAWS, seed: int = SEED, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of ``mean`` when the examples of every subtask are drawn again.

    n_h - 1 of its n_h examples are drawn, with replacement: then the spread of the draws is the unbiased s_h^2 / n_h (McCarthy and
    Snowden 1985; Rao and Wu 1988). Drawing n_h would give (n_h - 1) / n_h of it, at five examples per subtask intervals 11% too short.
    """
    if any(len(x) < 2 for x in strata):
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    means = np.zeros(draws)
    for values in strata:
        # How often each distinct value is drawn is multinomial: fewer numbers than an index for every example, the same distribution.
        distinct, counts = np.unique(np.asarray(values, float), return_counts=True)
        block = max(1, _BLOCK // len(distinct))
        for first in range(0, draws, block):
            part = means[first : first + block]
            drawn = generator.multinomial(len(values) - 1, counts / len(values), len(part))
            part += drawn @ distinct / ((len(values) - 1) * len(strata))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p of McNemar's test: of ``wins`` + ``losses`` fair coins, at least as uneven. 1 if there are none."""
    n, fewer = wins + losses, min(wins, losses)
    term = tail = 1  # C(n, 0), exact integers: C(n, i+1) = C(n, i) (n - i) / (i + 1)
    for i in range(fewer):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def examples_needed(differences: Strata, point: float = POINT, level: float = LEVEL, power: float = POWER) -> float:
    """Examples over all subtasks, equally many of each, at which a true difference of ``point`` is found with probability ``power``.

    N = (z_{(1+level)/2} + z_{power})^2 * mean of the subtasks' s_h^2 / point^2, rounded up: a two-sided z-test of paired differences.
    NaN if the spread is unknown (a subtask with one pair) or all differences are equal.
    """
    if any(len(x) < 2 for x in differences):
        return math.nan
    variance = float(np.mean([np.var(x, ddof=1) for x in differences]))
    z = NormalDist().inv_cdf((1 + level) / 2) + NormalDist().inv_cdf(power)
    return float(math.ceil(z * z * variance / point**2)) if variance > 0 else math.nan
