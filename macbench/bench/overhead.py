"""What records, leases and statistics take of a run's time, within that run: ``python -m macbench.bench.overhead KEY=VALUE ...``.

The arguments are those of macbench.run; the run is a real one, into a folder that is thrown away. Time begins when the model is loaded. Rows
are made and written in a thread: what of that the run waits for counts, and the thread's own time is said as well.
"""

import sys
import tempfile
import threading
from collections.abc import Callable
from functools import wraps
from time import perf_counter

from macbench import partial
from macbench import run as run_module
from macbench.leases import Leases
from macbench.recorder import Recorder
from macbench.records import RunDirectory
from macbench.work import Work

# (name in the table, owner, function); of nested ones the outer one counts.
PARTS = (
    *(("leases", Leases, name) for name in ("__init__", "claim", "lost", "release", "close")),
    *(("leases", Work, name) for name in ("_claim", "made", "finished")),
    *(("waiting for the writer", Recorder, name) for name in ("put", "settle", "__exit__")),
    *(("unfinished texts", partial.Partial, name) for name in ("__init__", "save", "finish")),
    ("statistics", run_module, "report"),
)
# Of the thread that writes.
BESIDE = (("rows", run_module, "records"), ("parquet", RunDirectory, "write_examples"), ("unfinished texts", partial, "clear"))


def main() -> None:
    spent = {(part, beside): 0.0 for parts, beside in ((PARTS, False), (BESIDE, True)) for part, _, _ in parts}
    inside, whole = threading.local(), [0.0, 0]

    def timed(part: str, beside: bool, function: Callable) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            main = threading.current_thread() is threading.main_thread()
            if getattr(inside, "part", None) or main == beside:
                return function(*args, **kwargs)
            inside.part = part
            began = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part, beside] += perf_counter() - began
                inside.part = None

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
        def call(directory, examples, *args):
            whole[1] += len(examples)
            return function(directory, examples, *args)

        return call

    RunDirectory.write_examples = counted(RunDirectory.write_examples)
    for parts, beside in ((PARTS, False), (BESIDE, True)):
        for part, owner, name in parts:
            setattr(owner, name, timed(part, beside, getattr(owner, name)))
    run_module.evaluate, run_module.report = total(run_module.evaluate), total(run_module.report)
    with tempfile.TemporaryDirectory(dir=".", prefix=".overhead-") as scratch:
        sys.argv[1:] = [*sys.argv[1:], f"runs_dir={scratch}", "logger=none"]
        run_module.main()
    seconds, examples = whole
    share = sum(part_seconds for (_, beside), part_seconds in spent.items() if not beside) / seconds
    print(f"{examples} examples in {seconds:.2f} s: {100 * share:.2f}% for records, leases and statistics")
    for (part, beside), part_seconds in spent.items():
        where = " (in the thread)" if beside else ""
        print(f"  {part}{where}: {100 * part_seconds / seconds:.2f}%, {1e3 * part_seconds / max(1, examples):.2f} ms per example")


if __name__ == "__main__":
    main()
