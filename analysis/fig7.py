"""Fig 7: where the time of a decoded token goes."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import style
from analysis.records import Missing, Records, Source
from analysis.style import Drawn

NAME = "fig7"
TITLE = "Fig 7: end-to-end decode breakdown"
PAPER = "Llama-3.1-8B: up to 2.6x end to end, per-token latency down 60% at 128K (second-hand)."
PARTS = ["attention_ms", "products_ms", "rest_ms"]
COLUMNS = [
    *(
        "model",
        "random_weights",
        "method",
        "backend",
        "ctx",
        "batch",
        "window",
        "hit_rate",
        "hit_rate_measured",
        "steps",
        "tpot_p50_ms",
        "tpot_p95_ms",
    ),
    *PARTS,
]


def numbers(records: Records) -> tuple[pd.DataFrame, list[Source]]:
    """Rows with a breakdown, of the model with most of them, on one machine: label, attention_ms, products_ms, other_ms, speedup.

    The machine is that of the newest file. A part below zero says that the measurement was none. Where no row has a breakdown, which takes a GPU,
    all rows, whose parts are NaN.
    """
    frame, sources = records.benchmark("decode", COLUMNS)
    frame = frame[frame.backend != "generate"]
    if frame.empty:
        raise Missing("no step in the records of task=decode; python -m macbench.run +experiment=fig7 scale=gpu measures some")
    frame = frame.assign(device=[sources[i].device for i in frame.file])
    divided = (frame[PARTS] >= 0).all(axis=1)
    frame[PARTS] = frame[PARTS].where(divided)
    frame, least = (frame[divided], 3) if divided.any() else (frame, 2)
    label = [f"full, {r.backend}" if r.method == "full" else f"MAC, hit {r.hit_rate_measured:.2f}" for r in frame.itertuples()]
    frame = frame.assign(label=label)
    smallest = frame.groupby(["model", "device"]).window.transform("min")
    frame = frame[frame.window.isna() | (frame.window == smallest)]
    # Cells with MAC at several hit rates; a single row compares with nothing, and rows of two runs not with each other.
    frame = frame[frame.groupby(["file", "model", "ctx", "batch"]).label.transform("nunique") >= least]
    if frame.empty:
        raise Missing("no ctx and batch has full attention beside MAC; python -m macbench.run +experiment=fig7 scale=gpu measures it")
    frame = frame[frame.model == frame.model.mode()[0]]
    frame = frame[frame.device == frame.device.iloc[-1]]
    frame = frame[frame.file == frame.groupby(["ctx", "batch"]).file.transform("max")]
    full = frame[frame.method == "full"].groupby(["ctx", "batch"]).tpot_p50_ms.max().rename("slowest")
    theirs = frame[(frame.method == "full") & (frame.backend == "flashinfer")].set_index(["ctx", "batch"]).tpot_p50_ms.rename("theirs")
    frame = frame.join(full, on=["ctx", "batch"]).join(theirs, on=["ctx", "batch"])
    other = frame.tpot_p50_ms - frame.attention_ms - frame.products_ms
    frame = frame.assign(other_ms=other, speedup=frame.theirs.fillna(frame.slowest) / frame.tpot_p50_ms).sort_values(["batch", "ctx"], kind="stable")
    return frame, [sources[i] for i in frame.file.unique()]


def make(records: Records, out: Path) -> list[Drawn]:
    table, sources = numbers(records)
    cells = list(table.groupby(["batch", "ctx"], sort=True))
    figure, panels = plt.subplots(1, len(cells), figsize=(style.WIDTH, 2.9), layout="constrained", squeeze=False)
    divided = table.attention_ms.notna().all()
    parts = {"products_ms": "matrix products", "attention_ms": "attention", "other_ms": "everything else, host included"}
    parts = parts if divided else {"tpot_p50_ms": "whole step"}
    for axes, ((batch, ctx), part) in zip(panels[0], cells, strict=True):
        place, bottom = np.arange(len(part)), np.zeros(len(part))
        for (column, name), colour, hatch in zip(parts.items(), ("#0072B2", "#E69F00", "0.75"), ("", "//", ".."), strict=divided):
            height = part[column].clip(lower=0).to_numpy()
            axes.bar(place, height, 0.7, bottom, label=name, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3)
            bottom += height
        axes.plot(place, part.tpot_p95_ms, linestyle="none", marker="_", color=style.BLACK, markersize=6, label="95th percentile of the step")
        highest = np.maximum(bottom, part.tpot_p95_ms)
        for i, (top, row) in enumerate(zip(highest, part.itertuples(), strict=True)):
            # Of a neighbour as high the label would run into this one's.
            lift = 4.5 if i % 2 and abs(top - highest.iloc[i - 1]) < 0.05 * highest.max() else 0
            axes.annotate(f"{row.speedup:.2f}x", (i, top), (0, 2 + lift), textcoords="offset points", ha="center", va="bottom", fontsize=6)
        axes.set_xticks(place, part.label, rotation=40, ha="right", rotation_mode="anchor", fontsize=6.5)
        axes.set_title(f"{style.tokens(ctx)}, batch {batch}")
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.14)
    panels[0][0].set_ylabel("ms per decode step (median)")
    first = table.iloc[0]
    weights = "random weights of its shape, so hit rates are synthetic" if first.random_weights else "real weights"
    what = f"{first.model.replace('random_', '')}: {weights}; {first.steps:g} steps, ring {table.window.min():g}"
    peer = "by FlashInfer" if table.theirs.notna().all() else "(the slowest where FlashInfer did not run)"
    how = "Attention: the device's time for steps with less without it; products: alone" if divided else "Parts are measured on a GPU alone"
    more = f"Above the bars: speed-up over full attention {peer}. {how}.{_off(table)}"
    text = f"{style.made(sources, what)} {more}"
    return [style.save(figure, out, NAME, TITLE, text, PAPER, panels[0][0])]


def _off(table: pd.DataFrame) -> str:
    """Hit rates that few heads cannot have: what was measured instead, by batch; '' where all came out as they were asked for."""
    off = table[(table.hit_rate_measured - table.hit_rate).abs() > 0.009].drop_duplicates(["batch", "hit_rate"]).sort_values(["batch", "hit_rate"])
    said = "; ".join(f"{row.hit_rate:g} is {row.hit_rate_measured:.3f} at batch {row.batch}" for row in off.itertuples())
    return f" Of few heads a hit rate is rounded: {said}." if said else ""
