"""From one generation to the rows of the three tables: every number is a sum of counts or a ratio of sums.

A generation has one sample row, but as many step rows as steps: steps and layers are made column by column (masked: nothing was counted).
"""

import numpy as np

from macbench.counting import READ_CATEGORIES, TOTALS, ratios
from macbench.engine import Generation

Columns = dict[str, np.ndarray | str]


def sample_columns(generation: Generation) -> dict:
    """Counts, ratios and times of a whole generation."""
    steps = len(generation.step_seconds)
    decode = float(generation.step_seconds.sum())
    sums = {name: int(generation.counts[name].sum()) for name in (*TOTALS, "hits", "match_heads")}
    return {
        "new_tokens": len(generation.tokens),
        "decode_steps": steps,
        "question_steps": generation.question_steps,
        "finish_reason": generation.finish_reason,
        "setup_s": generation.setup_seconds,
        "decode_s": decode,
        "tpot_ms": 1e3 * decode / steps if steps else None,
        **{name: sums[name] for name in TOTALS},
        **ratios(sums),
        "bytes_pre": generation.prepared_bytes,
    }


def step_rows(generation: Generation, key: dict[str, str]) -> Columns:
    """A row per decode step; ``position`` is the 0-based position of the token that the step processes."""
    place = {"step": np.arange(len(generation.step_seconds)), "position": generation.positions, "latency_ms": 1e3 * generation.step_seconds}
    return key | place | _columns(generation.counts, (1, 2))


def layer_rows(generation: Generation, key: dict[str, str], errors: list[float | None]) -> Columns:
    """A row per layer; ``errors`` of its attention outputs, or []."""
    layers = generation.counts["tokens_log"].shape[1]
    found = np.ma.masked_invalid(np.array(errors or [None] * layers, dtype=float))
    return key | {"layer": np.arange(layers)} | _columns(generation.counts, (0, 2)) | {"output_error": found}


def _columns(counts: dict[str, np.ndarray], axis: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Sums over ``axis`` of counts [steps, layers, 1] and what follows from them; see ``counting.ratios``."""
    sums = {name: counts[name].sum(axis=axis) for name in (*TOTALS, "hits", "match_heads", "chain_sum")}
    read = sum(sums[f"bytes_{category}"] for category in READ_CATEGORIES)
    reused = sums["match_heads"]
    return {
        **{name: sums[name] for name in TOTALS},
        "rho_log": np.ma.divide(sums["tokens_log"], sums["tokens_log_full"]),
        "rho_phys": np.ma.divide(sums["tokens_phys"], sums["tokens_phys_full"]),
        "rho_bytes": np.ma.divide(read, sums["bytes_full"]),
        "hit_rate": np.ma.divide(sums["hits"], reused),
        "chain_mean": np.ma.divide(sums["chain_sum"], reused),
        "chain_max": np.ma.masked_where(reused == 0, counts["chain_max"].max(axis=axis, initial=0)),
    }
