"""From one generation to the rows of the three tables: every number is a sum of counts or a ratio of sums."""

from itertools import zip_longest

import numpy as np

from macbench.counting import TOTALS, ratios
from macbench.engine import Generation

# Counts that are summed but have no column of their own.
_HELPERS = ("hits", "match_heads", "chain_sum", "chain_max")


def _summed(counts: dict[str, np.ndarray], axis: tuple[int, ...]) -> list[dict[str, float]]:
    names = (*TOTALS, "hits", "match_heads", "chain_sum")
    sums = {name: counts[name].sum(axis=axis) for name in names}
    sums["chain_max"] = counts["chain_max"].max(axis=axis, initial=0)
    length = np.atleast_1d(sums["tokens_log"]).shape[0]
    return [{name: int(np.atleast_1d(values)[i]) for name, values in sums.items()} for i in range(length)]


def _columns(sums: dict[str, float], chains: bool = False) -> dict:
    row = {name: value for name, value in sums.items() if name not in _HELPERS}
    row |= ratios(sums)
    if chains:
        reused = sums["match_heads"]
        row["chain_mean"] = sums["chain_sum"] / reused if reused else None
        row["chain_max"] = sums["chain_max"] if reused else None
    return row


def sample_columns(generation: Generation) -> dict:
    """Counts, ratios and times of a whole generation."""
    steps = len(generation.step_seconds)
    decode = float(generation.step_seconds.sum())
    return {
        "new_tokens": len(generation.tokens),
        "decode_steps": steps,
        "question_steps": generation.question_steps,
        "finish_reason": generation.finish_reason,
        "setup_s": generation.setup_seconds,
        "decode_s": decode,
        "tpot_ms": 1e3 * decode / steps if steps else None,
        **_columns(_summed(generation.counts, (0, 1, 2))[0]),
        "bytes_pre": generation.prepared_bytes,
    }


def step_rows(generation: Generation, key: dict) -> list[dict]:
    """A row per decode step; ``position`` is the 0-based position of the token that the step processes."""
    return [
        {**key, "step": i, "position": int(generation.positions[i]), "latency_ms": 1e3 * float(generation.step_seconds[i]), **_columns(sums, True)}
        for i, sums in enumerate(_summed(generation.counts, (1, 2)))
    ]


def layer_rows(generation: Generation, key: dict, errors: list[float | None]) -> list[dict]:
    """A row per layer; ``errors`` of its attention outputs, or []."""
    sums = _summed(generation.counts, (0, 2))
    return [{**key, "layer": i, **_columns(s, True), "output_error": error} for i, (s, error) in enumerate(zip_longest(sums, errors))]
