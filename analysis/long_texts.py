"""Beyond the paper: how hit rate, bytes, chains and latency drift over a long generation, and the latency of single tokens."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import style
from analysis.records import Missing, Records
from analysis.style import Drawn
from macbench.records import KEY

NAME = "long_texts"
_LONG, _WINDOW = 1000, 250  # steps of a text that counts as long, and of one point
_BYTES = ["bytes_kv", "bytes_meta", "bytes_state", "bytes_idx"]
_ROWS = 24  # method variants in the picture of latencies, at most


def numbers(records: Records, run: Path) -> pd.DataFrame:
    """MAC's long texts by windows of steps: text, first, hit_rate, rho_bytes (ratio of sums), chain_mean, latency_ms (median)."""
    steps = records.table(run, "steps", [*KEY, "step", "hit_rate", "chain_mean", "latency_ms", "bytes_full", *_BYTES])
    steps = steps[(steps.method == "mac") & (steps.variant == "")]
    steps = steps.assign(text=steps.subtask + "/" + steps.example_id, first=steps.step // _WINDOW * _WINDOW, read=steps[_BYTES].sum(axis=1))
    steps = steps[steps.groupby("text").step.transform("max") >= _LONG]
    grouped = steps.groupby(["text", "first"])
    table = grouped.agg(hit_rate=("hit_rate", "mean"), chain_mean=("chain_mean", "mean"), latency_ms=("latency_ms", "median"), n=("step", "size"))
    table["rho_bytes"] = grouped.read.sum() / grouped.bytes_full.sum()
    return table[table.n == _WINDOW].reset_index()


def make(records: Records, out: Path) -> list[Drawn]:
    drawn, lacks = [], []
    for run in records.runs:
        try:
            table = numbers(records, run)
            if len(table):
                drawn.append(drift(records, run, table, out))
        except Missing as lack:
            lacks.append(str(lack))
    latencies = [r for r in records.runs if (r / "steps").is_dir() and "NVIDIA" in records.source(r).device] or records.runs
    for run in latencies:
        try:
            drawn.append(latency(records, run, out))
        except Missing as lack:
            lacks.append(str(lack))
    if not drawn:
        raise Missing("; ".join(dict.fromkeys(lacks)) or "no runs with step rows")
    return drawn + [Drawn(NAME, "Steps of a run", "", [], lack=lack) for lack in dict.fromkeys(lacks)]


def _name(run: Path) -> str:
    return f"{run.parent.parent.parent.name}-{run.parent.parent.name}-{run.parent.name}-{run.name}"


def drift(records: Records, run: Path, table: pd.DataFrame, out: Path) -> Drawn:
    figure, panels = plt.subplots(2, 2, figsize=(style.WIDTH, 3.6), sharex=True, layout="constrained")
    labels = {"hit_rate": "hit rate", "rho_bytes": "rho_bytes", "chain_mean": "mean chain depth of new entries", "latency_ms": "ms per step (median)"}
    for axes, (column, label) in zip(panels.flat, labels.items(), strict=True):
        for i, (text, part) in enumerate(table.groupby("text")):
            axes.plot(part["first"] + _WINDOW / 2, part[column], label=text, **style.look(i) | {"markersize": 2.5})
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.03 if column in ("hit_rate", "rho_bytes") else None)
    for axes in panels[1]:
        axes.set_xlabel("generated tokens")
    what = f"{_name(run)}: MAC's texts of more than {_LONG:,} tokens, a point per {_WINDOW} steps, a line per text, so that their spread is seen"
    return style.save(figure, out, f"drift-{_name(run)}", "Drift over long generations", style.made([records.source(run)], what), "", panels[0][0])


def latency(records: Records, run: Path, out: Path) -> Drawn:
    """Median, 5th to 95th percentile and 99th percentile of the latency of a step by method variant."""
    steps = records.table(run, "steps", ["method", "variant", "latency_ms"])
    rows = []
    for (method, variant), part in steps.groupby(["method", "variant"]):
        low, middle, high, tail = np.percentile(part.latency_ms, [5, 50, 95, 99])
        rows.append({"name": f"{method} {variant}".strip(), "low": low, "middle": middle, "high": high, "tail": tail, "n": len(part)})
    rows = sorted(rows, key=lambda r: r["middle"])[:_ROWS]
    figure, axes = plt.subplots(figsize=(0.8 * style.WIDTH, 0.5 + 0.17 * len(rows)), layout="constrained")
    for i, row in enumerate(rows):
        axes.plot([row["low"], row["high"]], [i, i], color=style.COLOURS[0], linewidth=3, alpha=0.4, solid_capstyle="butt", label="5% to 95%" if not i else None)
        axes.plot(row["middle"], i, marker="o", linestyle="none", color=style.COLOURS[0], label="median" if not i else None)
        axes.plot(row["tail"], i, marker="|", linestyle="none", color=style.COLOURS[1], markersize=7, label="99%" if not i else None)
    axes.set_yticks(range(len(rows)), [f"{r['name']} ({r['n']:,})" for r in rows], fontsize=6.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    axes.set_xlabel("ms per decode step of a batch, from the host's preparations until its tokens are there")
    batch = records.source(run).facts.get("command", "")
    size = next((word.partition("=")[2] for word in batch.split() if word.startswith("batch=")), "1")
    text = style.made([records.source(run)], f"{_name(run)}, batch {size}; in brackets: steps. Other work may have shared the machine")
    return style.save(figure, out, f"latency-{_name(run)}", "Latency of single tokens", text, "", axes)
