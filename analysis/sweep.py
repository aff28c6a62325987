"""Beyond the paper: heat maps of score, hit rate and bytes over tau, window and band, all variants on the same prefill of every example."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import style
from analysis.load import swept
from analysis.records import Missing, Records
from analysis.style import Drawn

NAME = "sweep"
TITLE = "MAC over tau, window and band"
_SHOWN = {"difference": "score - full attention's", "hit_rate": "hit rate", "rho_bytes": "rho_bytes"}


def numbers(records: Records, run: Path) -> pd.DataFrame | None:
    """Headline rows of MAC with columns tau, window, band and ``apart``: the interval of the difference leaves out 0. None of another run."""
    if not swept(records.samples(run)):
        return None
    rows = records.headline(run)
    rows = rows[rows.method == "mac"]
    knobs = pd.DataFrame([dict(part.split("=") for part in label.split()) for label in rows.variant], index=rows.index).astype(float)
    rows = rows.assign(apart=(rows.difference_low > 0) | (rows.difference_high < 0))
    return rows.join(knobs) if {"tau", "window"} <= set(knobs) else None


def make(records: Records, out: Path) -> list[Drawn]:
    drawn, lacks = [], []
    for run in records.runs:
        try:
            table = numbers(records, run)
        except Missing as lack:
            lacks.append(str(lack))
            continue
        if table is not None:
            drawn.append(picture(records, run, table, out))
    if not drawn:
        raise Missing("; ".join([*lacks, "no run is a grid over tau and window; make sweep makes one"]))
    return drawn


def picture(records: Records, run: Path, table: pd.DataFrame, out: Path) -> Drawn:
    bands = sorted(table.band.unique()) if "band" in table else [np.nan]
    figure, panels = plt.subplots(len(bands), 3, figsize=(style.WIDTH, 0.5 + 1.45 * len(bands)), layout="constrained", squeeze=False)
    for row, band in zip(panels, bands, strict=True):
        part = table if np.isnan(band) else table[table.band == band]
        apart = part.pivot(index="tau", columns="window", values="apart")
        for axes, (column, label) in zip(row, _SHOWN.items(), strict=True):
            grid = part.pivot(index="tau", columns="window", values=column)
            high = max(0.01, np.nanmax(np.abs(table[column])))
            colours = (
                {"vmin": -high, "vmax": high, "cmap": "PuOr"} if column == "difference" else {"vmin": 0, "vmax": max(1, high), "cmap": style.MAP}
            )
            image = axes.imshow(grid, aspect="auto", origin="lower", **colours)
            for (i, j), value in np.ndenumerate(grid.to_numpy()):
                dark = abs(value) > 0.6 * high if column == "difference" else value < 0.5 * colours["vmax"]
                axes.text(
                    j,
                    i,
                    f"{value:+.3f}{'*' * bool(apart.iloc[i, j])}" if column == "difference" else f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="white" if dark else "black",
                )
            axes.set_xticks(range(grid.shape[1]), [f"{w:g}" for w in grid.columns])
            axes.set_yticks(range(grid.shape[0]), [f"{t:g}" for t in grid.index])
            axes.grid(False)
            axes.set_title(label + ("" if np.isnan(band) else f", band {band:g}"))
            figure.colorbar(image, ax=axes, pad=0.02)
        row[0].set_ylabel("tau")
    for axes in panels[-1]:
        axes.set_xlabel("window K")
    first = table.iloc[0]
    half = ((table.difference_high - table.difference_low) / 2).max()
    spread = f"Paired 95% intervals of the differences reach up to ±{half:.3f}; * the interval leaves out 0."
    spread = "One example per subtask gives no interval." if np.isnan(half) else spread
    task, model, ctx = run.parts[-4:-1]
    full = records.headline(run).query("method == 'full'").score
    frame = records.samples(run)
    what = f"{model}, {task}, ctx {style.tokens(int(ctx))}: {first.examples:.0f} examples of {', '.join(dict.fromkeys(frame.subtask))} per variant, "
    what += f"{int(frame.decode_steps.sum()):,} decode steps of all {len(table)} variants and full attention"
    what += f", which scores {full.iloc[0]:.3f}" if len(full) else ""
    text = f"{style.made([records.source(run)], what)} {spread}"
    return style.save(figure, out, f"{NAME}-{task}-{model}-{ctx}-{run.name}", TITLE, text, "")
