"""From sample rows to the numbers at the end of a run: scores, what separates them from full attention's, ratios of sums, latency.

This is the one place where they are computed, from parquet alone: ``python -m macbench.report RUN`` does it again.
"""

import math
from dataclasses import asdict

import pandas as pd

from macbench import stats
from macbench.counting import TOTALS, ratios

REFERENCE = "full"
WHOLE = "all"  # the subtask of rows over all subtasks
_PAIRED = ("difference", "difference_se", "difference_low", "difference_high", "wins", "losses", "ties", "mcnemar_p", "examples_needed")
_KEYS = ["method", "variant", "subtask", "example_id"]
_FIDELITY = ("top1_agreement", "kl_mean", "output_error", "rho_page")
COLUMNS = [
    *("method", "variant", "subtask", "examples", "errors", "score", "score_se", *_PAIRED, "rho_log", "rho_phys", "rho_bytes"),
    *("hit_rate", *_FIDELITY, "steps", "ms_per_token", "prefill_s"),
]


def summarise(samples: pd.DataFrame, guesses: dict[str, float] | None = None, each: bool = True) -> pd.DataFrame:
    """A row per method variant and subtask, and for several subtasks one named ``all``.

    Scores and fidelity are means over examples; those of ``all`` are plain means over subtasks, and the standard error ``score_se`` is
    theirs. Ratios are ratios of sums. Columns of ``stats.Paired`` compare with full attention on the examples that both finished.
    ``guesses``: scores that take no reading, by name; they get a row each, named like a method. ``each``: False leaves the rows of single
    subtasks out where there are several.
    """
    samples = samples.reindex(columns=[*samples.columns, *(name for name in _FIDELITY if name not in samples)])  # rows may be older
    good = samples[samples.error.isna()]
    full = good[good.method == REFERENCE].set_index(["subtask", "example_id"]).score.rename("reference_score")
    full = full[~full.index.duplicated()]
    samples = samples.join(full, on=["subtask", "example_id"])  # once: a join per method and subtask is most of the time
    samples["paired"] = pd.MultiIndex.from_frame(samples[["subtask", "example_id"]]).isin(full.index) & samples.error.isna()
    several = samples.subtask.nunique() > 1
    rows = []
    for (method, variant), group in samples.groupby(["method", "variant"], sort=False):
        parts = dict(list(group.groupby("subtask", sort=False)))
        single = [(name, {name: part}) for name, part in parts.items()] if each or not several else []
        for subtask, mine in single + [(WHOLE, parts)] * several:
            compared = _against(mine) if method != REFERENCE else {}
            rows.append({"method": method, "variant": variant, "subtask": subtask} | _row(mine) | compared)
    table = pd.DataFrame(rows, columns=COLUMNS)
    if not guesses or table.empty:
        return table
    known = [{"method": name, "variant": "", "subtask": headline(table).subtask.iloc[0], "score": score} for name, score in guesses.items()]
    examples = samples.groupby(["subtask", "example_id"]).ngroups
    return pd.concat([table, pd.DataFrame(known).assign(examples=examples, errors=0, steps=0)], ignore_index=True)[COLUMNS]


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """The rows over all subtasks, or those of the only one."""
    return table[table.subtask == (WHOLE if (table.subtask == WHOLE).any() else table.subtask)]


def drift(steps: pd.DataFrame, samples: pd.DataFrame, window: int = 1000) -> pd.DataFrame:
    """How access and speed change over a long generation: a row per method variant and ``window`` decode steps.

    From step rows, of the examples in ``samples``. Ratios are ratios of sums; ``examples`` are those that got as far as this window.
    """
    steps = _of(steps, samples)
    steps = steps.assign(first=steps.step // window * window)
    rows = []
    for (method, variant), mine in steps.groupby(["method", "variant"], sort=False):
        for first, part in mine.groupby("first"):
            rows.append({"method": method, "variant": variant, "tokens": f"{first}-{first + window}"} | _over(part))
    return pd.DataFrame(rows)


def generated(steps: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """Access and speed of the steps that processed generated tokens, where others processed a question: a row per method variant."""
    steps = _of(steps, samples)
    kept = steps[steps.step >= steps.question_steps]
    return pd.DataFrame([{"method": m, "variant": v} | _over(part) for (m, v), part in kept.groupby(["method", "variant"], sort=False)])


def _of(steps: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """Step rows of the examples in ``samples`` that did not fail, with their ``question_steps``: a text that could not be scored has steps, too."""
    samples = samples.reindex(columns=[*_KEYS, "question_steps", "error"]).fillna({"question_steps": 0})
    samples = samples[samples.error.isna()].drop(columns="error")
    return steps.merge(samples.drop_duplicates(), on=_KEYS)


def _over(part: pd.DataFrame) -> dict:
    """Sums, ratios of sums and latency of step rows."""
    # Every step of a matching method looks up the same number of heads, so the plain mean of hit rates is exact.
    sums = {name: float(part[name].sum()) for name in TOTALS} | {"hits": part.hit_rate.sum(), "match_heads": part.hit_rate.count()}
    examples = part.groupby(["subtask", "example_id"]).ngroups
    return {"examples": examples, **ratios(sums), "ms_per_token": part.latency_ms.mean(), "steps": len(part)}


def _row(parts: dict[str, pd.DataFrame]) -> dict:
    """``parts``: sample rows of one method variant by subtask."""
    group = pd.concat(parts.values()) if len(parts) > 1 else next(iter(parts.values()))
    good = group[group.error.isna()]
    scored = [mine.score.to_numpy(float) for part in parts.values() if len(mine := part[part.error.isna()])]
    sums = {name: float(good[name].sum()) for name in TOTALS}
    steps = int(good.decode_steps.sum())
    # Every step of a matching method looks up the same number of heads, so steps weigh hit rates exactly.
    matching = good.decode_steps.where(good.hit_rate.notna(), 0)
    sums |= {"hits": float((good.hit_rate.fillna(0) * matching).sum()), "match_heads": float(matching.sum())}
    return {
        "examples": len(good),
        "errors": len(group) - len(good),
        "score": stats.mean(scored) if scored else math.nan,
        "score_se": stats.standard_error(scored) if scored else math.nan,
        **ratios(sums),
        **{name: good[name].astype(float).groupby(good.subtask).mean().mean() for name in _FIDELITY},
        "steps": steps,
        "ms_per_token": 1e3 * float(good.decode_s.sum()) / steps if steps else math.nan,
        "prefill_s": good.prefill_s.mean() if len(good) else math.nan,
    }


def _against(parts: dict[str, pd.DataFrame]) -> dict:
    """Paired with full attention: sample rows of one method variant by subtask, those ``paired`` with its ``reference_score``."""
    pairs = [part[part.paired] for _, part in sorted(parts.items())]
    strata = [(p.score.to_numpy(float), p.reference_score.to_numpy(float)) for p in pairs if len(p)]
    return asdict(stats.paired(*zip(*strata, strict=True))) if strata else {}
