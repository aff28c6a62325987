"""Fig 4: error of the attention output after amending one match, against the band width r."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import style
from analysis.fig2 import caption
from analysis.records import Records
from analysis.style import Drawn

NAME = "fig4"
TITLE = "Fig 4: output error after amending one match, against band width"
PAPER = "a band of 8 removes most of the error, 256 and more cannot be told from full attention (second-hand)."
_QUANTILES = {"p50": "median", "p99": "99th percentile"}


def numbers(records: Records) -> pd.DataFrame:
    """Mean over texts of quantiles of the relative error: tau, band, quantile, texts, count, mean, low, high; and ``rounding``."""
    frame = records.traced("amend", ["tau", "band", "count", "error_p50", "error_p99", "rounding_mean"])
    rows = []
    for (tau, band), part in frame.groupby(["tau", "band"]):
        for name in _QUANTILES:
            mean, low, high = style.interval(part[f"error_{name}"])
            key = {"tau": tau, "band": band, "quantile": name, "texts": len(part), "count": part["count"].sum()}
            rows.append(key | {"mean": mean, "low": low, "high": high, "rounding": part.rounding_mean.mean()})
    return pd.DataFrame(rows)


def make(records: Records, out: Path) -> list[Drawn]:
    table = numbers(records)
    figure, panels = plt.subplots(1, 2, figsize=(style.WIDTH, 2.8), sharey=True, layout="constrained")
    taus, bands = sorted(table.tau.unique()), sorted(table.band.unique())
    for axes, (quantile, label) in zip(panels, _QUANTILES.items(), strict=True):
        for tau, looks in zip(taus, style.shades(len(taus)), strict=True):
            part = table[(table.tau == tau) & (table["quantile"] == quantile)]
            style.line(
                axes, [bands.index(b) for b in part.band], zip(part["mean"], part.low, part.high, strict=True), label=f"tau = {tau:g}", **looks
            )
        rounding = table.rounding.mean()
        axes.axhline(rounding, color=style.GREY, linewidth=0.8, linestyle=":")
        place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 2), "textcoords": "offset points", "ha": "right", "fontsize": 6.5}
        axes.annotate("full attention's output rounded to bf16", (0.99, rounding), **place)
        axes.set_yscale("log")
        axes.set_xticks(range(len(bands)), [f"{b:g}" for b in bands])
        axes.set_xlabel("band width r in tokens")
        axes.set_title(f"{label} over heads, layers and steps")
    panels[0].set_ylabel("relative L2 error of the output")
    more = (
        f"{table[table.band == bands[0]]['count'].max():,} matched pairs at the largest tau; each match has an exact state; 95% interval over texts."
    )
    return [style.save(figure, out, NAME, TITLE, caption(records, more), PAPER, panels[0])]
