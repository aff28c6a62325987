"""Fig 8: cost of the ring match over head layouts and ring sizes."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullLocator

from analysis import style
from analysis.fig6 import COLUMNS
from analysis.records import Missing, Records, Source
from analysis.style import Drawn

NAME = "fig8"
TITLE = "Fig 8: cost of the match over head layouts and ring sizes"
PAPER = "9.1 us per call whatever the context (table 5); balancing load saves 29 to 38% of attention latency (second-hand)."
# The share of the work that each program gets is not a knob of the kernels here.
UNBALANCED = "Load balancing is not switched off for comparison: the attending kernel gives every program the same number of keys by construction."


def numbers(records: Records) -> tuple[pd.DataFrame, list[Source]]:
    """Rows of the match alone: layout, batch, window, time_us with 10th and 90th percentile, gigabytes per second."""
    frame, sources = records.benchmark("attention", COLUMNS)
    frame = frame[frame.method == "match"]
    if frame.empty:
        raise Missing("no row of the match alone in the records of task=attention; python -m macbench.run +experiment=fig8 scale=gpu measures it")
    files = frame.groupby("file").window.nunique().sort_values(kind="stable")
    frame = frame[frame.file == files.index[-1]]
    layout = frame.q_heads.astype(str) + "/" + frame.kv_heads.astype(str)
    times = {f"{name}_us": 1e3 * frame[column] for name, column in (("time", "time_ms"), ("p10", "time_p10_ms"), ("p90", "time_p90_ms"))}
    return frame.assign(layout=layout, rate=frame.bytes_read / frame.time_ms / 1e6, **times), [sources[files.index[-1]]]


def make(records: Records, out: Path) -> list[Drawn]:
    table, sources = numbers(records)
    batches, layouts = sorted(table.batch.unique()), sorted(table.layout.unique(), key=lambda x: [int(p) for p in x.split("/")])
    figure, panels = plt.subplots(1, len(batches), figsize=(style.WIDTH, 2.6), layout="constrained", squeeze=False)
    for axes, batch in zip(panels[0], batches, strict=True):
        for i, layout in enumerate(layouts):
            part = table[(table.batch == batch) & (table.layout == layout)].sort_values("window")
            bars = np.abs([part.time_us - part.p10_us, part.p90_us - part.time_us])
            axes.errorbar(part.window, part.time_us, yerr=bars, label=layout, elinewidth=0.8, capsize=1.8, **style.look(i))
        style.doubling(axes, sorted(table.window.unique()))
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.set_title(f"batch {batch}")
        axes.set_xlabel("ring size K")
    panels[0][0].set_ylabel("us per call")
    first = table.iloc[0]
    best = table.loc[table.rate.idxmax()]
    what = f"The match alone, launched by itself, heads of {first.head_dim}, {first['dtype']}; checked against float32 before it is timed"
    text = f"{style.made(sources, what)} Up to {best.rate:.0f} GB/s. Bars: 10th to 90th percentile of rounds. {UNBALANCED}"
    return [style.save(figure, out, NAME, TITLE, text, PAPER, panels[0][0], "query / KV heads")]
