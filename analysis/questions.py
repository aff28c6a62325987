"""The two protocols side by side: the question in the prefill, and the question decoded after the context was compressed.

    python -m analysis.questions RUNS_DIR_WITH RUNS_DIR_WITHOUT

Markdown, a table per context length. The last column compares the two on the same examples, by ``stats.paired``: what a method loses
where it must compress before it knows what will be asked.
"""

import sys
from pathlib import Path

import pandas as pd

from analysis.equal_bytes import interval
from analysis.load import compared, run_folders
from analysis.table import MISSING, markdown
from macbench.errors import ConfigError
from macbench.stats import paired
from macbench.summary import headline, summarise

COLUMNS = [
    *("method", "budget", "prefilled: score", "vs full [95%]", "rho_bytes"),
    *("decoded: score", "vs full [95%] ", "rho_bytes ", "decoded - prefilled [95%]"),
]


def tables(given: list[Path], asked: list[Path]) -> str:
    """``given``: runs with the question in the prefill; ``asked``: without. What only one of them has, methods or examples, is left out."""
    samples = [compared(folders) for folders in (given, asked)]
    parts = []
    for ctx in (c for c in samples[1] if c in samples[0]):
        ours, theirs = _same(samples[0][ctx], samples[1][ctx]), _same(samples[1][ctx], samples[0][ctx])
        before, after = (headline(summarise(part, each=False)).set_index(["method", "variant"]) for part in (ours, theirs))
        lines = [[*key, *_cells(before.loc[key]), *_cells(after.loc[key]), _change(ours, theirs, key)] for key in after.index if key in before.index]
        title = f"### {ctx // 1024}K, {int(after.examples.max())} examples of {', '.join(theirs.subtask.unique())}"
        parts.append(f"{title}\n\n{markdown(pd.DataFrame(lines, columns=COLUMNS))}")
    return "\n\n".join(parts)


def _same(frame: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The rows of the examples that ``other`` has, too."""
    return frame.merge(other[["subtask", "example_id"]].drop_duplicates())


def _cells(row) -> list[str]:
    return [f"{row.score:.3f} ± {row.score_se:.3f}", interval(row), f"{row.rho_bytes:.3f}"]


def _change(given: pd.DataFrame, asked: pd.DataFrame, key: tuple[str, str]) -> str:
    """Mean difference of the two protocols on the same examples, with its interval."""
    ours, theirs = (frame[(frame.method == key[0]) & (frame.variant == key[1])] for frame in (asked, given))
    both = ours.merge(theirs, on=["subtask", "example_id"], suffixes=("", "_given"))
    if both.empty:
        return MISSING
    strata = [(part.score.to_numpy(float), part.score_given.to_numpy(float)) for _, part in both.groupby("subtask")]
    found = paired(*zip(*strata, strict=True))
    return interval(pd.Series({f"difference{end}": getattr(found, f"difference{end}") for end in ("", "_low", "_high")}))


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        sys.exit("analysis.questions: needs two folders: runs with the question in the prefill, and runs without")
    given, asked = map(run_folders, arguments)
    for root, found in zip(arguments, (given, asked), strict=True):
        if not found:
            sys.exit(f"analysis.questions: no runs below {root}")
    try:
        print(tables(given, asked))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
