"""Beyond the paper: the time of a step of every method's attention at one budget of bytes, beside the time that reading them takes."""

import re
from pathlib import Path

import pandas as pd

from analysis import style, table
from analysis.records import Missing, Records, Source
from analysis.style import Drawn

NAME = "methods"
TITLE = "Attention of one layer by every method at one budget of bytes"
PAPER = "Quest, RocketKV and Multipole are often slower than full attention end to end (tables 2 and 3, second-hand, no numbers)."
COLUMNS = [
    *("method", "knobs", "q_heads", "kv_heads", "head_dim", "batch", "ctx", "layers"),
    *("budget", "time_ms", "bytes_counted", "rho_bytes", "copy_bandwidth"),
]
_MEASURED = ("rho_bytes", "ms per layer", "/ full", "bytes / copy bandwidth, ms")


def numbers(records: Records) -> tuple[pd.DataFrame, list[Source]]:
    """Rows by file and time: ``over_full`` (time over full attention's in the same file), ``floor_ms`` (bytes over copy bandwidth), ``machine``.

    Of files that measure the same on the same machine, the newest counts.
    """
    frame, sources = records.benchmark("attention", COLUMNS, of_methods=True)
    frame = frame.assign(machine=[sources[i].machine for i in frame.file])
    cells = ["ctx", "batch"]
    full = frame[frame.method == "full"].set_index(["file", *cells]).time_ms.rename("full_ms")
    frame = frame.join(full, on=["file", *cells])
    # A method without a knob has no budget, and is measured as often as there are files.
    newest = frame.groupby(["machine", *cells, "method", "budget"], dropna=False).file.transform("max")
    frame = frame[frame.file == newest]
    used = sorted(frame.file.unique())
    sources, frame = [sources[i] for i in used], frame.assign(file=frame.file.map(used.index))
    floor = 1e3 * frame.bytes_counted / frame.copy_bandwidth
    return frame.assign(over_full=frame.time_ms / frame.full_ms, floor_ms=floor).sort_values(["file", "time_ms"], kind="stable"), sources


def make(records: Records, out: Path) -> list[Drawn]:
    try:
        found, sources = numbers(records)
    except Missing as lack:
        raise Missing(str(lack).replace("run task=attention", "attention methods FILE")) from lack
    rows = []
    for r in found.itertuples():
        row = {"machine": r.machine} if found.machine.nunique() > 1 else {}
        row |= {"method": r.method, "ctx": style.tokens(r.ctx), "batch": str(r.batch), "budget": "none" if pd.isna(r.budget) else f"{r.budget:g}"}
        row |= {"rho_bytes": f"{r.rho_bytes:.3f}", "ms per layer": f"{r.time_ms:.3f}", "/ full": f"{r.over_full:.2f}"}
        row |= {"bytes / copy bandwidth, ms": f"{r.floor_ms:.3f}", "note": ""}
        if pd.isna(r.time_ms):
            floor = re.search(r"must be at least (\S+) for", r.error)
            row |= dict.fromkeys(_MEASURED, table.MISSING) | {"note": f"floor {floor[1]}" if floor else r.error}
        elif abs(r.rho_bytes - r.budget) > 0.1 * r.budget:
            row["budget"] = "none"
        rows.append(row)
    first = found.iloc[0]
    what = (
        f"Random queries, keys and values, {first.q_heads}/{first.kv_heads} heads of {first.head_dim}, mean over {first.layers} layers of a captured "
        "step; no dense layers. A method that cannot read as little as the others has a budget of its own. Budget none: it has no knob and runs "
        "as it is; floor: the least ratio of bytes that it can read"
    )
    return [table.save(pd.DataFrame(rows), out, NAME, TITLE, style.made(sources, what), PAPER)]
