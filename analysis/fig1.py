"""Fig 1: score against KV bytes read, all methods at equal measured traffic, and their paired differences to full attention.

One picture per run. Left: score against bytes. Right: a row per method variant; its marker is the legend of the left side, so that no
label ever lies on another.
"""

import math
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from analysis import style
from analysis.load import compares, guesses, swept
from analysis.records import Missing, Records, Source
from analysis.style import Drawn
from macbench.summary import REFERENCE

NAME = "fig1"
TITLE = "Fig 1: accuracy against KV bytes"
PAPER = "MAC at or above full attention at 1% of the reads (second-hand)."
_ROW = 0.155  # inches per method variant


def make(records: Records, out: Path) -> list[Drawn]:
    """A picture per run that has a method, most variants first, then shorter contexts; what is wrong with a run is told in ``lack`` of its Drawn."""
    if not records.runs:
        raise Missing("no runs of ruler, longbench_v2 or longgenbench; python -m macbench.run +experiment=fig1 scale=cpu makes one")
    drawn = []
    for run in records.runs:
        name = "-".join([NAME, *run.parts[-4:]])
        try:
            frame, rows = records.samples(run), records.headline(run)
            if compares(frame) and not swept(frame):
                drawn.append((-len(rows), *run.parts[-4:-2], frame.ctx.iloc[0], picture(frame, rows, records.source(run), name, out, guesses(run))))
        except Missing as lack:
            drawn.append((0, *run.parts[-4:-2], 0, Drawn(name, TITLE, "", [], lack=str(lack))))
    if not drawn:
        raise Missing("no run compares methods, sweeps apart; python -m macbench.run +experiment=fig1 scale=cpu makes one")
    return [item for *_, item in sorted(drawn, key=lambda made: made[:-1])]


def picture(frame: pd.DataFrame, rows: pd.DataFrame, source: Source, name: str, out: Path, lines: dict[str, float] | None = None) -> Drawn:
    """One figure from the sample rows of a run and its headline rows. ``lines``: chance level and the like, score by name."""
    rows = in_order(rows)
    styles = style.methods(rows.method)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, max(2.6, 0.6 + _ROW * len(rows))), layout="constrained", width_ratios=(1.1, 1))
    scores(left, rows, styles, lines or {})
    differences(right, rows, styles)
    first = frame.iloc[0]
    names, examples = list(dict.fromkeys(frame.subtask)), frame.groupby(["subtask", "example_id"]).ngroups
    subtasks = source.part(names) or (", ".join(names) if len(names) < 5 else f"{len(names)} subtasks")
    what = f"{first.model}, ctx {style.tokens(first.ctx)}: {examples} examples of {subtasks}; {len(rows)} method variants"
    made = style.made([source], f"{what}, {int(frame.decode_steps.sum()):,} decode steps")
    title = ", ".join(filter(None, [TITLE, first.task, first.model, style.tokens(first.ctx), source.apart, source.machine]))
    spread = "" if rows.difference_low.notna().any() or REFERENCE not in set(rows.method) else " One example per subtask gives no interval."
    aside = np.abs(side_by_side(rows.rho_bytes) / rows.rho_bytes - 1).max()
    beside = f"; on the left equal ones are drawn side by side, up to {math.ceil(100 * aside)}% off" if aside > 0.005 else ""
    text = f"{made} In brackets: measured rho_bytes{beside}.{spread}{untold(rows, lines or {})}"
    return style.save(figure, out, name, title, text, PAPER)


def untold(rows: pd.DataFrame, lines: dict[str, float]) -> str:
    """Sentences about what the scores cannot tell, and what else is known of the methods then; '' where they can."""
    full, others = rows[rows.method == REFERENCE], rows[rows.method != REFERENCE]
    said = ""
    if not rows.score.any():
        said += " No answer is right, full attention's no more than others': these scores tell nothing about a method."
    elif len(full) and (full.score - 2 * full.score_se.fillna(0)).item() <= lines.get("chance", -1.0):
        said += " Full attention is not above chance: these scores tell nothing about a method."
    if len(full) and len(others) and not others[["wins", "losses"]].any(axis=None):
        said += " No example's score differs from full attention's, so that the intervals have no width."
    if said and others.top1_agreement.notna().any():
        shares = (f"{named(r.method, r.variant)} {100 * r.top1_agreement:.1f}%" for r in others.itertuples() if pd.notna(r.top1_agreement))
        said += f" Next tokens along full attention's text that agree with it: {', '.join(shares)}."
    return said


