"""Fig 2: how far the nearest earlier query is, before and after RoPE, against how far back it lies."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import style
from analysis.records import Records
from analysis.style import Drawn

NAME = "fig2"
TITLE = "Fig 2: distance of matched queries against gap, before and after RoPE"
PAPER = "post-RoPE distance grows with the gap, pre-RoPE distance does not (second-hand, no numbers)."
_SPACES = {"pre": "before RoPE", "post": "after RoPE"}
_KINDS = {"nearest": "nearest query (before RoPE) of the ring", "every": "the query a given number of tokens back"}


def numbers(records: Records) -> pd.DataFrame:
    """Mean over texts of their median distance, with its interval: pairs, space, gap_low, gap_high, texts, count, mean, low, high."""
    frame = records.traced("gaps", ["pairs", "gap_low", "gap_high", "count", "pre_p50", "post_p50"])
    rows = []
    for (kind, gap_low, gap_high), part in frame.groupby(["pairs", "gap_low", "gap_high"]):
        for space in _SPACES:
            mean, low, high = style.interval(part[f"{space}_p50"])
            key = {"pairs": kind, "space": space, "gap_low": gap_low, "gap_high": gap_high, "texts": len(part), "count": part["count"].sum()}
            rows.append(key | {"mean": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def make(records: Records, out: Path) -> list[Drawn]:
    table = numbers(records)
    method = records.trace.facts["method"]
    figure, panels = plt.subplots(1, 2, figsize=(style.WIDTH, 2.6), sharey=True, layout="constrained")
    for axes, (kind, label) in zip(panels, _KINDS.items(), strict=True):
        for i, (space, name) in enumerate(_SPACES.items()):
            part = table[(table.pairs == kind) & (table.space == space)]
            style.line(axes, part.gap_low, zip(part["mean"], part.low, part.high, strict=True), label=name, **style.look(i))
        axes.axhline(method["tau"], color=style.GREY, linewidth=0.8, linestyle=":")
        style.doubling(axes, sorted(part.gap_low))
        axes.set_title(label)
        axes.set_xlabel("gap in tokens (classes from one tick to the next)" if kind == "nearest" else "gap in tokens")
        axes.set_ylim(0, 1.08 * table.high.fillna(table["mean"]).max())
    panels[1].annotate(f"tau = {method['tau']:g}", (0.99, method["tau"]), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
    panels[0].set_ylabel("median L2 distance / sqrt(2 d)")
    panels[1].legend(loc="lower right")
    return [
        style.save(
            figure,
            out,
            NAME,
            TITLE,
            caption(records, f"Gap {method['window']} is the ring's oldest entry alone. Error bars: 95% interval over texts."),
            PAPER,
        )
    ]


def caption(records: Records, more: str) -> str:
    """What every figure from a trace says of it."""
    texts = records.traced("texts", ["ctx", "steps"])
    facts, some = records.trace.facts, texts[texts.steps > 0]
    method = facts["method"]
    tasks = ", ".join(f"{n} of {task}" for task, n in some.groupby("task").size().items())
    what = (
        f"{facts['model']} in {facts['dtype'].removeprefix('torch.')}, ctx {style.tokens(some.ctx.iloc[0])}, texts of full attention: {tasks}, "
        f"{some.steps.sum():,} decode steps x all layers and heads; window {method['window']}, band {method['band']}"
    )
    return f"{style.made([records.trace], what)} {more}".strip()
