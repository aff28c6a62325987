"""From sample rows to the table at the end of a run: scores with standard errors, ratios of sums, steps and latency."""

import math

import pandas as pd

from macbench.counting import TOTALS, ratios

COLUMNS = [
    *("method", "variant", "subtask", "examples", "errors", "score", "score_se", "rho_log", "rho_phys", "rho_bytes"),
    *("hit_rate", "steps", "ms_per_token", "prefill_s"),
]


def summarise(samples: pd.DataFrame) -> pd.DataFrame:
    """A row per method variant and subtask, and for several subtasks one named ``all`` whose score is the plain mean of the subtasks'.

    ``score_se`` is the standard error of the mean over examples; of ``all``, that of the mean over subtasks. Ratios are ratios of sums.
    """
    rows = []
    for (method, variant), group in samples.groupby(["method", "variant"], sort=False):
        parts = [_row(method, variant, subtask, rows_) for subtask, rows_ in group.groupby("subtask", sort=False)]
        rows += parts
        if len(parts) > 1:
            total = _row(method, variant, "all", group)
            scored = [p for p in parts if p["examples"]]
            total["score"] = sum(p["score"] for p in scored) / len(scored) if scored else math.nan
            total["score_se"] = math.sqrt(sum(p["score_se"] ** 2 for p in scored)) / len(scored) if scored else math.nan
            rows.append(total)
    return pd.DataFrame(rows, columns=COLUMNS)


def drift(steps: pd.DataFrame, samples: pd.DataFrame, window: int = 1000) -> pd.DataFrame:
    """How access and speed change over a long generation: a row per method variant and ``window`` decode steps.

    From step rows, of the examples in ``samples``. Ratios are ratios of sums; ``examples`` are those that got as far as this window.
    """
    keys = ["method", "variant", "subtask", "example_id"]
    steps = steps.merge(samples[keys].drop_duplicates(), on=keys)
    steps = steps.assign(first=steps.step // window * window)
    rows = []
    for (method, variant), mine in steps.groupby(["method", "variant"], sort=False):
        for first, part in mine.groupby("first"):
            # Every step of a matching method looks up the same number of heads, so the plain mean of hit rates is exact.
            sums = {name: float(part[name].sum()) for name in TOTALS} | {"hits": part.hit_rate.sum(), "match_heads": part.hit_rate.count()}
            rows.append(
                {
                    "method": method,
                    "variant": variant,
                    "tokens": f"{first}-{first + window}",
                    "examples": part.groupby(["subtask", "example_id"]).ngroups,
                    **ratios(sums),
                    "ms_per_token": part.latency_ms.mean(),
                    "steps": len(part),
                }
            )
    return pd.DataFrame(rows)


def _row(method: str, variant: str, subtask: str, group: pd.DataFrame) -> dict:
    good = group[group.error.isna()]
    n = len(good)
    sums = {name: float(good[name].sum()) for name in TOTALS}
    steps = int(good.decode_steps.sum())
    # Every step of a matching method looks up the same number of heads, so steps weigh hit rates exactly.
    matching = good.decode_steps.where(good.hit_rate.notna(), 0)
    sums |= {"hits": float((good.hit_rate.fillna(0) * matching).sum()), "match_heads": float(matching.sum())}
    return {
        "method": method,
        "variant": variant,
        "subtask": subtask,
        "examples": n,
        "errors": len(group) - n,
        "score": good.score.mean() if n else math.nan,
        "score_se": good.score.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan,
        **ratios(sums),
        "steps": steps,
        "ms_per_token": 1e3 * float(good.decode_s.sum()) / steps if steps else math.nan,
        "prefill_s": good.prefill_s.mean() if n else math.nan,
    }


_FORMATS = {
    "score": "{:.3f}",
    "score_se": "{:.3f}",
    "rho_log": "{:.4f}",
    "rho_phys": "{:.4f}",
    "rho_bytes": "{:.4f}",
    "hit_rate": "{:.4f}",
    "ms_per_token": "{:.1f}",
    "prefill_s": "{:.2f}",
}


def format_table(table: pd.DataFrame) -> str:
    """Plain text; what does not apply is a dash. Columns that are the same everywhere and say nothing are left out."""
    shown = table.copy()
    for column, form in _FORMATS.items():
        shown[column] = [form.format(x) if pd.notna(x) else "-" for x in table[column]]
    if (table.variant == "").all():
        shown = shown.drop(columns="variant")
    if (table.errors == 0).all():
        shown = shown.drop(columns="errors")
    return shown.to_string(index=False)


def format_frame(frame: pd.DataFrame) -> str:
    """Plain text of a task's own table, scores in percent; a dash where nothing applies, no column of empty strings."""
    shown = frame.loc[:, [c for c in frame if not (frame[c] == "").all()]].copy()
    for column in shown:
        if pd.api.types.is_float_dtype(shown[column]):
            form = "{:.1f}" if column.startswith("score") else _FORMATS.get(column, "{:.1f}")
            shown[column] = [form.format(x) if pd.notna(x) else "-" for x in shown[column]]
    return shown.to_string(index=False)
