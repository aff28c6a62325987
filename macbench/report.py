"""The table of a finished run, computed again from its parquet files alone: ``python -m macbench.report RUN [RUN ...]``.

RUN is a folder that macbench.run wrote. Every recorded example counts, whatever the ``limit`` of the last command.
"""

import json
import sys
from pathlib import Path

import pandas as pd

from macbench.errors import ConfigError
from macbench.records import read_table
from macbench.summary import summarise
from macbench.tables import format_summary
from macbench.tasks.base import guesses
from macbench.tasks.recorded import task_class


def recomputed(run: Path) -> pd.DataFrame:
    """The table of ``summary.json``, subtasks in the order of the protocol."""
    try:
        task = task_class(run)
        subtasks = json.loads((run / "environment.json").read_text())["protocol"]["subtasks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("RUN", run, f"is not a run folder ({str(error).splitlines()[0]})") from None
    samples = read_table(run, "samples")
    place = samples.subtask.map({subtask: i for i, subtask in enumerate(subtasks)})
    samples = samples.assign(_place=place).sort_values("_place", kind="stable").drop(columns="_place")
    return summarise(samples, guesses(task, samples))


def main() -> None:
    try:
        if not sys.argv[1:]:
            raise ConfigError("RUN", "", "name a run folder: python -m macbench.report runs/ruler/smollm2/4096/mac-1a2b3c4d")
        for run in map(Path, sys.argv[1:]):
            print(f"{run}\n{format_summary(recomputed(run))}")
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
