"""Fig 6: speed-up of the attention phase over full attention, against context, batch and hit rate; and the hit rate at which MAC breaks even."""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import style
from analysis.records import Missing, Records, Source
from analysis.style import Drawn

NAME = "fig6"
TITLE = "Fig 6: attention speed-up over full attention against context, batch and hit rate"
PAPER = "at least 14.3x and up to about 46x, the latter at 256K, batch 32 and 99% skipped (second-hand)."
COLUMNS = [
    *("method", "backend", "mode", "q_heads", "kv_heads", "batch", "ctx", "head_dim", "dtype", "window", "hit_rate", "hit_rate_measured", "misses"),
    *("time_ms", "time_p10_ms", "time_p90_ms", "kv_tokens", "bytes_read"),
]
_CELL = ["file", "q_heads", "kv_heads", "batch", "ctx", "mode"]


def full_times(frame: pd.DataFrame) -> pd.Series:
    """ms of full attention by cell, the fastest of FlashInfer's kernels; where none ran, of our own."""
    full = frame[frame.method == "full"]
    theirs = full[full.backend.str.startswith("flashinfer")]
    return theirs.groupby(_CELL).time_ms.min().combine_first(full.groupby(_CELL).time_ms.min())


def numbers(records: Records) -> tuple[pd.DataFrame, list[Source]]:
    """Rows of MAC at 32/8 heads of the file that has most of them, with ``speedup`` (and low, high from the 10th and 90th percentile of time).

    ``peer``: whose full attention it is that they are compared with.
    """
    frame, sources = records.benchmark("attention", COLUMNS)
    frame = frame[frame["mode"].isin(["graph", "cpu"])]
    mac = frame[(frame.method == "mac") & frame.misses.isin(["clustered", "none"])]
    if mac.empty:
        raise Missing("no rows of MAC in the records of task=attention; python -m macbench.run +experiment=fig6 scale=gpu measures them")
    mac = mac.join(full_times(frame).rename("full_ms"), on=_CELL).dropna(subset="full_ms")
    mac = mac[(mac.q_heads == 32) & (mac.kv_heads == 8)]
    files = mac.groupby("file").size().sort_values(kind="stable")
    if files.empty:
        raise Missing("no rows of MAC at 32/8 heads beside full attention; python -m macbench.run +experiment=fig6 scale=gpu measures them")
    mac = mac[mac.file == files.index[-1]]
    mac = mac[mac.window == mac.window.min()]
    backends = set(frame[(frame.file == files.index[-1]) & (frame.method == "full")].backend)
    ratios = {"speedup": mac.full_ms / mac.time_ms, "low": mac.full_ms / mac.time_p90_ms, "high": mac.full_ms / mac.time_p10_ms}
    return mac.assign(**ratios, peer=_peer(backends)), [sources[files.index[-1]]]


def _peer(backends: set[str]) -> str:
    """Whose full attention it is, of the kernels that ran."""
    theirs = sorted(name for name in backends if name.startswith("flashinfer"))
    if not theirs:
        return "our own full attention, since FlashInfer did not run"
    return f"FlashInfer's {theirs[0]}, its one kernel that ran" if len(theirs) == 1 else f"the faster of FlashInfer's {' and '.join(theirs)}"


def break_even(table: pd.DataFrame) -> pd.DataFrame:
    """Hit rate (of query heads, as measured) at which MAC takes as long as full attention: batch, ctx, rate; low and high of the percentiles' times.

    Linear in log speed-up between the measured rates. 0 if MAC is never slower; NaN if it is slower at every hit rate measured, or faster
    at the lowest of them which is not 0. ``low`` takes the 10th percentile of MAC's time at every rate, ``high`` the 90th.
    """
    rows = []
    for (batch, ctx), part in table.groupby(["batch", "ctx"]):
        part = part.sort_values("hit_rate_measured")
        found = {name: _crossing(part.hit_rate_measured.to_numpy(), part[of]) for name, of in (("rate", "speedup"), ("low", "high"), ("high", "low"))}
        rows.append({"batch": batch, "ctx": ctx} | found)
    return pd.DataFrame(rows)


def _crossing(rate: np.ndarray, speedup: pd.Series) -> float:
    """Where the speed-up first reaches 1."""
    gain = np.log(speedup.to_numpy())
    if gain[0] >= 0:
        return 0.0 if rate[0] == 0 else np.nan
    if not (gain >= 0).any():
        return np.nan
    i = int(np.argmax(gain >= 0))
    return float(np.interp(0, gain[i - 1 : i + 1], rate[i - 1 : i + 1]))


def _said(table: pd.DataFrame, sources: list[Source]) -> str:
    first = table.iloc[0]
    return style.made(
        sources,
        f"One attention call of a decode step, {first.q_heads}/{first.kv_heads} heads of {first.head_dim}, {first['dtype']}, ring {first.window:g}; "
        f"hit rates are synthetic, whole groups miss; against {first.peer}",
    )


