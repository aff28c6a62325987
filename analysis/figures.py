"""Draw what the records hold: ``python -m analysis.figures [RUNS_DIR ...]`` (``make figures``) writes figures/*.png and *.pdf.

One picture per run. Left: score against KV bytes read. Right: a row per method variant with its paired difference to full attention; its
marker is the legend of the left side, so that no label ever lies on another.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis.load import guesses, run_folders, samples
from macbench.summary import REFERENCE, headline, summarise

OUT = Path("figures")
# Okabe and Ito's palette without its yellow, told apart by colour-blind readers. Every method has a marker of its own, for print without colour.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = "osD^vP*X<>phd8H"
BLACK = "#000000"
ROW = 0.17  # inches per method variant


def accuracy_against_bytes(frame: pd.DataFrame, name: str, lines: dict[str, float] | None = None) -> list[Path]:
    """One figure from the sample rows of a run; returns the files. ``lines``: chance level and the like, score by name."""
    rows = in_order(headline(summarise(frame)))
    styles = style(rows)
    height = max(3.2, 1.3 + ROW * len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, height), layout="constrained", width_ratios=(1.1, 1))
    scores(left, rows, styles, lines or {})
    differences(right, rows, styles)
    figure.suptitle(caption(frame, rows), fontsize=7.5, x=0.01, ha="left")
    files = [OUT / f"{name}.{kind}" for kind in ("png", "pdf")]
    for file in files:
        figure.savefig(file, dpi=200)
    plt.close(figure)
    return files


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Full attention first, then methods by their mean score; variants of a method by the bytes they read."""
    mean = rows.groupby("method").score.transform("mean").where(rows.method != REFERENCE, np.inf)
    rows = rows.assign(_mean=mean).sort_values(["_mean", "method", "rho_bytes"], ascending=[False, True, True], kind="stable")
    return rows.reset_index(drop=True)


def style(rows: pd.DataFrame) -> dict[str, dict]:
    """Colour and marker by method, whatever the scores are: by name."""
    names = sorted(set(rows.method) - {REFERENCE})
    looks = {name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)}
    return looks | {REFERENCE: {"color": BLACK, "marker": "o", "markerfacecolor": "white"}}


def scores(axes: Axes, rows: pd.DataFrame, styles: dict, lines: dict[str, float]) -> None:
    rows = rows.assign(x=side_by_side(rows.rho_bytes))
    for method, group in rows.groupby("method", sort=False):
        bars = {"elinewidth": 0.7, "capsize": 1.5, "linewidth": 0.7, "markersize": 5}
        axes.errorbar(group.x, group.score, yerr=group.score_se.fillna(0), alpha=0.85, **styles[method], **bars)
    full = rows[rows.method == REFERENCE]
    if len(full):
        axes.axhline(full.score.iloc[0], color=BLACK, linewidth=0.7, linestyle=(0, (5, 4)), zorder=0)
    for label, score in lines.items():
        axes.axhline(score, color="0.45", linewidth=0.8, linestyle=":", zorder=0)
        axes.annotate(label, (0.01, score), xycoords=("axes fraction", "data"), xytext=(0, 1.5), textcoords="offset points", fontsize=7, color="0.35")
    axes.set_xscale("log")
    axes.set_xlim(0.9 * rows.x.min(), max(1.1, 1.1 * rows.x.max()))
    # A range of less than a decade gets every digit.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if rows.x.max() > 8 * rows.x.min() else range(1, 10)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    spread = rows.score_se.fillna(0)
    low, high = min([*(rows.score - spread), *lines.values()]), max([*(rows.score + spread), *lines.values()])
    margin = 0.06 * (high - low) + 0.02
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("KV bytes read / full attention's (rho_bytes)", fontsize=8)
    axes.set_ylabel("score, ± one standard error", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def side_by_side(rho: pd.Series) -> pd.Series:
    """Where points are drawn: those of nearly the same ratio next to each other, in the order of the rows, a hundredth of the axis apart."""
    step = 0.012 * np.log(1.3 * max(1.0, rho.max()) / rho.min())
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
        look = styles[row.method] | {"markersize": 5}
        if not paired:
            axes.errorbar(row.score, place, xerr=np.nan_to_num(row.score_se), elinewidth=1, capsize=2, **look)
            continue
        centre = 0.0 if row.method == REFERENCE else row.difference
        axes.plot([row.difference_low, row.difference_high], [place, place], color=look["color"], linewidth=1.2)
        axes.plot([centre], [place], linestyle="none", **look)
    if paired:
        axes.axvline(0, color=BLACK, linewidth=0.7, linestyle=(0, (5, 4)), zorder=0)
    names = [" ".join(filter(None, [row.method, row.variant])) for row in rows.itertuples()]
    axes.set_yticks(range(len(rows)), [f"{n} ({rho:.3f})" for n, rho in zip(names, rows.rho_bytes, strict=True)], fontsize=6.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.yaxis.tick_right()
    axes.set_xlabel("difference to full attention, 95% interval" if paired else "score, ± one standard error", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(alpha=0.3, axis="x")


def caption(frame: pd.DataFrame, rows: pd.DataFrame) -> str:
    first = frame.iloc[0]
    subtasks, examples = frame.subtask.nunique(), frame.groupby(["subtask", "example_id"]).ngroups
    run = (
        f"{first.task}, {first.model}, ctx {first.ctx}: {examples} examples of {subtasks} subtask{'s' * (subtasks > 1)}, {len(rows)} method variants"
    )
    made = f"{first.device}, commit {first.commit}, {int(frame.decode_steps.sum())} decode steps"
    return f"{run}\n{made}; in brackets: measured rho_bytes; equal ones stand side by side"


def main(roots: list[str]) -> int:
    folders = run_folders(*roots)
    if not folders:
        print(f"figures: no runs below {', '.join(roots)}", file=sys.stderr)
        return 2
    OUT.mkdir(exist_ok=True)
    for folder in folders:
        frame = samples(folder)
        if frame.empty or frame.rho_bytes.isna().all():
            print(f"figures: {folder} has no finished example with a decode step", file=sys.stderr)
            continue
        first = frame.iloc[0]
        files = accuracy_against_bytes(frame, f"{first.task}-{first.model}-{first.ctx}-{folder.name}", guesses(folder))
        print(*files)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["runs"]))
