"""Fig 5: acceptance (hit rate) per layer against tau and the ring size K; and per layer and head."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import style
from analysis.fig2 import caption
from analysis.records import Records
from analysis.style import Drawn

NAME = "fig5"
TITLE = "Fig 5: acceptance per layer against tau and ring size"
PAPER = "shallow layers accept more; gains flatten beyond K = 2048 (second-hand)."


def rates(records: Records, keys: list[str], **only: float) -> pd.DataFrame:
    """Hits / steps of each text by ``keys``, then mean over texts with its interval: keys, texts, mean, low, high.

    ``only``: the value that a column must have.
    """
    frame = records.traced("acceptance", ["layer", "head", "window", "tau", "steps", "hits"])
    for column, value in only.items():
        frame = frame[frame[column] == value]
    sums = frame.groupby([*keys, "unit"])[["hits", "steps"]].sum()
    by_text = (sums.hits / sums.steps).rename("rate").reset_index()
    rows = [
        dict(zip(keys, key, strict=True)) | dict(zip(("mean", "low", "high"), style.interval(part.rate), strict=True)) | {"texts": len(part)}
        for key, part in by_text.groupby(keys)
    ]
    return pd.DataFrame(rows)


def make(records: Records, out: Path) -> list[Drawn]:
    method = records.trace.facts["method"]
    by_window = rates(records, ["tau", "window"])
    taus, windows = sorted(by_window.tau.unique()), sorted(by_window.window.unique())
    window = min(windows, key=lambda w: abs(w - method["window"]))
    by_layer = rates(records, ["tau", "layer"], window=window)
    figure, (left, right) = plt.subplots(1, 2, figsize=(style.WIDTH, 2.6), sharey=True, layout="constrained", width_ratios=(1.5, 1))
    for i, (tau, looks) in enumerate(zip(taus, style.shades(len(taus)), strict=True)):
        part = by_layer[by_layer.tau == tau]
        left.plot(part.layer, part["mean"], label=f"tau = {tau:g}", **looks | {"markersize": 2.5})
        left.fill_between(part.layer, part.low, part.high, color=looks["color"], alpha=0.12, linewidth=0)
        part = by_window[by_window.tau == tau]
        aside = 1.05 ** (i - (len(taus) - 1) / 2)  # so that bars do not lie on each other
        style.line(right, part.window * aside, zip(part["mean"], part.low, part.high, strict=True), **looks)
    left.set_title(f"by layer, K = {window}")
    left.set_xlabel("layer")
    left.set_ylabel("share of (head, step) that hits")
    left.set_ylim(0, 1.02)
    style.doubling(right, windows)
    right.set_title("all layers")
    right.set_xlabel("ring size K")
    text = caption(records, "Bands and bars: 95% interval over texts.")
    return [style.save(figure, out, NAME, TITLE, text, PAPER, left), heat(records, out, window)]


def by_head(records: Records, window: int) -> pd.DataFrame:
    """Mean over texts of hits / steps: tau, layer, head, mean."""
    frame = records.traced("acceptance", ["layer", "head", "window", "tau", "steps", "hits"])
    frame = frame[frame.window == window].assign(mean=lambda f: f.hits / f.steps)
    return frame.groupby(["tau", "layer", "head"])["mean"].mean().reset_index()


def heat(records: Records, out: Path, window: int) -> Drawn:
    """Hit rate per layer and head, a panel for each of three tau."""
    table = by_head(records, window)
    chosen = [t for t in sorted(table.tau.unique()) if 0.2 < t < 0.7][:3]
    figure, panels = plt.subplots(1, len(chosen), figsize=(style.WIDTH, 3.4), sharey=True, layout="constrained", squeeze=False)
    for axes, tau in zip(panels[0], chosen, strict=True):
        grid = table[table.tau == tau].pivot(index="layer", columns="head", values="mean")
        image = axes.imshow(grid, vmin=0, vmax=1, cmap=style.MAP, aspect="auto", origin="lower")
        axes.set_xticks(range(grid.shape[1]), grid.columns)
        axes.set_title(f"tau = {tau:g}")
        axes.set_xlabel("query head")
        axes.grid(False)
    panels[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=panels[0], label="share of steps that hit", pad=0.01)
    title = f"Hit rate per layer and head, K = {window}"
    return style.save(figure, out, "heat_map", title, caption(records, "Mean over texts. Heads of a GQA group stand side by side."), "")
