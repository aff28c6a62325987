"""Runs that several machines made become one: ``python -m macbench.merge TARGET SOURCE [SOURCE ...]``.

All are folders with runs below them, such as ``runs``. Runs belong together if they have the same path below theirs, name included, and
the name is the hash of what is measured: the same configuration, protocol, data. Weights and schemas are checked as well. An example
that both have stays as TARGET has it, unless only SOURCE finished it without an error. Sources are read, never changed.
"""

import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa

from macbench import asked, parts
from macbench.environment import continued
from macbench.errors import ConfigError, ending, one_line
from macbench.files import write_in_order
from macbench.leases import Leases
from macbench.records import KEY, SCHEMAS, RunDirectory, config_hash, find_runs, foreign, read_table
from macbench.summary import summarise
from macbench.tables import format_summary
from macbench.tasks.base import guesses
from macbench.tasks.recorded import task_class
from macbench.untrusted import bounded, document

# Of the example rows that both runs have; times differ.
_SAME = ["text", "decode_steps", "tokens_log", "bytes_kv"]


def merge(source: Path, target: Path) -> dict[str, int]:
    """Take the examples of a run into another of the same name. Returns how many were ``taken``, ``kept`` and kept though ``different``."""
    theirs = _environment(source)
    if not source.name.endswith(config_hash(theirs["identity"] | {"protocol": theirs["protocol"]})):
        raise ConfigError("SOURCE", source, "its name is not the hash of its environment.json (identity, protocol)")
    directory = RunDirectory(target)
    if (target / "environment.json").exists():
        mine = _environment(target)
        if any(mine[key] != theirs[key] for key in ("identity", "protocol")):
            raise ConfigError("SOURCE", source, f"is another run than {target}, though the names are the same")
        for note in continued(target, theirs):
            print(f"macbench: note: {source}: {note}", file=sys.stderr)
    counts = {"taken": 0, "kept": 0, "different": 0}
    with Leases(target) as leases:
        for path in sorted((source / "samples").glob("part-*.parquet")):
            new = _rows(path, "SOURCE")
            if not leases.claim(path.stem):
                raise ConfigError("TARGET", target, "a process works on this run; merge when it has ended")
            whole = all((target / table / path.name).exists() for table in SCHEMAS)  # else a run would make it again
            old = _rows(target / "samples" / path.name, "TARGET") if whole else None
            if old is None or (old.error.notna().any() and new.error.isna().all()):
                _copy(source, target, path.name)
                counts["taken"] += 1
            else:
                counts["kept"] += 1
                counts["different"] += not old[KEY + _SAME].equals(new[KEY + _SAME])
            leases.release(path.stem)
    for name in ("config.yaml", "environment.json"):
        if not (target / name).exists():
            directory.write_text(name, bounded(source / name))
    wanted = [asked.read(run) for run in (source, target) if (run / asked.FILE).exists()]
    if wanted:
        most = {subtask: max(w.examples.get(subtask, 0) for w in wanted) for subtask in wanted[0].examples}
        directory.write_text(asked.FILE, asked.Asked(most, wanted[0].variants).text())
    return counts


def summary(run: Path) -> pd.DataFrame:
    """The table of a merged run, kept as its summary.json."""
    task = task_class(run)
    samples = asked.read(run).rows(read_table(run, "samples"))
    table = summarise(samples, guesses(task, samples))
    RunDirectory(run).write_text("summary.json", table.to_json(orient="records", indent=1))
    return table


def _environment(run: Path) -> dict:
    try:
        found = document(run / "environment.json")
        return found | {"identity": dict(found["identity"]), "protocol": dict(found["protocol"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError("RUN", run, f"has no environment.json that says what it measures ({one_line(error)})") from None


def _rows(path: Path, key: str) -> pd.DataFrame:
    return pd.DataFrame(_checked(path, "samples", key).to_pylist())[[*KEY, *_SAME, "error"]].sort_values(KEY, ignore_index=True)


def _checked(path: Path, table: str, key: str) -> pa.Table:
    """A part with the schema of now and the rows of its name, every page checked."""
    try:
        data = parts.read(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(key, path, f"cannot be read ({one_line(error)})") from None
    if not data.schema.equals(SCHEMAS[table]):
        raise ConfigError(key, path, "has another schema; it was written by another version")
    if said := foreign(path, data):
        raise ConfigError(key, path, said)
    return data


def _copy(source: Path, target: Path, name: str) -> None:
    """The parts of an example, all or none."""
    tables = ("steps", "layers", "samples")  # samples last, as whoever writes them
    for table in tables:
        _checked(source / table / name, table, "SOURCE")
    try:
        write_in_order([(target / table / name, lambda file, table=table: file.write((source / table / name).read_bytes())) for table in tables])
    except OSError as error:
        raise ConfigError("TARGET", target, f"cannot be written ({error.strerror})") from None


def main() -> None:
    with ending() as at:
        folders = [Path(a) for a in sys.argv[1:]]
        if len(folders) < 2:
            raise ConfigError("SOURCE", "", "name a target and its sources: python -m macbench.merge runs machine-a/runs machine-b/runs")
        target, changed = folders[0], []
        for source in folders[1:]:
            runs = list(find_runs(source))
            if not runs:
                raise ConfigError("SOURCE", source, "has no runs below it")
            for run in runs:
                at(run)
                into = target / run.relative_to(source)
                if into == target:
                    raise ConfigError("SOURCE", source, "is a run itself; name the folder that it has in common with the target, such as runs")
                counts = merge(run, into)
                changed.append(into)
                print(f"{run}: {', '.join(f'{number} {what}' for what, number in counts.items())}")
        for run in dict.fromkeys(changed):
            at(run)
            print(f"{run}\n{format_summary(summary(run))}")


if __name__ == "__main__":
    main()
