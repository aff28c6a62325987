"""Beyond the paper: how hit rate, reads and chains drift over a long generation, and the latency of single tokens."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import style
from analysis.records import Missing, Records, Source
from analysis.style import Drawn
from macbench.records import KEY

NAME = "long_texts"
_LONG, _WINDOW = 1000, 250  # steps of a text that counts as long, and of one point
_BYTES = ["bytes_kv", "bytes_meta", "bytes_state", "bytes_idx"]
_ROWS = 24  # method variants in the picture of latencies, at most


def numbers(records: Records, run: Path) -> pd.DataFrame:
    """MAC's long texts by windows of steps: text, first, hit_rate, rho_bytes and rho_log (ratios of sums), chain_mean."""
    steps = records.table(run, "steps", [*KEY, "step", "hit_rate", "chain_mean", "tokens_log", "tokens_log_full", "bytes_full", *_BYTES])
    steps = steps[(steps.method == "mac") & (steps.variant == "")]
    steps = steps.assign(text=steps.subtask + "/" + steps.example_id, first=steps.step // _WINDOW * _WINDOW, read=steps[_BYTES].sum(axis=1))
    steps = steps[steps.groupby("text").step.transform("max") >= _LONG]
    grouped = steps.groupby(["text", "first"])
    table = grouped.agg(hit_rate=("hit_rate", "mean"), chain_mean=("chain_mean", "mean"), n=("step", "size"))
    table["rho_log"] = grouped.tokens_log.sum() / grouped.tokens_log_full.sum()
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
    try:
        drawn.append(latency(records, out))
    except Missing as lack:
        lacks.append(str(lack))
    if not drawn:
        raise Missing("; ".join(dict.fromkeys(lacks)) or "no runs with step rows")
    return drawn + [Drawn(NAME, "Steps of a run", "", [], lack=lack) for lack in dict.fromkeys(lacks)]


def _name(run: Path) -> str:
    return f"{run.parent.parent.parent.name}-{run.parent.parent.name}-{run.parent.name}-{run.name}"


def drift(records: Records, run: Path, table: pd.DataFrame, out: Path) -> Drawn:
    figure, panels = plt.subplots(2, 2, figsize=(style.WIDTH, 3.6), sharex=True, layout="constrained")
    labels = {"hit_rate": "hit rate", "rho_bytes": "rho_bytes", "chain_mean": "mean chain depth", "rho_log": "rho_log"}
    for axes, (column, label) in zip(panels.flat, labels.items(), strict=True):
        for i, (text, part) in enumerate(table.groupby("text")):
            axes.plot(part["first"] + _WINDOW / 2, part[column], label=text, **style.look(i) | {"markersize": 2.5})
        axes.set_ylabel(label)
        axes.set_ylim(0, None if column == "chain_mean" else 1.03)
    for axes in panels[1]:
        axes.set_xlabel("generated tokens")
    what = f"{_said(run)}: MAC's texts of more than {_LONG:,} tokens, a point per {_WINDOW} steps, a line per text, so no intervals. "
    what += "Nothing is matched before min_context tokens are visible (2,048 unless a run says otherwise)"
    return style.save(figure, out, f"drift-{_name(run)}", "Drift over long generations", style.made([records.source(run)], what), "", panels[0][0])


def _said(run: Path, *more: str) -> str:
    """For readers; where several runs are of the same kind, their hashes tell them apart, and ``more``."""
    told = ", ".join([run.name.rpartition("-")[2], *filter(None, more)])
    return f"{run.parent.parent.name}, {run.parent.parent.parent.name}, ctx {style.tokens(int(run.parent.name))} ({told})"


def latencies(records: Records) -> tuple[pd.DataFrame, list[Source]]:
    """Quantiles of the latency of a step in ms, by run and method, of texts of more than _LONG tokens, or of all where none is so long.

    ``n``: steps. Requests of a batch share a step and its very latency, which then counts once; ``batch``: the most that did, of ``texts``.
    A GPU's runs where there are any. Variants of a grid or budget are left out. Runs of short answers are often made by processes that share a
    card, and then their times say nothing of a method.
    """
    found, rows, used = [], [], []
    for run in records.runs:
        try:
            found.append((records.source(run), records.table(run, "steps", [*KEY, "step", "latency_ms"])))
        except Missing as lack:
            records.damaged.add(str(lack))
    found = [pair for pair in found if "NVIDIA" in pair[0].device] or found
    found = [pair for pair in found if pair[1].step.max() >= _LONG] or found
    for source, steps in found:
        for method, part in steps[steps.variant == ""].groupby("method"):
            shared = part.groupby(["step", "latency_ms"]).size()
            latency_ms = shared.index.get_level_values("latency_ms")
            quantiles = dict(zip(("low", "middle", "high", "tail"), np.percentile(latency_ms, [5, 50, 95, 99]), strict=True))
            counts = {"n": len(shared), "batch": shared.max(), "texts": part.groupby(["subtask", "example_id"]).ngroups}
            rows.append({"run": _said(source.path, source.machine, source.apart), "method": method, **counts, **quantiles})
            used.append(source)
    if not rows:
        raise Missing("no run has step rows")
    return pd.DataFrame(rows[:_ROWS]), list({s.path: s for s in used[:_ROWS]}.values())


def latency(records: Records, out: Path) -> Drawn:
    """Median, 5th to 95th percentile and 99th percentile of the latency of a step, by run and method."""
    found, sources = latencies(records)
    rows = found.to_dict("records")
    figure, axes = plt.subplots(figsize=(style.WIDTH, 0.5 + 0.17 * len(rows)), layout="constrained")
    looks = style.methods(found.method)
    for i, row in enumerate(rows):
        colour = looks[row["method"]]["color"]
        axes.plot([row["low"], row["high"]], [i, i], color=colour, linewidth=3.5, alpha=0.35, solid_capstyle="butt", label="" if i else "5% to 95%")
        axes.plot(row["middle"], i, marker="o", linestyle="none", color=colour, label="" if i else "median")
        axes.plot(row["tail"], i, marker="|", linestyle="none", color=colour, markersize=7, label="" if i else "99%")
    axes.set_yticks(range(len(rows)), [f"{row['run']}: {row['method']}, {row['n']:,} steps" for row in rows], fontsize=6.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms per decode step of a batch")
    counted = "; ".join((found.texts.astype(str) + " texts in batches of " + found.batch.astype(str)).unique())
    what = f"Until the tokens are on the host; a step of a batch counts once ({counted}). Runs with texts of over {_LONG:,} tokens, where there "
    what += "are such: those of short answers often share a card. Without budgets and grids"
    return style.save(figure, out, "token_latency", "Latency of single tokens", style.made(sources, what), "", axes)
