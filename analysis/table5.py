"""Table 5: latency of one attention call by context, with the match apart."""

from pathlib import Path

import pandas as pd

from analysis import style, table
from analysis.fig6 import COLUMNS
from analysis.records import Missing, Records, Source
from analysis.style import Drawn

NAME = "table5"
TITLE = "Table 5: latency of one attention call by context, us"
PAPER = "full 71.6 at 32K to 234.2 at 120K, MAC about 64 at every length, match 9.1 at every length (us, second-hand)."


def numbers(records: Records) -> tuple[pd.DataFrame, list[Source]]:
    """Microseconds by context and part: columns ctx, part, time, p10, p90. Batch 1, of the file that has the match beside attention."""
    frame, sources = records.benchmark("attention", COLUMNS)
    kinds = frame.groupby("file").method.agg(set)
    files = [i for i, kind in kinds.items() if {"full", "mac", "match"} <= kind]
    if not files:
        raise Missing("no record of task=attention has the match beside MAC; python -m macbench.run +experiment=table5 scale=gpu measures it")
    frame = frame[(frame.file == files[-1]) & (frame.batch == frame.batch.min())]
    part = frame.backend.where(frame.method == "full", frame.method).replace("match", "match alone")
    part = part.where(frame.method != "full", "full, " + frame.backend)
    part = part.where(frame.method != "mac", "MAC, hit " + frame.hit_rate_measured.map("{:.2f}".format))
    times = {name: 1e3 * frame[column] for name, column in (("time", "time_ms"), ("p10", "time_p10_ms"), ("p90", "time_p90_ms"))}
    return frame.assign(part=part, **times)[["ctx", "part", "time", "p10", "p90", "window", "q_heads", "kv_heads"]], [sources[files[-1]]]


def make(records: Records, out: Path) -> list[Drawn]:
    found, sources = numbers(records)
    text = found.assign(cell=[f"{r.time:.1f} [{r.p10:.1f}, {r.p90:.1f}]" for r in found.itertuples()])
    order = list(dict.fromkeys(text.part))
    shown = text.pivot_table(index="part", columns="ctx", values="cell", aggfunc="first").reindex(order).fillna(table.MISSING)
    shown.columns = [style.tokens(c) for c in shown.columns]
    first = found.iloc[0]
    what = (
        f"Batch 1, {first.q_heads}/{first.kv_heads} heads, ring {found.window.max():g}, band 256; synthetic hit rates; median [10th, 90th percentile]"
    )
    return [table.save(shown.reset_index(), out, NAME, TITLE, style.made(sources, what), PAPER)]
