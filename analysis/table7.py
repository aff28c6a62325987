"""Table 7: memory of the rings against the KV cache."""

from pathlib import Path

import pandas as pd

from analysis import style, table
from analysis.records import Missing, Records, Source
from analysis.style import Drawn

NAME = "table7"
TITLE = "Table 7: memory of the rings against the KV cache"
PAPER = "about 5% of the KV cache at 128K with K = 1024 (second-hand)."
COLUMNS = ["model", "method", "ctx", "batch", "window", "steps", "kv_bytes", "state_bytes"]


def numbers(records: Records) -> tuple[pd.DataFrame, list[Source]]:
    """Allocated bytes of one request: model, ctx, window, kv_bytes, state_bytes, share."""
    frame, sources = records.benchmark("decode", COLUMNS)
    frame = frame[(frame.method == "mac") & (frame.state_bytes > 0)]
    if frame.empty:
        raise Missing("no row of MAC in the records of task=decode; python -m macbench.run +experiment=table7 scale=cpu measures them")
    used = [sources[i] for i in frame.file.unique()]
    per = frame.assign(kv_bytes=frame.kv_bytes / frame.batch, state_bytes=frame.state_bytes / frame.batch)
    rows = per.groupby(["model", "window", "ctx"], as_index=False)[["kv_bytes", "state_bytes"]].min()
    return rows.assign(share=rows.state_bytes / rows.kv_bytes), used


def make(records: Records, out: Path) -> list[Drawn]:
    found, sources = numbers(records)
    shown = pd.DataFrame(
        {
            "model": found.model.str.replace("random_", "") + found.model.str.contains("random").map({True: " (random weights)", False: ""}),
            "K": found.window.map("{:.0f}".format),
            "ctx": found.ctx.map(style.tokens),
            "KV cache, GB": (found.kv_bytes / 1e9).map("{:.2f}".format),
            "rings, GB": (found.state_bytes / 1e9).map("{:.3f}".format),
            "rings / KV cache": (100 * found.share).map("{:.1f}%".format),
        }
    )
    what = "Bytes allocated for one request: queries in the model's precision, states in float32; KV cache with room for the timed steps"
    return [table.save(shown, out, NAME, TITLE, style.made(sources, what), PAPER)]
