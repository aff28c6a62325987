"""What records, leases and statistics take of a run's time, within that run: ``python -m macbench.bench.overhead KEY=VALUE ...``.

The arguments are those of macbench.run; the run is a real one, into a folder that is thrown away. Time begins when the model is loaded.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from time import perf_counter

from macbench import partial
from macbench import run as run_module
from macbench.leases import Leases
from macbench.records import RunDirectory
from macbench.work import Work

# (name in the table, owner, function); of nested ones the outer one counts.
PARTS = (
    *(("leases", Leases, name) for name in ("__init__", "claim", "lost", "release", "close")),
    *(("leases", Work, name) for name in ("_claim", "made")),
    ("rows", run_module, "records"),
    ("parquet", RunDirectory, "write_example"),
    *(("unfinished texts", partial.Partial, name) for name in ("__init__", "save", "finish")),
    ("unfinished texts", partial, "clear"),
    ("statistics", run_module, "report"),
)


def main() -> None:
    spent, inside, whole = dict.fromkeys((part for part, _, _ in PARTS), 0.0), [], [0.0, 0]

    def timed(part: str, function: Callable) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            if inside:
                return function(*args, **kwargs)
            inside.append(part)
            began = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += perf_counter() - began
                inside.pop()

        return call

    def total(function: Callable) -> Callable:
        def call(*args):
            began = perf_counter()
            try:
                return function(*args)
            finally:
                whole[0] += perf_counter() - began

        return call

    def counted(function: Callable) -> Callable:
        def call(*args):
            whole[1] += 1
            return function(*args)

        return call

    RunDirectory.write_example = counted(RunDirectory.write_example)
    for part, owner, name in PARTS:
        setattr(owner, name, timed(part, getattr(owner, name)))
    run_module.evaluate, run_module.report = total(run_module.evaluate), total(run_module.report)
    with tempfile.TemporaryDirectory(dir=".", prefix=".overhead-") as scratch:
        sys.argv[1:] = [*sys.argv[1:], f"runs_dir={scratch}", "logger=none"]
        run_module.main()
    seconds, examples = whole
    print(f"{examples} examples in {seconds:.2f} s: {100 * sum(spent.values()) / seconds:.2f}% for records, leases and statistics")
    for part, part_seconds in spent.items():
        print(f"  {part}: {100 * part_seconds / seconds:.2f}%, {1e3 * part_seconds / max(1, examples):.2f} ms per example")


if __name__ == "__main__":
    main()
