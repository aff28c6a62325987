"""Tables 2 and 3: Quest, RocketKV and Multipole on LongBench v2, accuracy and latency."""

from pathlib import Path

import pandas as pd

from analysis import style, table
from analysis.fig1 import named, untold
from analysis.load import BUDGET
from analysis.records import Missing, Records, Source, read
from analysis.style import Drawn
from analysis.table1 import differing, scored
from macbench.summary import REFERENCE

NAME = "table2_3"
TITLE = "Tables 2 and 3: Quest, RocketKV and Multipole, accuracy and latency"
PAPER = "these methods are often slower than full attention end to end (second-hand, no numbers)."
METHODS = ("full", "mac", "quest", "rocketkv", "multipole")


def numbers(records: Records) -> tuple[pd.DataFrame, Path]:
    """Headline rows of METHODS of the best run: LongBench v2 before RULER, the question in the prefill and no other adapter, a GPU before a CPU,
    more of these methods, longer contexts."""
    candidates, lacks = [], []
    for run in records.runs:
        try:
            frame, source = records.samples(run), records.source(run)
            have = set(frame.method) & set(METHODS)
            rank = (frame.task.iloc[0] == "longbench_v2", not source.apart, "NVIDIA" in source.device, len(have), int(frame.ctx.iloc[0]))
            if len(have) >= 3:
                candidates.append((rank, run, frame))
        except Missing as lack:
            lacks.append(str(lack))
    if not candidates:
        none = "no run has any of quest, rocketkv and multipole; python -m macbench.run +experiment=table2_3 scale=cpu makes one"
        raise Missing("; ".join([*lacks, none]))
    _, run, frame = max(candidates, key=lambda c: c[0])
    rows = records.headline(run)
    rows = rows[rows.method.isin(METHODS)]
    return rows.assign(task=frame.task.iloc[0], ctx=frame.ctx.iloc[0]), run


def timed(records: Records, rows: pd.DataFrame, run: Path) -> tuple[pd.DataFrame, list[Source]]:
    """Columns ``ms`` (of a decode step of a batch) and ``over_full``; and the files of steps that had the card to themselves, if these are theirs."""
    alone, sources = records.step_times(run)
    if sources:
        budgets = rows.variant.str.extract(BUDGET, expand=False).fillna("")
        rows = rows.assign(ms=[alone.get(key, float("nan")) for key in zip(rows.method, budgets, strict=True)])
    else:
        rows = rows.assign(ms=rows.ms_per_token)
    full = rows[rows.method == REFERENCE].ms
    return rows.assign(over_full=rows.ms / full.iloc[0] if len(full) else float("nan")), sources


def _alone(timings: list[Source], ctx: int) -> str:
    """Which requests the times of steps are of: the median over those of one task, which no table's scores are of."""
    try:
        frame = pd.concat([read(source.path, ["ctx", "batch", "subtask"]) for source in timings])
    except Missing as lack:
        return f"median over requests of RULER, of which is not known ({lack}), from short runs"
    frame = frame[frame.ctx == ctx]
    subtasks, batches = (", ".join(map(str, sorted(frame[column].unique()))) for column in ("subtask", "batch"))
    return f"median over requests of RULER's {subtasks} at {style.tokens(ctx)}, batch {batches} (step_times.parquet), from short runs"


def make(records: Records, out: Path) -> list[Drawn]:
    found, run = numbers(records)
    found, timings = timed(records, found, run)
    rows = []
    for method in METHODS:
        for r in found[found.method == method].sort_values("rho_bytes").itertuples():
            row = {"method": method, "variant": named(method, r.variant).removeprefix(method).strip() or table.MISSING, "n": f"{r.examples:.0f}"}
            row["score"] = scored(r.score, r.score_se)
            row |= {
                "difference [95%]": table.MISSING if method == REFERENCE else differing(r),
                "rho_bytes": f"{r.rho_bytes:.3f}",
                "ms/step": table.MISSING if pd.isna(r.ms) else f"{r.ms:.2f}",
                "/ full": table.MISSING if pd.isna(r.over_full) else f"{r.over_full:.2f}",
            }
            rows.append(row | {"steps": f"{r.steps:,}"})
        if not (found.method == method).any():
            rows.append(
                {"method": method}
                | dict.fromkeys(("variant", "n", "score", "difference [95%]", "rho_bytes", "ms/step", "/ full", "steps"), table.MISSING)
            )
    first, source = found.iloc[0], records.source(run)
    place = "" if first.task == "longbench_v2" else "RULER in place of LongBench v2, for which no run has these methods: "
    chance = "; chance scores 0.25" if first.task == "longbench_v2" else ""
    text = untold(found, {"chance": 0.25} if chance else {})
    what = f"{place}{run.parent.parent.name}, {first.task}, ctx {style.tokens(first.ctx)}{chance}; "
    what += "ms per decode step of a batch, this engine, no serving system, "
    what += f"{_alone(timings, int(first.ctx))} that had the card to themselves" if timings else "as other work on the machine let it"
    return [table.save(pd.DataFrame(rows), out, NAME, TITLE, style.made([source, *timings], what) + text, PAPER)]
