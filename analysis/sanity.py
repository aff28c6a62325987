"""Published numbers beside ours, in kind: the table of docs/methods.md, computed from parquet.

``python -m analysis.sanity [RUNS_DIR ...]`` prints it; without arguments from the reference runs of task=ruler. Models, tasks and budgets differ,
so what is compared is the share of full attention's score that a method keeps.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from analysis.load import RUNS, measured, run_folders
from macbench.errors import ConfigError
from macbench.summary import REFERENCE


class Published(NamedTuple):
    """``what`` was measured, and ``kept``, the method's score over full attention's there (text: some are not such shares)."""

    what: str
    kept: str


PUBLISHED = {
    "quest": Published("needle, LongChat-7B, 10K, 64 tokens; LongBench Qasper at 512 over 4096 tokens", "0.99; 0.75"),
    "rocketkv": Published("LongBench, Llama-3.1-8B-Instruct, 48.15 of 48.70", "0.99"),
    "multipole": Published("about full attention at a budget of 512", "about 1"),
    "snapkv": Published("RULER 32K, Llama-3.1-8B, about 4096 tokens (0.125), 79 of 90", "0.88"),
    "pyramidkv": Published("LongBench, Mistral-7B-v0.2, capacity 1024, over SnapKV's: 41.01 of 41.35", "0.99 of snapkv"),
    "h2o": Published("RULER 32K, Llama-3.1-8B, 4096 tokens (0.125), 21 of 90", "0.23"),
    "streaming_llm": Published("RULER 32K, Llama-3.1-8B, 4096 tokens (0.125), 22 of 90", "0.24"),
    "tova": Published("none to compare with", "-"),
    "kivi": Published("LongBench, Mistral-7B-v0.2, 4 bits, 43.53 of 43.54", "1.00"),
    "kivi_2bit": Published("the same, 2 bits, 42.43 of 43.54", "0.97"),
    "int8": Published("none for this scheme; near lossless by its users", "about 1"),
    "tidaldecode": Published("needle, LongChat-7B, 10K, 64 tokens; LongBench at 4096 over Quest's, 32.86 of 31.13", "0.92; 1.06 of quest"),
    "oracle_topk_ideal": Published("bounds what selects by attention mass", "at least the selectors"),
}


def kept(folders: list[Path]) -> pd.DataFrame:
    """Score over full attention's score, a row per method and ``budget`` (text; '' without one), a column per context length."""
    columns = {}
    for ctx, found in measured(folders).items():
        rows = found.set_index(["method", "variant"])
        full = rows.score.get((REFERENCE, ""))
        if full:
            columns[ctx] = rows.score.drop(REFERENCE, level=0) / full
    return pd.DataFrame(columns)


def table(folders: list[Path]) -> str:
    """Markdown."""
    found = kept(folders)
    lines = ["| method | published | kept there | " + " | ".join(f"kept here, {ctx // 1024}K" for ctx in found) + " |"]
    lines.append("|---" * (3 + len(found.columns)) + "|")
    for method, (what, there) in PUBLISHED.items():
        cells = []
        for ctx in found:
            mine = found[ctx].get(method, pd.Series(dtype=float)).dropna()
            cells.append(", ".join(f"{share:.2f}{f' at {budget}' if budget else ''}" for budget, share in mine.items()) or "-")
        lines.append("| " + " | ".join([f"`{method}`", what, there, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    folders = run_folders(*(sys.argv[1:] or [RUNS]))
    if not folders:
        sys.exit("analysis.sanity: no runs below " + " ".join(map(str, sys.argv[1:] or [RUNS])))
    try:
        print(table(folders))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
