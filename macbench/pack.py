"""A finished run with one part per table, to be kept or sent: ``python -m macbench.pack TARGET RUN [RUN ...]``.

RUN becomes TARGET/<task>/<model>/<ctx>/<name> and stays as it is. Rows are taken as they are. What is different:

- one ``part-all.parquet`` per table; columns that the run's version of the code did not have yet are null
- host and folders of the machine are left out: where data, weights and runs lay, DIR stands
- the name follows from ``identity`` and ``protocol`` again, if a folder of the machine was part of it
- ``summary.json`` is made anew from the rows, and ``asked.json`` if the run has none

A trace has one file per table already: it is copied without host and folders, under its name.

``environment.json`` lists under ``packed`` what of this was done. The result is then checked like any run (see ``verify.py``).
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from macbench import asked, parts
from macbench.environment import label
from macbench.errors import ConfigError, ending, one_line
from macbench.files import write_whole
from macbench.merge import summary
from macbench.records import LOCATIONS, PACKED, PLACE, SCHEMAS, RunDirectory, config_hash, placeless
from macbench.trace import records as trace
from macbench.untrusted import configuration, document
from macbench.verify import verify

_PLACES = ("runs_dir", *LOCATIONS)
_COPIED = ("tables.json", "judgements")


def pack(run: Path, target: Path) -> Path:
    """Returns the new folder. Raises a ConfigError for what cannot be packed."""
    environment = _json(run / "environment.json")
    config = configuration(run)
    hide = _hider(config, str(environment.get("command")))
    if config.get("task", {}).get("name") == "trace":
        return _trace(run, target, hide(OmegaConf.to_yaml(config)), environment, hide)
    identity, protocol = environment.get("identity"), environment.get("protocol")
    name, done = run.resolve().name, []
    if identity is not None:
        identity = json.loads(hide(json.dumps(identity | {"model": placeless(identity["model"])})))
        environment["identity"] = identity
        renamed = f"{name.rpartition('-')[0]}-{config_hash(identity | {'protocol': protocol})}"
        if renamed != name:
            done.append(f"was {name}: a folder of the machine was part of that name")
            name = renamed
    tables = {table: _table(run, table, done) for table in SCHEMAS}
    for table in ("steps", "layers"):
        have = set(tables[table]["method"].to_pylist())
        if set(tables["samples"]["method"].to_pylist()) - have:
            environment[f"{table}_of"] = sorted(have)
            done.append(f"had the {table} of {', '.join(sorted(have))} alone")
    into = _fresh(target.joinpath(*run.resolve().parts[-4:-1], name))
    directory = RunDirectory(into)
    for table, data in tables.items():
        data = data.set_column(data.schema.get_field_index("run_id"), "run_id", pa.array([name] * len(data), pa.string()))
        facts = {key: value for key, value in json.loads((data.schema.metadata or {}).get(b"macbench", b"{}")).items() if key != "host"}
        data = data.replace_schema_metadata({"macbench": hide(json.dumps(facts))})
        path = into / table / f"{PACKED}.parquet"
        write_whole(path, lambda file, data=data: pq.write_table(data, file, compression="zstd", write_page_checksum=True))
    if (run / asked.FILE).exists():
        directory.write_text(asked.FILE, asked.read(run).text())
    else:
        done.append(f"had no {asked.FILE}: what was asked is what its rows answer")
        directory.write_text(asked.FILE, asked.answered(tables["samples"].to_pandas()).text())
    said = list(dict.fromkeys([*environment.get("packed", []), *done]))  # a packed run keeps what was done to it before
    environment = {key: value for key, value in environment.items() if key != "host"} | {"packed": said or ["one part per table"]}
    directory.write_text("environment.json", hide(json.dumps(environment, indent=1)) + "\n")
    directory.write_text("config.yaml", hide(OmegaConf.to_yaml(config)))
    for name in _COPIED:
        if (run / name).is_dir():
            shutil.copytree(run / name, into / name)
        elif (run / name).exists():
            shutil.copyfile(run / name, into / name)
    summary(into)
    return into


def _trace(run: Path, target: Path, config: str, environment: dict, hide) -> Path:
    """A trace without host and folders; rows as they are."""
    into = _fresh(target.joinpath(*run.resolve().parts[-4:]))
    hidden = hide(json.dumps({key: value for key, value in environment.items() if key != "host"}, indent=1))
    for table, fields in trace.SCHEMAS.items():
        try:
            data = _shaped(parts.read(run / f"{table}.parquet"), pa.schema(fields))
        except (OSError, pa.ArrowException) as error:
            raise ConfigError("RUN", run / f"{table}.parquet", f"cannot be read ({one_line(error)})") from None
        data = data.replace_schema_metadata({"macbench": hidden})
        write_whole(into / f"{table}.parquet", lambda file, data=data: pq.write_table(data, file, compression="zstd"))
    for name, text in (("environment.json", hidden + "\n"), ("config.yaml", config)):
        write_whole(into / name, lambda file, text=text: file.write(text.encode()))
    return into


def _fresh(into: Path) -> Path:
    """A new folder."""
    try:
        into.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError("TARGET", into, "is there already") from None
    except OSError as error:
        raise ConfigError("TARGET", into, f"cannot be made ({error.strerror})") from None
    return into


def _hider(config, command: str):
    """Replaces the places that a configuration names, and ``data=`` of a preset's command, wherever they turn up."""
    named = {str(OmegaConf.select(config, key)) for key in _PLACES} | set(re.findall(r"\bdata=(/[^\s'\"]+)", command))
    places = sorted((place for place in named if "/" in place and place.strip("./")), key=len, reverse=True)

    def hide(text: str) -> str:
        for place in places:
            text = text.replace(place, PLACE)
        return text

    return hide


