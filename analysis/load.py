"""Find run folders and read their sample rows."""

import json
from pathlib import Path

import pandas as pd

from macbench.records import read_table


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


def guesses(folder: Path) -> dict[str, float]:
    """Scores that take no reading (chance, the best constant answer), by name: what the run's table lists besides its methods."""
    methods = set(read_table(folder, "samples", ["method"]).method)
    rows = json.loads((folder / "summary.json").read_text())
    return {row["method"]: row["score"] for row in rows if row["method"] not in methods}
