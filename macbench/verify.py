"""Is a run what it says it is? ``python -m macbench.verify RUN [RUN ...] [examples=2] [seed=0] [device=auto] [task.data_path=DIR] ...``.

Checks the name against the hash of what the run measures, every parquet part (schema, page checksums, keys), that the three tables add
up to the same counts, that nothing is missing, and that ``summary.json`` follows from the parts. Then makes ``examples`` randomly chosen
examples again, nowhere near the run, and compares texts and counts. Where data and weights of a packed run, or of another machine's, lie
here is said by ``task.data_path``, ``model.gguf`` and ``model.adapter``. Exit code 1 if anything is wrong.
"""

import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow as pa

from macbench import asked, parts
from macbench.counting import TOTALS
from macbench.environment import label
from macbench.errors import ConfigError, ending, one_line, printable
from macbench.records import KEY, LOCATIONS, SCHEMAS, completed, config_hash, find_runs, foreign, read_table
from macbench.summary import summarise
from macbench.tasks.base import guesses
from macbench.tasks.recorded import task_class
from macbench.untrusted import bounded, document

# Findings of a run that are printed; one damaged table makes thousands.
_SHOWN = 20


@dataclass
class Findings:
    """``wrong``: what must not be. ``notes``: what one should know. ``earlier``: columns that an earlier version of a table's schema lacks."""

    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    earlier: dict[str, set[str]] = field(default_factory=dict)

    def text(self) -> str:
        """A verdict in its line, what is wrong below it, then the notes."""
        lines = [*self.wrong[:_SHOWN], *([f"and {len(self.wrong) - _SHOWN} more"] if len(self.wrong) > _SHOWN else [])]
        head = "WRONG" if self.wrong else "as it should be"
        return "".join(f"{printable(line)}\n" for line in [head, *(f"  {line}" for line in [*lines, *(f"note: {note}" for note in self.notes)])])


def verify(run: Path, examples: int = 0, seed: int = 0, device: str = "auto", places: dict[str, str] | None = None) -> Findings:
    """All checks of a run folder. ``examples``: how many to make again, on ``device``. ``places``: see regenerate.py."""
    found = Findings()
    environment = _environment(run)
    identity = environment.get("identity")
    if identity is None:
        found.notes.append("was written before runs kept what their name is a hash of")
    elif not run.resolve().name.endswith(config_hash(identity | {"protocol": environment.get("protocol")})):
        found.wrong.append("its name is not the hash of environment.json (identity, protocol)")
    found.notes += [f"packed: {line}" for line in environment.get("packed", [])]
    tables, versions = _parts(run, found)
    if len(versions) > 1:
        found.notes.append(f"was made by {len(versions)} versions or machines: " + "; ".join(f"{v} ({n} examples)" for v, n in versions.items()))
    found.notes += [f"{table} were written under an earlier schema, without {', '.join(sorted(names))}" for table, names in found.earlier.items()]
    if found.wrong:
        return found  # the rest would only repeat it
    _sums(tables, {table: environment.get(f"{table}_of") for table in ("steps", "layers")}, found)
    wanted = asked.read(run) if (run / asked.FILE).exists() or not found.earlier else asked.answered(tables["samples"])
    _complete(tables["samples"], wanted, found)
    _summary(run, wanted, found)
    if examples:
        from macbench.regenerate import regenerate

        regenerate(run, tables, examples, random.Random(seed), device, found, places or {})
    return found


def _environment(run: Path) -> dict:
    try:
        return document(run / "environment.json")
    except (OSError, ValueError) as error:
        raise ConfigError("RUN", run, f"is not a run folder ({one_line(error)})") from None


def _parts(run: Path, found: Findings) -> tuple[dict[str, pd.DataFrame], dict[str, int]]:
    """The three tables, and how many examples each version of the code made."""
    tables, versions = {}, {}
    names = {table: {path.name for path in (run / table).glob("part-*.parquet")} for table in SCHEMAS}
    for table, schema in SCHEMAS.items():
        frames = []
        for name in sorted(names[table]):
            path = run / table / name
            try:
                data = parts.read(path)
            except (OSError, pa.ArrowException) as error:
                found.wrong.append(f"{path} cannot be read ({one_line(error)})")
                continue
            whole = data if data.schema.equals(schema) else completed(data, table)
            if whole is None:
                other = {*zip(data.schema.names, data.schema.types, strict=True)} ^ {*zip(schema.names, schema.types, strict=True)}
                found.wrong.append(f"{path} has another schema (columns {', '.join(sorted({str(column) for column, _ in other}))})")
                continue
            if absent := [name for name in schema.names if name not in data.schema.names]:
                found.earlier[table] = found.earlier.get(table, set()) | {*absent}
            if said := foreign(path, whole):
                found.wrong.append(f"{path} {said}")
            if table == "samples":
                version = label((data.schema.metadata or {}).get(b"macbench"))
                examples = len(set(zip(data["subtask"].to_pylist(), data["example_id"].to_pylist(), strict=True)))
                versions[version] = versions.get(version, 0) + examples
            frames.append(whole.to_pandas())
        tables[table] = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=schema.names)
    for name in sorted(names["samples"] - names["steps"] | names["samples"] - names["layers"]):
        found.wrong.append(f"{run / 'samples' / name} has no counterpart in steps or layers")
    return tables, versions