def _table(run: Path, table: str, done: list[str]) -> pa.Table:
    """All parts as one, in the schema of now; they must be the work of one version on one kind of machine."""
    schema, found, makers = SCHEMAS[table], [], set()
    for path in sorted((run / table).glob("part-*.parquet")):
        try:
            data = parts.read(path)
        except (OSError, pa.ArrowException) as error:
            raise ConfigError("RUN", path, f"cannot be read ({one_line(error)})") from None
        foreign = [field.name for field in data.schema if field not in list(schema)]
        if foreign:
            raise ConfigError("RUN", path, f"has columns of another kind ({', '.join(foreign)})")
        absent = [field.name for field in schema if field.name not in data.schema.names]
        note = f"{table} had no {', '.join(absent)}"
        if absent and note not in done:
            done.append(note)
        found.append(_shaped(data, schema))
        metadata = (data.schema.metadata or {}).get(b"macbench")
        makers.add(label(metadata))
    if not found:
        raise ConfigError("RUN", run, f"has no {table}")
    if len(makers) > 1:
        raise ConfigError("RUN", run, f"was made by {len(makers)} versions or machines ({'; '.join(sorted(makers))}); only one can be packed")
    return pa.concat_tables(found).replace_schema_metadata({"macbench": metadata or b"{}"})


def _shaped(data: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of a schema; those that the table lacks are null."""
    columns = [data[f.name].cast(f.type) if f.name in data.schema.names else pa.nulls(len(data), f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _json(path: Path) -> dict:
    try:
        return document(path)
    except (OSError, ValueError) as error:
        raise ConfigError("RUN", path.parent, f"is not a run folder ({one_line(error)})") from None


def main() -> None:
    wrong = 0
    with ending("packed") as at:
        folders = [Path(argument) for argument in sys.argv[1:]]
        if len(folders) < 2 or not all(sys.argv[1:]):
            raise ConfigError("RUN", "", "name a target and runs: python -m macbench.pack runs/reference runs/ruler/smollm2/4096/mac-1a2b3c4d")
        for run in folders[1:]:
            at(run)
            made = pack(run, folders[0])
            if (made / "texts.parquet").exists():
                print(f"{run} -> {made}: a trace, whose rows nothing else vouches for")
                continue
            found = verify(made)
            wrong += len(found.wrong)
            print(f"{run} -> {made}: {found.text()}", end="")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
