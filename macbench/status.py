"""What every run below some folders has done and still has to do: ``python -m macbench.status [runs ...]``.

It only reads. ``running``: examples whose worker lives, as far as one can know from here: a worker counts as living while its heartbeat
was written within the last two minutes, unless it is known to be gone. ``rate``: examples per hour since the workers of now began.

Of a trace, examples are its texts; of a table of task=attention or decode, its rows, where ``failed`` are those with an error that is no
excuse (a package that is not installed, a budget below a method's floor). Who makes them cannot be seen from here, nor, before it is there, a table.
"""

import json
import os
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from time import time

import pandas as pd
import pyarrow as pa

from macbench import asked, parts
from macbench.errors import FOREIGN, ConfigError, one_line, printable
from macbench.leases import STALE, held, look
from macbench.records import part_name, read_table

_WIDEST = 200  # characters of a column
_COLUMNS = ("examples", "done", "failed", "running", "missing", "per hour", "left", "workers")
_TEXTS = "texts.parquet"  # of a trace; it is written last


def found(root: Path) -> Iterator[Path]:
    """At or below ``root``, in order: run folders, traces' folders, and other parquet files."""
    for folder, below, files in os.walk(root):
        run = "samples" in below
        if (run and "environment.json" in files) or _TEXTS in files:
            yield Path(folder)
        elif not run:
            yield from (Path(folder) / name for name in sorted(files) if name.endswith(".parquet"))
        below[:] = [] if run or _TEXTS in files else sorted(below)


def row(path: Path) -> dict | None:
    """What is known of one of ``found``; None if it is not ours."""
    if path.is_file():
        known = benchmark(path)
    else:
        known = trace(path) if (path / _TEXTS).exists() else status(path)
    return known and {"run": printable(str(path))} | {column: known.get(column, "-") for column in _COLUMNS}


def trace(folder: Path) -> dict:
    """A trace in numbers of texts."""
    with parts.opened(folder / _TEXTS) as file:
        done, facts = file.metadata.num_rows, _facts(file.metadata.metadata)
    whole = facts.get("texts", done if (folder / "config.yaml").exists() else None)  # which is written when every text is there
    return {"done": done} | ({"examples": int(whole), "missing": int(whole) - done} if whole is not None else {})


def benchmark(path: Path) -> dict | None:
    """A table of task=attention or task=decode in numbers of rows; None if it is something else."""
    with parts.opened(path) as file:
        facts, columns = _facts(file.metadata.metadata), file.schema_arrow.names
    if not facts or "error" not in columns:
        return None
    errors = parts.read(path, ["error"])["error"]
    said = errors.drop_null().to_pylist()
    known = {"examples": len(errors), "done": len(errors) - len(said), "failed": sum(not _excused(error) for error in said)}
    return known | ({"missing": 0} if "task" in facts else {})  # macbench.run writes it when every row is there


def _excused(error: str) -> bool:
    """Whether a row says why there is nothing to measure."""
    from macbench.attention.peers import EXCUSES  # slow to import, and rarely needed
    from macbench.latency.bench import excused

    return excused(error) or error.startswith(EXCUSES) or "its floor" in error


def _facts(metadata: dict | None) -> dict:
    """What macbench wrote into a parquet file's metadata; nothing if it is not ours."""
    found = json.loads((metadata or {}).get(b"macbench", b"{}"))
    if not isinstance(found, dict):
        raise ValueError("its metadata holds no object")
    return found


def status(run: Path) -> dict:
    """A run in numbers of examples, its workers, and the rate and time left while it is running."""
    wanted = asked.read(run)
    places = {part_name(subtask, str(index)) for subtask, index in wanted.places()}
    rows = read_table(run, "samples", ["subtask", "example_id", "error"], complete=True)
    made = rows.assign(failed=rows.error.notna()).groupby(["subtask", "example_id"]).failed.agg(["size", "any"])
    made.index = [part_name(*key) for key in made.index]
    made = made[made.index.isin(places)]
    failed, done = int(made["any"].sum()), int(((made["size"] >= len(wanted.variants)) & ~made["any"]).sum())
    workers = living(run)
    running = places & {part for parts in workers.values() for part in parts["parts"]}
    left = len(places) - done - failed
    per_hour = _rate(run, workers)
    return {
        "examples": len(places),
        "done": done,
        "failed": failed,
        "running": len(running),
        "missing": max(0, left - len(running)),
        "per hour": f"{per_hour:.0f}" if per_hour else "-",
        "left": str(timedelta(seconds=round(3600 * left / per_hour))) if per_hour else "-",
        "workers": printable(" ".join(workers))[:_WIDEST] or "-",
    }


def living(run: Path) -> dict[str, dict]:
    """Workers with a lease, by host:pid: the ``parts`` they make, and since when they run."""
    workers: dict[str, dict] = {}
    for part, lease in held(run).items():
        alive, worker = look(lease)
        try:
            alive = alive is not False and time() - lease.stat().st_mtime < STALE
        except OSError:
            continue  # just finished
        if alive:
            who = workers.setdefault(f"{worker.get('host')}:{worker.get('pid')}", {"parts": [], "started": worker.get("started")})
            who["parts"].append(part)
    return workers


def _rate(run: Path, workers: dict[str, dict]) -> float | None:
    """Examples per hour."""
    try:
        began = min(datetime.fromisoformat(worker["started"]).timestamp() for worker in workers.values())
    except (ValueError, TypeError):
        return None
    times = [stamp for path in (run / "samples").glob("part-*.parquet") if (stamp := path.stat().st_mtime) >= began]
    return 3600 * len(times) / (max(times) - began) if times and max(times) > began else None


def main() -> None:
    roots = [Path(argument) for argument in sys.argv[1:] or ["runs"]]
    rows = []
    try:
        for root in roots:
            if not root.is_dir():
                raise ConfigError("runs", root, "is not a folder; python -m macbench.status runs")
        for run in (run for root in roots for run in found(root)):
            try:
                rows.append(row(run))
            except ConfigError as error:  # a run that cannot be read is no reason to be silent about the others
                print(f"macbench: note: {error}", file=sys.stderr)
            except (*FOREIGN, pa.ArrowException) as error:
                print(f"macbench: note: {ConfigError('RUN', run, f'cannot be read ({type(error).__name__}: {one_line(error)})')}", file=sys.stderr)
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        sys.exit(2)
    rows = [known for known in rows if known]
    print(pd.DataFrame(rows).to_string(index=False) if rows else f"no runs below {' '.join(map(str, roots))}")


if __name__ == "__main__":
    main()
