"""Draw every figure and table: ``python -m analysis.figures [RUNS_DIR ...] [--out DIR]`` (``make figures``).

What a figure lacks is said in one line, and the others are drawn.
"""

import sys
from pathlib import Path

from analysis import (
    chains,
    contexts,
    fig1,
    fig2,
    fig4,
    fig5,
    fig6,
    fig7,
    fig8,
    long_texts,
    manifest,
    methods,
    sweep,
    table1,
    table2_3,
    table4,
    table5,
    table6,
    table7,
)
from analysis.records import Missing, Records
from analysis.style import Drawn
from macbench.errors import one_line

OUT = Path("figures")
ITEMS = (fig1, fig2, fig4, fig5, fig6, fig7, fig8, table1, table2_3, table4, table5, table6, table7, chains, contexts, long_texts, methods, sweep)


def draw(records: Records, out: Path, items=ITEMS) -> list[Drawn]:
    """All items into ``out``; one that cannot be drawn is a Drawn without files whose ``lack`` says why."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = []
    for item in items:
        try:
            drawn += item.make(records, out)
        except Missing as lack:
            drawn.append(Drawn(item.NAME, getattr(item, "TITLE", item.NAME), "", [], lack=str(lack)))
        except (KeyError, ValueError, TypeError, IndexError) as error:  # records can be damaged in more ways than are known
            lack = f"cannot be drawn from these records ({type(error).__name__}: {one_line(error)})"
            drawn.append(Drawn(item.NAME, getattr(item, "TITLE", item.NAME), "", [], lack=lack))
    lines = [f"{line}; drawn without it" for line in sorted(records.damaged)] + [line for root in records.roots for line in manifest.lacks(root)]
    return drawn + [Drawn(f"records-{i + 1}", "Records", "", [], lack=line) for i, line in enumerate(dict.fromkeys(lines))]


def main(arguments: list[str]) -> int:
    out = OUT
    if "--out" in arguments:
        at = arguments.index("--out")
        if at + 1 == len(arguments):
            print("figures: --out: must name a folder: --out figures", file=sys.stderr)
            return 2
        out, arguments = Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]
    roots = arguments or ["runs"]
    empty = [root for root in roots if not (Path(root).is_dir() and any(Path(root).rglob("*.parquet")))]
    if empty:
        print(f"figures: no runs below {', '.join(empty)}", file=sys.stderr)
        return 2
    try:
        drawn = draw(Records(*roots), out)
    except OSError as error:
        print(f"figures: --out={error.filename or out}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    for item in drawn:
        if item.lack:
            print(f"figures: {item.name}: {item.lack}", file=sys.stderr)
        else:
            print(*item.files)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