def _rounded(table: pd.DataFrame) -> str:
    """What the hit rates come to at the smallest batch, whose few groups can only hit or miss as a whole."""
    few = table[table.batch == table.batch.min()].drop_duplicates("hit_rate").sort_values("hit_rate")
    groups = int(few.kv_heads.iloc[0] * few.batch.iloc[0])
    missing = [f"{math.ceil((1 - r.hit_rate_measured) * groups - 1e-9)} at {r.hit_rate:g}" for r in few.itertuples() if r.hit_rate > 0]
    return f"Groups that miss at batch {few.batch.iloc[0]}, of {groups}: {', '.join(missing)}."


def make(records: Records, out: Path) -> list[Drawn]:
    table, sources = numbers(records)
    batches, rates = sorted(table.batch.unique()), [r for r in sorted(table.hit_rate.unique()) if r > 0]
    figure, panels = plt.subplots(1, len(batches), figsize=(style.WIDTH, 2.7), sharey=True, layout="constrained", squeeze=False)
    for axes, batch in zip(panels[0], batches, strict=True):
        for rate, looks in zip(rates, style.shades(len(rates)), strict=True):
            part = table[(table.batch == batch) & (table.hit_rate == rate)].sort_values("ctx")
            bars = [part.speedup - part.low, part.high - part.speedup]
            axes.errorbar(part.ctx, part.speedup, yerr=np.abs(bars), label=f"{rate:g}", elinewidth=0.8, capsize=1.8, **looks)
        axes.axhline(1, color=style.BLACK, linewidth=0.8, linestyle=(0, (5, 4)))
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}x")
        style.doubling(axes, sorted(table.ctx.unique()))
        axes.set_title(f"batch {batch}")
        axes.set_xlabel("context")
    panels[0][0].set_ylabel("speed-up over full attention")
    top = table.loc[table.speedup.idxmax()]
    rate = f"hit rate {top.hit_rate:g} ({top.hit_rate_measured:.3f} measured)"
    most = f"Highest: {top.speedup:.1f}x at {style.tokens(top.ctx)}, batch {top.batch}, {rate}."
    text = f"{_said(table, sources)} {_rounded(table)} {most} Bars: 10th to 90th percentile of rounds."
    return [style.save(figure, out, NAME, TITLE, text, PAPER, panels[0][0], "hit rate"), break_even_map(table, sources, out)]


def _digits(rate: float) -> str:
    """Three decimals, as many crossings lie below 0.01; an exact 0 is MAC never being slower."""
    return "?" if np.isnan(rate) else "0" if rate == 0 else "< 0.001" if rate < 0.0005 else f"{rate:.3f}"


def break_even_map(table: pd.DataFrame, sources: list[Source], out: Path) -> Drawn:
    """Context x batch: the hit rate from which MAC is faster, with what the spread of its times makes of it."""
    found = break_even(table)
    grids = {name: found.pivot(index="batch", columns="ctx", values=name) for name in ("rate", "low", "high")}
    grid = grids["rate"]
    figure, axes = plt.subplots(figsize=(0.75 * style.WIDTH, 2.2), layout="constrained")
    image = axes.imshow(grid, vmin=0, vmax=1, cmap=style.MAP, aspect="auto", origin="lower")
    for (i, j), rate in np.ndenumerate(grid.to_numpy()):
        colour = "white" if rate < 0.5 else "black"
        axes.text(j, i + 0.13, _digits(rate), ha="center", va="center", color=colour)
        spread = f"[{_digits(grids['low'].iat[i, j])}, {_digits(grids['high'].iat[i, j])}]"
        axes.text(j, i - 0.2, spread, ha="center", va="center", color=colour, fontsize=6)
    axes.set_xticks(range(grid.shape[1]), [style.tokens(c) for c in grid.columns])
    axes.set_yticks(range(grid.shape[0]), grid.index)
    axes.grid(False)
    axes.set_xlabel("context")
    axes.set_ylabel("batch")
    figure.colorbar(image, ax=axes, label="break-even hit rate")
    none = table[table.hit_rate_measured == 0]
    at_none = ""
    if len(none):
        ratio = 1 / none.speedup
        at_none = f" Without a hit MAC is slower in {(ratio > 1).sum()} of {len(none)} cells: {ratio.min():.3f} to {ratio.max():.3f} times as long."
    text = f"{_said(table, sources)} MAC is faster above the rate shown, interpolated between measured ones (in brackets: of the 10th and the 90th "
    text += f"percentile of its times).{at_none} 0: not slower at any rate; ?: not between the measured rates."
    return style.save(figure, out, "break_even", "Hit rate at which MAC breaks even with full attention", text, "")