def _sums(tables: dict[str, pd.DataFrame], kept: dict[str, list[str] | None], found: Findings) -> None:
    """Steps and layers of an example add up to its sample row. ``kept``: by table the methods whose rows were packed, if not all."""
    samples = tables["samples"]
    for row in samples[samples.duplicated(KEY)].itertuples():
        found.wrong.append(f"{_place(row)} is recorded twice")
    good = samples[samples.error.isna()].drop_duplicates(KEY).set_index(KEY)
    mine = {table: good if names is None else good[good.index.get_level_values("method").isin(names)] for table, names in kept.items()}
    for table, rows in mine.items():
        sums = tables[table].groupby(KEY)[list(TOTALS)].sum()
        joined = rows.join(sums.add_suffix("_sum"), how="left").fillna({f"{name}_sum": 0 for name in TOTALS})
        for name in TOTALS:
            for key in joined.index[joined[name] != joined[f"{name}_sum"]]:
                found.wrong.append(f"{name} of {' '.join(filter(None, key))} is not the sum of its {table}")
    steps = tables["steps"].groupby(KEY).size().reindex(mine["steps"].index, fill_value=0)
    for key in steps.index[mine["steps"].decode_steps != steps]:
        found.wrong.append(f"{' '.join(filter(None, key))} has another number of step rows than decode_steps")


def _complete(samples: pd.DataFrame, wanted: asked.Asked, found: Findings) -> None:
    have = set(samples[KEY].itertuples(index=False, name=None))
    need = {(method, label, subtask, str(index)) for method, label in wanted.variants for subtask, index in wanted.places()}
    if need - have:
        first = " ".join(filter(None, min(need - have)))
        found.wrong.append(f"{len(need - have)} of {len(need)} rows are missing, such as {first}")
    failed = samples[samples.error.notna()]
    if len(failed):
        found.wrong.append(f"{len(failed)} rows carry an error, such as {_place(failed.iloc[0])}: {failed.error.iloc[0]}")


def _summary(run: Path, wanted: asked.Asked, found: Findings) -> None:
    """``summary.json`` again, from the parts."""
    try:
        kept = json.loads(bounded(run / "summary.json"))
    except (OSError, ValueError, RecursionError) as error:
        found.wrong.append(f"summary.json cannot be read ({one_line(error)})")
        return
    task = task_class(run)
    samples = wanted.rows(read_table(run, "samples"))
    table = summarise(samples, guesses(task, samples))
    if json.loads(table.to_json(orient="records")) != kept:
        what = "summary.json does not follow from the parts; the run's command writes it anew"
        (found.notes if found.earlier else found.wrong).append(what)  # an earlier version had another table, too


def _place(row) -> str:
    return " ".join(filter(None, (row.method, row.variant, row.subtask, row.example_id)))


def main() -> None:
    runs, given = [a for a in sys.argv[1:] if "=" not in a], dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    with ending() as at:
        options = _options(given)
        folders = [folder for run in runs for folder in (list(find_runs(Path(run))) or [Path(run)])]
        if not folders:
            raise ConfigError("RUN", "", "name a run folder, or one with runs below it: python -m macbench.verify runs")
        wrong = 0
        for run in folders:
            at(run)
            found = verify(run, **options)
            wrong += len(found.wrong)
            print(f"{run}: {found.text()}", end="")
    if wrong:
        sys.exit(1)


def _options(given: dict[str, str]) -> dict:
    options, places = {"examples": 2, "seed": 0, "device": "auto"}, {}
    for key, value in given.items():
        if key in LOCATIONS:
            places[key] = value
            continue
        if key not in options:
            raise ConfigError(key, value, f"no such option; there are {', '.join((*options, *LOCATIONS))}")
        if key != "device" and not value.isdecimal():
            raise ConfigError(key, value, "must be a number, 0 or more")
        options[key] = value if key == "device" else int(value)
    if places and not options["examples"]:
        raise ConfigError(*next(iter(places.items())), "says where examples are made again, but examples=0 makes none")
    return options | {"places": places}


if __name__ == "__main__":
    main()
