"""Table 6: how far apart the heads of a GQA group match."""

from pathlib import Path

import pandas as pd

from analysis import table
from analysis.fig2 import caption
from analysis.records import Records
from analysis.style import Drawn

NAME = "table6"
TITLE = "Table 6: spread of match positions inside a GQA group, tokens"
PAPER = "usually small, with outliers (second-hand, no numbers)."
_SPREADS = ("spread_p50", "spread_p90", "spread_p99", "spread_max")


def numbers(records: Records) -> pd.DataFrame:
    """By task: shares of (group, step), and means over (text, layer, group) of the spread's quantiles weighted by steps in which all heads hit."""
    columns = ["layer", "kv_head", "steps", "hit_all", "hit_none", "read_own", "read_group", *_SPREADS]
    frame = records.traced("groups", columns)
    rows = []
    for task, part in [*frame.groupby("task"), ("all", frame)]:
        some = part[part.hit_all > 0]
        weight = some.hit_all / some.hit_all.sum()
        row = {"task": task, "texts": part.unit.nunique(), "groups x steps": int(part.steps.sum())}
        row |= {"all heads hit": part.hit_all.sum() / part.steps.sum(), "no head hits": part.hit_none.sum() / part.steps.sum()}
        row |= {name: (some[name] * weight).sum() for name in _SPREADS[:3]} | {"spread_max": some.spread_max.max()}
        rows.append(row | {"group reads / head reads": (some.read_group * weight).sum() / (some.read_own * weight).sum()})
    return pd.DataFrame(rows)


def make(records: Records, out: Path) -> list[Drawn]:
    found = numbers(records)
    formats = {"groups x steps": "{:,.0f}", "all heads hit": "{:.3f}", "no head hits": "{:.3f}", "group reads / head reads": "{:.2f}"}
    formats |= {"texts": "{:.0f}"} | dict.fromkeys(_SPREADS, "{:.0f}")
    shown = pd.DataFrame({name: [formats.get(name, "{}").format(x) for x in found[name]] for name in found}).iloc[: -1 if len(found) == 2 else None]
    shown.columns = [c.replace("spread_p", "spread, ").replace("spread_max", "largest") + "%" * c.startswith("spread_p") for c in shown]
    method = records.trace.facts["method"]
    more = f"tau {method['tau']:g}. Spread: latest minus earliest match position of a group whose heads all hit; quantiles by text, layer and group."
    return [table.save(shown, out, NAME, TITLE, caption(records, more), PAPER)]
