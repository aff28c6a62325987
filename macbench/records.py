"""What a run writes: one folder, three parquet tables in parts, and a summary. Nothing here knows how records were made.

    runs/<task>/<model>/<ctx>/<method>-<hash8>/
        config.yaml  environment.json  asked.json  summary.json
        samples/part-*.parquet   a row per example and method variant
        steps/part-*.parquet     a row per decode step
        layers/part-*.parquet    a row per example, variant and layer

A part is written whole (temporary file, fsync, rename, fsync of the folder), so that a killed run leaves complete parts only. The sample part of an
example is written last: an example counts as done when it is there, and a rerun makes only what is missing. A part's name follows from
its example, so that however many processes work on a run (see ``leases.py``) there is one row per example and variant.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from macbench import parts
from macbench.errors import ConfigError, one_line
from macbench.files import SCRATCH, Stamp, make_folder, stamp, write_in_order
from macbench.redact import redact

_KEY = [("run_id", pa.string()), ("method", pa.string()), ("variant", pa.string()), ("subtask", pa.string()), ("example_id", pa.string())]
_COUNTS = [
    (name, pa.int64())
    for name in (
        *("tokens_log", "tokens_phys", "bytes_kv", "bytes_meta", "bytes_state", "bytes_idx", "bytes_write", "bytes_maint"),
        *("tokens_log_full", "tokens_phys_full", "bytes_full"),
    )
]
_RATIOS = [(name, pa.float64()) for name in ("rho_log", "rho_phys", "rho_bytes", "hit_rate")]

SCHEMAS = {
    "samples": pa.schema(
        [
            *_KEY[:3],
            ("task", pa.string()),
            *_KEY[3:],
            ("ctx", pa.int64()),
            ("prompt_tokens", pa.int64()),
            ("new_tokens", pa.int64()),
            ("decode_steps", pa.int64()),
            ("question_steps", pa.int64()),  # of these: with question_in_prefill=false, a step per token of the question
            ("text", pa.string()),
            ("reference", pa.list_(pa.string())),
            ("score", pa.float64()),
            ("finish_reason", pa.string()),
            ("prefill_s", pa.float64()),
            ("setup_s", pa.float64()),
            ("decode_s", pa.float64()),
            ("tpot_ms", pa.float64()),
            *_COUNTS,
            ("bytes_pre", pa.int64()),
            *_RATIOS,
            ("rho_page", pa.float64()),  # over the followed steps
            ("first_divergence", pa.int64()),
            ("top1_agreement", pa.float64()),
            ("kl_mean", pa.float64()),
            ("output_error", pa.float64()),  # mean over layers
            ("meta", pa.string()),  # JSON: what the task knows of the example, and texts of earlier calls
            ("error", pa.string()),
        ]
    ),
    "steps": pa.schema(
        [
            *_KEY,
            ("step", pa.int64()),
            ("position", pa.int64()),
            ("latency_ms", pa.float64()),
            *_COUNTS,
            *_RATIOS,
            ("chain_mean", pa.float64()),
            ("chain_max", pa.int64()),
        ]
    ),
    "layers": pa.schema(
        [
            *(*_KEY, ("layer", pa.int64()), *_COUNTS, *_RATIOS, ("chain_mean", pa.float64()), ("chain_max", pa.int64())),
            ("output_error", pa.float64()),
        ]
    ),
}
# Columns that earlier versions of the schemas did not have yet.
_LATER = {
    "samples": {"question_steps", "setup_s", "bytes_pre", "rho_page", "output_error", "meta"},
    "steps": set(),
    "layers": {"output_error"},
}
KEY = ["method", "variant", "subtask", "example_id"]
# Name of the one part, without the suffix, that holds all examples of a run (see ``pack.py``).
PACKED = "part-all"
# Keys of a configuration that say where data and weights lie, and what stands there in a packed run.
LOCATIONS, PLACE = ("task.data_path", "model.gguf", "model.adapter"), "DIR"


def config_hash(config: dict) -> str:
    """Eight hex digits of a resolved configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:8]


def engine_knobs(engine: dict) -> dict:
    """What of the engine's knobs names a run: a later one that is off says nothing, so that runs from before there was it keep their names."""
    return {key: value for key, value in engine.items() if key != "batch_invariant" or value}


def placeless(model: dict) -> dict:
    """A model's settings without where its files lie and how they are spread: a file whose hash is fixed is the same one anywhere."""
    found = {key: value for key, value in model.items() if key != "device_map"}
    if found.get("gguf_sha256"):
        found["gguf"] = None
    if found.get("adapter") and found.get("adapter_sha256"):
        found["adapter"] = Path(found["adapter"]).name
    return found


