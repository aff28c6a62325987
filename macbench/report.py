"""The table of a finished run, computed again from its parquet files alone, and one self-contained HTML page with all figures.

python -m macbench.report RUN [RUN ...] [--html FILE]

RUN is a folder that macbench.run wrote, or one with such folders in it. Every recorded example counts, whatever the ``limit`` of the last command.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from macbench.errors import ConfigError, ending
from macbench.records import read_table
from macbench.summary import summarise
from macbench.tables import format_summary
from macbench.tasks.base import guesses
from macbench.tasks.recorded import task_class
from macbench.untrusted import document

HTML = Path("figures/report.html")


def recomputed(run: Path) -> pd.DataFrame:
    """The table of ``summary.json``, subtasks in the order of the protocol."""
    try:
        task = task_class(run)
        subtasks = document(run / "environment.json")["protocol"]["subtasks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("RUN", run, f"is not a run folder ({str(error).splitlines()[0]})") from None
    samples = read_table(run, "samples")
    place = samples.subtask.map({subtask: i for i, subtask in enumerate(subtasks)})
    samples = samples.assign(_place=place).sort_values("_place", kind="stable").drop(columns="_place")
    return summarise(samples, guesses(task, samples))


def page(roots: list[str], target: Path) -> None:
    """The HTML page, by ``analysis``, which only a checkout has."""
    try:
        from analysis.page import write
    except ImportError:
        print("macbench: note: no HTML page: it is drawn by analysis/ of a checkout", file=sys.stderr)
        return
    try:
        print(f"page: {write(roots, target)}")
    except OSError as error:
        raise ConfigError("--html", target, f"cannot be written ({error.strerror})") from error


def main(arguments: list[str], at: Callable[[Path], None] = lambda run: None) -> None:
    """``at`` is told which run is being read."""
    target = HTML
    if "--html" in arguments:
        option = arguments.index("--html")
        if option + 1 == len(arguments):
            raise ConfigError("--html", "", "must name a file: --html report.html")
        target, arguments = Path(arguments[option + 1]), arguments[:option] + arguments[option + 2 :]
    if not arguments:
        raise ConfigError("RUN", "", "name a run folder: python -m macbench.report runs/ruler/smollm2/4096/mac-1a2b3c4d")
    for run in map(Path, arguments):
        at(run)
        if not run.is_dir() or not any(run.rglob("*.parquet")):
            raise ConfigError("RUN", run, "is not a run folder (no records in it)")
        if (run / "samples").is_dir():
            print(f"{run}\n{format_summary(recomputed(run))}")
    page(arguments, target)


if __name__ == "__main__":
    with ending() as at:
        main(sys.argv[1:], at)
