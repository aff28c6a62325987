"""Beyond the paper: error of the output against how many reuses it is built on."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import style
from analysis.fig2 import caption
from analysis.records import Records
from analysis.style import Drawn

NAME = "chain_depth"
TITLE = "Error of the output against chain depth of reuse"
_QUANTILES = {"p50": "median", "p90": "90th percentile", "p99": "99th percentile"}


def numbers(records: Records) -> pd.DataFrame:
    """Mean over texts of quantiles of the relative error: depth_low, depth_high, quantile, texts, count, mean, low, high. Misses left out."""
    frame = records.traced("chains", ["depth_low", "depth_high", "count", *(f"error_{q}" for q in _QUANTILES)])
    rows = []
    for (low_depth, high_depth), part in frame[frame.depth_low > 0].groupby(["depth_low", "depth_high"]):
        for name in _QUANTILES:
            mean, low, high = style.interval(part[f"error_{name}"])
            key = {"depth_low": low_depth, "depth_high": high_depth, "quantile": name, "texts": len(part), "count": part["count"].sum()}
            rows.append(key | {"mean": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def make(records: Records, out: Path) -> list[Drawn]:
    table = numbers(records)
    figure, (axes, below) = plt.subplots(2, 1, figsize=(0.7 * style.WIDTH, 3.4), sharex=True, layout="constrained", height_ratios=(3, 1))
    classes = table.drop_duplicates("depth_low")
    for i, (name, label) in enumerate(_QUANTILES.items()):
        part = table[table["quantile"] == name]
        style.line(axes, range(len(part)), zip(part["mean"], part.low, part.high, strict=True), label=label, **style.look(i))
    axes.set_yscale("log")
    axes.set_ylabel("relative L2 error")
    below.bar(range(len(classes)), classes["count"] / classes["count"].sum(), color=style.COLOURS[0], width=0.6)
    labels = [(f"{c.depth_low}" if c.depth_low == c.depth_high else f"{c.depth_low}-{c.depth_high}") + f"\n({c.texts})" for c in classes.itertuples()]
    below.set_xticks(range(len(classes)), labels)
    below.set_xlabel("reuses that an output is built on (texts that have such outputs)")
    below.set_ylabel("share of hits")
    method = records.trace.facts["method"]
    more = f"tau {method['tau']:g}, no bound on chains; queries are full attention's, so errors do not feed back; 95% interval over texts, "
    more += "none where there is one; classes differ in their texts."
    return [style.save(figure, out, NAME, TITLE, caption(records, more), "does not bound chains and reports nothing about their depth.", axes)]