def foreign(path: Path, data: pa.Table) -> str | None:
    """What rows of a part, by their keys, say against its place <run>/<table>/<part>.parquet; None if nothing does."""
    examples = set(zip(data["subtask"].to_pylist(), data["example_id"].to_pylist(), strict=True))
    if path.stem != PACKED and {part_name(*example) for example in examples} - {path.stem}:
        return "holds rows of another example"
    if {*data["run_id"].to_pylist()} - {path.resolve().parents[1].name}:
        return "holds rows of another run"
    return None


def completed(data: pa.Table, table: str) -> pa.Table | None:
    """A part of an earlier version of the schema with nulls for what came later; None if it is no such part."""
    now, names = SCHEMAS[table], set(data.schema.names)
    mine = [name for name in now.names if name in names]
    if set(now.names) - names - _LATER[table] or data.schema.names != mine or not all(_same_kind(field, table) for field in data.schema):
        return None
    columns = [data[field.name].cast(field.type) if field.name in names else pa.nulls(len(data), field.type) for field in now]
    return pa.Table.from_arrays(columns, schema=now.with_metadata(data.schema.metadata))


def _same_kind(field: pa.Field, table: str) -> bool:
    """Whether a column holds what the schema says; one that the schema does not know is no matter."""
    here = SCHEMAS[table].get_field_index(field.name)
    kind = SCHEMAS[table].types[here] if here >= 0 else field.type
    return field.type == kind or str(field.type).replace("element", "item") == str(kind)  # parquet's own name of what a list holds


def find_runs(root: Path) -> Iterator[Path]:
    """Run folders at or below ``root``, in order."""
    for folder, below, files in os.walk(root):
        if "environment.json" in files and "samples" in below:
            yield Path(folder)
            below.clear()
        below.sort()


def part_name(subtask: str, example_id: str) -> str:
    """Name of the parts of an example, without the suffix."""
    return "part-" + hashlib.sha256(f"{subtask}/{example_id}".encode()).hexdigest()[:16]


