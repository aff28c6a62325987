"""How fast rows are written and how dear leases are: ``python -m macbench.bench.records_speed [rows=1000000] [steps=4096] [folder=DIR]``.

A generation of ``steps`` decode steps by examples enough for ``rows`` step rows, through the code that a run uses: counts to rows, rows to
parquet, fsync and rename, a lease claimed and given back around each example.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

from macbench.counting import COUNTS
from macbench.engine import Generation
from macbench.leases import Leases
from macbench.records import RunDirectory, part_name
from macbench.rows import layer_rows, sample_columns, step_rows

LAYERS = 32


def main() -> None:
    given = {"rows": "1000000", "steps": "4096", "folder": ""} | dict(a.split("=", 1) for a in sys.argv[1:])
    steps, rows = int(given["steps"]), int(given["rows"])
    rng = np.random.default_rng(0)
    counts = {name: rng.integers(0, 1 << 20, (steps, LAYERS, 1)) for name in COUNTS}
    generation = Generation([0] * (steps + 1), "length", rng.random(steps), 0.0, counts, np.arange(steps))
    root = Path(tempfile.mkdtemp(dir=given["folder"] or None))
    try:
        directory, seconds = RunDirectory(root / "mac-00000000"), dict.fromkeys(("rows", "parquet", "leases"), 0.0)
        examples = -(-rows // steps)
        with Leases(directory.path) as leases:
            for index in range(examples):
                times = [perf_counter()]
                part = part_name("a", str(index))
                assert leases.claim(part)
                times.append(perf_counter())
                key = {"run_id": directory.run_id, "method": "mac", "variant": "", "subtask": "a", "example_id": str(index)}
                tables = {
                    "samples": [key | sample_columns(generation)],
                    "steps": [step_rows(generation, key)],
                    "layers": [layer_rows(generation, key, [])],
                }
                times.append(perf_counter())
                directory.write_examples({part: tables}, {})
                times.append(perf_counter())
                leases.release(part)
                times.append(perf_counter())
                seconds["leases"] += times[1] - times[0] + times[4] - times[3]
                seconds["rows"] += times[2] - times[1]
                seconds["parquet"] += times[3] - times[2]
        total, size = sum(seconds.values()), sum(path.stat().st_size for path in root.rglob("*.parquet"))
        print(f"{examples} examples, {examples * steps} step rows in {total:.2f} s: {examples * steps / total:.0f} rows/s, {size / 1e6:.0f} MB")
        for what, spent in seconds.items():
            print(f"  {what}: {spent:.2f} s, {1e3 * spent / examples:.2f} ms per example")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