def named(method: str, variant: str) -> str:
    """A method variant for readers: its share of the bytes first, then what that came to for its own knob (which may be called budget, too)."""
    return re.sub(r"^(\S+) budget=(\S+) (.+)", r"\1 at \2: \3", f"{method} {variant}".strip())


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Full attention first, then methods by their mean score; variants of a method by the bytes they read."""
    mean = rows.groupby("method").score.transform("mean").where(rows.method != REFERENCE, np.inf)
    rows = rows.assign(_mean=mean).sort_values(["_mean", "method", "rho_bytes"], ascending=[False, True, True], kind="stable")
    return rows.reset_index(drop=True)


def scores(axes: Axes, rows: pd.DataFrame, styles: dict, lines: dict[str, float]) -> None:
    rows = rows.assign(x=side_by_side(rows.rho_bytes))
    for method, group in rows.groupby("method", sort=False):
        bars = {"elinewidth": 0.7, "capsize": 1.5, "linewidth": 0.7, "markersize": 5}
        axes.errorbar(group.x, group.score, yerr=group.score_se.fillna(0), alpha=0.85, **styles[method], **bars)
    full = rows[rows.method == REFERENCE]
    if len(full):
        axes.axhline(full.score.iloc[0], color=style.BLACK, linewidth=0.7, linestyle=(0, (5, 4)), zorder=0)
    for label, score in lines.items():
        axes.axhline(score, color=style.GREY, linewidth=0.8, linestyle=":", zorder=0)
        axes.annotate(label, (0.01, score), xycoords=("axes fraction", "data"), xytext=(0, 1.5), textcoords="offset points", fontsize=7, color="0.35")
    axes.set_xscale("log")
    axes.set_xlim(0.9 * rows.x.min(), max(1.1, 1.1 * rows.x.max()))
    decade = rows.x.max() / rows.x.min()  # the less there is of one, the more of its digits have room
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decade > 8 else (1, 2, 3, 5, 7) if decade > 2.5 else range(1, 10)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    spread = rows.score_se.fillna(0)
    low, high = min([*(rows.score - spread), *lines.values()]), max([*(rows.score + spread), *lines.values()])
    margin = 0.06 * (high - low) + 0.02
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("KV bytes read / full attention's (rho_bytes)")
    axes.set_ylabel("score, ± one standard error")


def side_by_side(rho: pd.Series) -> pd.Series:
    """Where points are drawn: those of nearly the same ratio next to each other, in the order of the rows, not quite 1% of the axis apart."""
    step = 0.008 * np.log(1.3 * max(1.0, rho.max()) / rho.min())
    drawn = np.log(rho.astype(float))
    left = drawn.sort_values()
    while len(left):
        near = left[left <= left.iloc[0] + np.log(1.04)].index
        places = np.arange(len(near)) - (len(near) - 1) / 2
        drawn[near.sort_values()] = drawn[near].mean() + step * places
        left = left.drop(near)
    return np.exp(drawn)


def differences(axes: Axes, rows: pd.DataFrame, styles: dict) -> None:
    """A row per variant. Without full attention in the run there is nothing to subtract, and the scores themselves are shown."""
    paired = rows.difference.notna().any()
    for place, row in enumerate(rows.itertuples()):
        look = styles[row.method] | {"markersize": 5, "linestyle": "none"}
        if not paired:
            axes.errorbar(row.score, place, xerr=np.nan_to_num(row.score_se), elinewidth=1, capsize=2, **look)
            continue
        centre = 0.0 if row.method == REFERENCE else row.difference
        axes.plot([row.difference_low, row.difference_high], [place, place], color=look["color"], linewidth=1.2)
        axes.plot([centre], [place], **look)
    if paired:
        axes.axvline(0, color=style.BLACK, linewidth=0.7, linestyle=(0, (5, 4)), zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_yticks(range(len(rows)), [f"{named(row.method, row.variant)} ({row.rho_bytes:.3f})" for row in rows.itertuples()], fontsize=6.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.yaxis.tick_right()
    for label, method in zip(axes.get_yticklabels(), rows.method, strict=True):
        label.set_fontweight("bold" if method == "mac" else "normal")
    axes.set_xlabel("difference to full attention, 95% interval" if paired else "score, ± one standard error")
    axes.grid(visible=False, axis="y")