class RunDirectory:
    """A run's folder, opened for writing."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._samples: dict[str, tuple[Stamp, pa.Table]] = {}  # what was written of these
        try:
            for table in SCHEMAS:
                make_folder(self.path / table)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise ConfigError("runs_dir", self.path, f"cannot be written ({error.strerror})") from error

    @property
    def run_id(self) -> str:
        return self.path.name

    def write_text(self, name: str, text: str) -> None:
        """Write a small file whole."""
        self._whole([(self.path / name, redact(text).encode())])

    def write_examples(self, examples: dict[str, dict[str, list[dict]]], environment: dict) -> None:
        """Write all rows of some examples, by their ``part_name``; ``environment`` (small, JSON) goes into the parquet metadata.

        Of an example: ``samples`` a list of rows, ``steps`` and ``layers`` a list of blocks of columns (one text stands for a whole column).
        """
        metadata = {"macbench": redact(json.dumps(environment))}
        schemas = {table: schema.with_metadata(metadata) for table, schema in SCHEMAS.items()}
        samples = {part: pa.Table.from_pylist(tables["samples"], schema=schemas["samples"]) for part, tables in examples.items()}
        tables = {table: [_stacked(rows[table], schemas[table]) for rows in examples.values()] for table in ("steps", "layers")}
        tables["samples"] = list(samples.values())  # last: their presence says that the example is complete
        encoded = {table: [*map(_encoded, data)] for table, data in tables.items()}
        files = {part: [(self.path / table / f"{part}.parquet", encoded[table][i]) for table in encoded] for i, part in enumerate(examples)}
        try:
            stamps = self._whole([file for own in files.values() for file in own])
        except ConfigError:
            if len(files) == 1:
                raise
            stamps = [found for own in files.values() for found in self._whole(own)]  # a disk that is full may have room for some
        self._samples |= {part: (found, samples[part]) for part, found in zip(files, stamps[2::3], strict=True)}

    def _whole(self, files: list[tuple[Path, bytes | memoryview]]) -> list[Stamp]:
        whole = [(target, lambda file, content=content: file.write(content)) for target, content in files]
        for last in (False, False, True):
            try:
                return write_in_order(whole)
            except OSError as error:
                if last or not isinstance(error, FileNotFoundError):  # that one: another process ``tidied`` while this one wrote
                    raise ConfigError("runs_dir", self.path, f"cannot be written ({error.strerror})") from error

    def samples(self) -> pd.DataFrame:
        """All sample rows. Parts that this process has written are not read again, as long as they are still its own."""
        known = {part: data for part, (written, data) in self._samples.items() if self.stamp(part) == written}
        return read_table(self.path, "samples", known=known)

    def done(self, retry_failed: bool = False) -> set[tuple[str, str, str, str]]:
        """Keys (method, variant, subtask, example_id) of the examples that are recorded; ``retry_failed``: without an error."""
        frame = read_table(self.path, "samples", [*KEY, "error"], complete=True)
        return set(frame[frame.error.isna() | (not retry_failed)][KEY].itertuples(index=False, name=None))

    def tidy(self) -> None:
        """Remove what killed writers left of a file. Who is writing one just now writes it again."""
        for folder in (self.path, *(self.path / table for table in SCHEMAS)):
            for scratch in folder.glob(SCRATCH + "*"):
                scratch.unlink(missing_ok=True)

    def stamp(self, part: str) -> Stamp | None:
        """Changes whenever the sample part of an example is written; None without one."""
        try:
            return stamp((self.path / "samples" / f"{part}.parquet").stat())
        except FileNotFoundError:
            return None

    def stamps(self) -> dict[str, Stamp]:
        """The ``stamp`` of every sample part."""
        parts = [path.stem for path in (self.path / "samples").glob("part-*.parquet")]
        return {part: found for part in parts if (found := self.stamp(part))}


def read_table(
    path: Path | str, table: str, columns: list[str] | None = None, complete: bool = False, known: dict[str, pa.Table] | None = None
) -> pd.DataFrame:
    """All parts of a table of a run folder; a damaged or foreign part is a ConfigError that names it.

    ``complete``: leave out parts whose counterpart in another table is missing; damaged counterparts are errors too. ``known``: by their
    names, parts that need not be read.
    """
    found = sorted((Path(path) / table).glob("part-*.parquet"))
    if complete:
        found = [part for part in found if all(_readable(part.parent.parent / other / part.name) for other in SCHEMAS)]
    read = [data if (data := (known or {}).get(part.stem)) is not None else _read(part, table, columns) for part in found]
    if not read:
        return pd.DataFrame(columns=columns or SCHEMAS[table].names)
    # Those of one schema become a frame together, which takes little longer than one of them alone.
    frames = [pa.concat_tables(alike).to_pandas() for _, alike in groupby(read, lambda data: data.schema)]
    return pd.concat(frames, ignore_index=True)


def _read(part: Path, table: str, columns: list[str] | None) -> pa.Table:
    """A part, or some of its columns, as a ``SCHEMAS`` of ours or an earlier one says."""
    try:
        data = parts.read(part, columns)
        data.validate(full=True)  # bytes that are no text, say
        if not data.schema.equals(SCHEMAS[table]):
            if other := [field.name for field in data.schema if not _same_kind(field, table)]:
                raise ValueError(f"column {other[0]} is of another kind")
            if absent := {*SCHEMAS[table].names} - {*data.schema.names} - _LATER[table] if columns is None else None:
                raise ValueError(f"it has no column {min(absent)}")
        return data
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise _damaged(part, error, f"runs_dir ({table})") from error


def _encoded(data: pa.Table) -> memoryview:
    """A parquet file in memory, so that its hundreds of small pages cost one write. Dictionaries and statistics of numbers cost time and space."""
    file, texts = pa.BufferOutputStream(), [column.name for column in data.schema if column.type == pa.string()]
    pq.write_table(data, file, compression="zstd", use_dictionary=texts, write_page_checksum=True, write_statistics=False)
    return memoryview(file.getvalue())


def _stacked(blocks: list[dict], schema: pa.Schema) -> pa.Table:
    """Blocks of columns one below the other."""

    def block(columns: dict) -> pa.Table:
        length = max(len(column) for column in columns.values() if not isinstance(column, str))
        full = {name: pa.repeat(column, length) if isinstance(column, str) else column for name, column in columns.items()}
        return pa.Table.from_arrays([pa.array(full[name], type) for name, type in zip(schema.names, schema.types, strict=True)], schema=schema)

    return pa.concat_tables([schema.empty_table(), *map(block, blocks)]).combine_chunks()


def _readable(part: Path) -> bool:
    """Whether a part is there; raises if it is there but damaged (its footer is read, not its rows)."""
    try:
        if not part.exists():
            return False
        with parts.opened(part) as file:
            return file.metadata.num_columns > 0
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _damaged(part, error) from error


def _damaged(part: Path, error: Exception, key: str = "runs_dir") -> ConfigError:
    return ConfigError(key, part, f"cannot be read ({one_line(error)}); delete it to have it made again")
