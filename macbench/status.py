"""What every run below a folder has done and still has to do: ``python -m macbench.status [runs]``.

It only reads. ``running``: examples whose worker lives, as far as one can know from here: a worker counts as living while its heartbeat
was written within the last two minutes, unless it is known to be gone. ``rate``: examples per hour since the workers of now began.
"""

import sys
from datetime import datetime, timedelta
from pathlib import Path
from time import time

import pandas as pd

from macbench import asked
from macbench.errors import FOREIGN, ConfigError, one_line, printable
from macbench.leases import STALE, held, look
from macbench.records import find_runs, part_name, read_table

_WIDEST = 200  # characters of a column


def status(run: Path) -> dict:
    """A run in numbers of examples, its workers, and the rate and time left while it is running."""
    wanted = asked.read(run)
    places = {part_name(subtask, str(index)) for subtask, index in wanted.places()}
    rows = read_table(run, "samples", ["subtask", "example_id", "error"], complete=True)
    found = rows.assign(failed=rows.error.notna()).groupby(["subtask", "example_id"]).failed.agg(["size", "any"])
    found.index = [part_name(*key) for key in found.index]
    found = found[found.index.isin(places)]
    failed, done = int(found["any"].sum()), int(((found["size"] >= len(wanted.variants)) & ~found["any"]).sum())
    workers = living(run)
    running = places & {part for parts in workers.values() for part in parts["parts"]}
    left = len(places) - done - failed
    per_hour = _rate(run, workers)
    return {
        "run": printable(str(run)),
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
    found: dict[str, dict] = {}
    for part, lease in held(run).items():
        alive, worker = look(lease)
        try:
            alive = alive is not False and time() - lease.stat().st_mtime < STALE
        except OSError:
            continue  # just finished
        if alive:
            who = found.setdefault(f"{worker.get('host')}:{worker.get('pid')}", {"parts": [], "started": worker.get("started")})
            who["parts"].append(part)
    return found


def _rate(run: Path, workers: dict[str, dict]) -> float | None:
    """Examples per hour."""
    try:
        began = min(datetime.fromisoformat(worker["started"]).timestamp() for worker in workers.values())
    except (ValueError, TypeError):
        return None
    times = [stamp for path in (run / "samples").glob("part-*.parquet") if (stamp := path.stat().st_mtime) >= began]
    return 3600 * len(times) / (max(times) - began) if times and max(times) > began else None


def main() -> None:
    root = Path(sys.argv[1] if sys.argv[1:] else "runs")
    rows = []
    try:
        if not root.is_dir():
            raise ConfigError("runs", root, "is not a folder; python -m macbench.status runs")
        for run in find_runs(root):
            try:
                rows.append(status(run))
            except ConfigError as error:  # a run that cannot be read is no reason to be silent about the others
                print(f"macbench: note: {error}", file=sys.stderr)
            except FOREIGN as error:
                print(f"macbench: note: {ConfigError('RUN', run, f'cannot be read ({type(error).__name__}: {one_line(error)})')}", file=sys.stderr)
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        sys.exit(2)
    print(pd.DataFrame(rows).to_string(index=False) if rows else f"no runs below {root}")


if __name__ == "__main__":
    main()
