"""Whether two trainings give the same scores: full attention's, by context and subtask, on the same examples.

    python -m macbench.probe.compare runs/seed0 runs/seed1

Each is a run folder, or one with runs below it. A difference is ``within`` if its 95% interval (paired bootstrap) holds 0 or it is no
larger than one example; of many comparisons one in twenty lies outside by chance. It also tells a probe from its base model.
"""

import sys
from pathlib import Path

import pandas as pd

from macbench import stats
from macbench.errors import ConfigError, one_line
from macbench.records import find_runs, read_table
from macbench.summary import REFERENCE
from macbench.untrusted import document

# Of a mean of scores: an interval that ends at 0 holds it.
_ROUNDING = 1e-9
_EXAMPLE = ["task", "ctx", "subtask", "example_id"]


def scores(root: Path) -> pd.Series:
    """Full attention's score by task, ctx, subtask and example in all runs below ``root``; where several have an example, the first run's."""
    runs, columns = list(find_runs(root)), [*_EXAMPLE, "method", "score", "error"]
    if len(models := {run.resolve().parent.parent.name for run in runs}) > 1:
        raise ConfigError("RUN", root, f"holds runs of several models ({', '.join(sorted(models))}); name the folder of one")
    if len(adapters := {_adapter(run) for run in runs}) > 1:
        raise ConfigError("RUN", root, f"holds runs of several adapters ({', '.join(sorted(adapters))}); name the folder of one")
    frame = pd.concat([pd.DataFrame(columns=columns), *(read_table(run, "samples", columns) for run in runs)])
    frame = frame[(frame.method == REFERENCE) & frame.error.isna()].drop_duplicates(_EXAMPLE)
    if frame.empty:
        raise ConfigError("RUN", root, "holds no finished example of full attention")
    return frame.set_index(_EXAMPLE).score.astype(float)


def _adapter(run: Path) -> str:
    """A short name of what a run's model is besides its base weights."""
    try:
        return str(document(run / "environment.json").get("model_sha256"))[:8]
    except (OSError, ValueError) as error:
        raise ConfigError("RUN", run, f"its environment.json cannot be read ({one_line(error)})") from error


def compare(ours: pd.Series, theirs: pd.Series) -> pd.DataFrame:
    """A row per task, ctx and subtask that both have: examples, both scores, difference (theirs - ours) with its interval, and the verdict."""
    both = pd.concat({"ours": ours, "theirs": theirs}, axis=1, join="inner").reset_index()
    if both.empty:
        raise ConfigError("RUN", "both", "have no example in common")
    rows = []
    for (task, ctx, subtask), group in both.groupby(["task", "ctx", "subtask"], sort=False):
        found = stats.paired([group.theirs.to_numpy()], [group.ours.to_numpy()])
        row = {"task": task, "ctx": ctx, "subtask": subtask, "n": len(group), "first": group.ours.mean(), "second": group.theirs.mean()}
        row |= {"difference": found.difference, "low": found.difference_low, "high": found.difference_high}
        inside = (found.difference_low <= _ROUNDING and found.difference_high >= -_ROUNDING) or abs(found.difference) * len(group) <= 1
        rows.append(row | {"verdict": "within" if inside else "OUTSIDE"})
    return pd.DataFrame(rows).sort_values(["task", "ctx", "subtask"], ignore_index=True)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("macbench: python -m macbench.probe.compare RUN RUN: names two run folders, or folders with runs below them", file=sys.stderr)
        return 2
    try:
        found = compare(*(scores(Path(argument)) for argument in arguments))
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        return 2
    print(found.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    outside = int((found.verdict != "within").sum())
    print(f"{len(found) - outside} of {len(found)} within; {len(found) * (1 - stats.LEVEL):.1f} expected outside by chance")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
