"""Filling a context: the largest haystack whose prompt and answer fit into ctx tokens, counted exactly."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from macbench.errors import ConfigError

_GUESSES = 12  # interpolations before plain bisection; two or three are the rule


@dataclass
class Draft:
    """A sample whose random choices are made and whose size is still open.

    ``parts(n)``: the prompt with ``n`` units of haystack (see pieces.py), for ``smallest <= n <= largest``.
    ``tokens``: tokens of the first n units for every n, int64 [largest + 1], exact but for a few at the edges; None if unknown.
    ``meta(n)``: what the records should keep about the sample, JSON values only.
    """

    references: list[str]
    parts: Callable[[int], list]
    smallest: int
    largest: int
    tokens: np.ndarray | None = None
    meta: Callable[[int], dict] = field(default=lambda n: {})


def largest_fit(draft: Draft, count: Callable[[list], int], budget: int) -> tuple[int, list] | None:
    """The n with ``count(parts(n)) <= budget`` whose successor does not fit or does not exist, and its parts; None if none fits.

    Counts grow with n (but for a token at the edges), so a bracket shrinks around n. Its next point comes from ``tokens``
    where they are known, else from the straight line through the last two points.
    """
    counts: dict[int, int] = {}

    def fitting(n: int) -> list | None:
        parts = draft.parts(n)
        counts[n] = count(parts)
        return parts if counts[n] <= budget else None

    best = fitting(draft.smallest)
    if best is None:
        return None
    low, high = draft.smallest, draft.largest + 1  # low fits; high does not, or does not exist
    while high - low > 1:
        if len(counts) > _GUESSES:
            n = (low + high) // 2
        elif draft.tokens is not None:
            n = int(np.searchsorted(draft.tokens, draft.tokens[low] + budget - counts[low], side="right")) - 1
        elif len(counts) == 1:
            n = low + 64
        else:
            a, b = list(counts)[-2:]
            slope = max((counts[b] - counts[a]) / (b - a), 0.5)
            n = low + int((budget - counts[low]) / slope)
        n = min(max(n, low + 1), high - 1)
        parts = fitting(n)
        low, high, best = (low, n, best) if parts is None else (n, high, parts)
    return low, best


def too_small(task: str, ctx: int, needed: int) -> ConfigError:
    """The error for a context that cannot hold even the smallest sample of ``needed`` tokens, the generated ones included."""
    return ConfigError("ctx", ctx, f"{task} needs at least {needed} tokens with this tokenizer and chat template")
