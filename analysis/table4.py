"""Table 4: a mixture of experts, hit rate and accuracy."""

from pathlib import Path

from analysis import style, table
from analysis.records import Missing, Records
from analysis.style import Drawn
from analysis.table1 import compared, shown

NAME = "table4"
TITLE = "Table 4: mixture of experts, hit rate and accuracy"
PAPER = "Qwen3-30B-A3B: hit rate at least 99% (second-hand)."
WHY = "no mixture of experts has weights that come without a hub; python -m macbench.run +experiment=table4 scale=paper runs Qwen3-30B-A3B"


def make(records: Records, out: Path) -> list[Drawn]:
    found, sources, _ = compared(records)
    experts = found[found.model.str.contains("a3b|moe|mixtral", case=False)] if len(found) else found
    if not len(experts):
        raise Missing(f"not run: {WHY}. Paper: {PAPER}")
    used = [s for s in sources if s.path.parent.parent.name in set(experts.model)]
    return [table.save(shown(experts), out, NAME, TITLE, style.made(used, "MAC beside full attention"), PAPER)]
