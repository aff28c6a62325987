"""Find run folders and read their sample rows."""

import json
import os
import re
from pathlib import Path

import pandas as pd

from macbench.errors import ConfigError
from macbench.records import read_table
from macbench.summary import REFERENCE, headline, summarise

# The reference runs that compare all methods.
RUNS = Path("runs/reference/h100/ruler/smollm2")
# In the label of a variant that was fitted to a budget.
BUDGET = re.compile(r"budget=([\d.]+)")


def run_folders(*roots: Path | str) -> list[Path]:
    """Every run folder below the roots: one that has ``samples/`` and ``summary.json``."""
    found = {path.parent.resolve(): None for root in roots for path in sorted(Path(root).rglob("summary.json")) if (path.parent / "samples").is_dir()}
    return list(found)


def samples(folder: Path) -> pd.DataFrame:
    """Sample rows of a run without the failed ones, with columns ``model``, ``device`` and ``commit``."""
    frame = read_table(folder, "samples")
    facts = json.loads((folder / "environment.json").read_text())
    commit = (facts.get("git") or {}).get("commit", "unknown")[:8]
    return frame[frame.error.isna()].assign(model=folder.parent.parent.name, device=facts["device"], commit=commit)


def compares(frame: pd.DataFrame) -> bool:
    """Whether a run has any method besides full attention."""
    return bool((frame.method != REFERENCE).any())


def swept(frame: pd.DataFrame) -> bool:
    """Whether a run is a grid over one method's knobs, which analysis.sweep draws."""
    others = frame[frame.method != REFERENCE]
    return others.method.nunique() == 1 and others.variant.nunique() > 3


def compared(folders: list[Path]) -> dict[int, pd.DataFrame]:
    """By context length, the sample rows of the run that compares methods, ``variant`` being its budget (text; '' of what runs as it is).

    Left out are runs over one method's knobs, of full attention alone and, beside runs at budgets, those without any budget.
    Two runs of one length are no comparison: ConfigError.
    """
    frames = {folder: samples(folder) for folder in folders}
    frames = {folder: frame for folder, frame in frames.items() if compares(frame) and not swept(frame)}
    fitted = {folder: frame for folder, frame in frames.items() if frame.variant.str.extract(BUDGET, expand=False).notna().any()}
    runs, found = {}, {}
    for folder, frame in (fitted or frames).items():
        for ctx, part in frame.groupby("ctx"):
            if ctx in found:
                raise ConfigError("RUNS_DIR", str(folder), f"has ctx={ctx}, as {runs[ctx]} has: name one run for each length")
            runs[ctx] = folder
            found[ctx] = part.assign(variant=part.variant.str.extract(BUDGET, expand=False).fillna(""))
    if folders and not found:
        raise ConfigError("RUNS_DIR", os.path.commonpath(folders), "has no run that compares methods with full attention")
    return dict(sorted(found.items()))


def measured(folders: list[Path]) -> dict[int, pd.DataFrame]:
    """Of ``compared`` runs, by context length, a row per method and budget over all subtasks: see ``summary.COLUMNS``."""
    return {ctx: headline(summarise(part, each=False)) for ctx, part in compared(folders).items()}


def guesses(folder: Path) -> dict[str, float]:
    """Scores that take no reading (chance, the best constant answer), by name: what the run's table lists besides its methods."""
    methods = set(read_table(folder, "samples", ["method"]).method)
    rows = json.loads((folder / "summary.json").read_text())
    return {row["method"]: row["score"] for row in rows if row["method"] not in methods}
