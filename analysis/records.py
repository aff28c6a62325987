"""What there is to draw: every record below some folders, and one clear line about whatever a figure does not find."""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pandas as pd
import pyarrow as pa

from analysis.load import run_folders, samples
from macbench import parts
from macbench.cli import LONG_MODEL, load_option
from macbench.errors import ConfigError, one_line
from macbench.records import KEY, read_table
from macbench.summary import headline, summarise

# What figures and summaries take from sample rows. Other columns may be younger than a recorded run.
_COUNTS = ["tokens_log", "tokens_phys", "tokens_log_full", "tokens_phys_full"]
_COUNTS += [f"bytes_{category}" for category in ("kv", "meta", "state", "idx", "write", "maint", "full")]
NEEDED = [
    *KEY,
    "task",
    "ctx",
    "decode_steps",
    "score",
    "prefill_s",
    "decode_s",
    *_COUNTS,
    "rho_bytes",
    "hit_rate",
    "top1_agreement",
    "kl_mean",
    "error",
]


class Missing(Exception):
    """What a figure needs and does not find, in one line."""


@cache
def shipped() -> str:
    """sha256 of the adapter that ships."""
    return load_option("model", LONG_MODEL).adapter_sha256


@dataclass(frozen=True)
class Source:
    """A parquet file, or a folder of them, and what its metadata says of how it was made."""

    path: Path
    facts: dict

    @property
    def device(self) -> str:
        return self.facts.get("device") or "cpu"

    @property
    def machine(self) -> str:
        """A short name for titles."""
        return "CPU" if self.device.startswith("cpu") else self.device.removeprefix("NVIDIA ").split()[0]

    @property
    def question(self) -> str:
        """'' where questions are part of the prefill, as they are by default; else a few words for the other protocol."""
        return "" if (self.facts.get("identity") or {}).get("question_in_prefill", True) else "question not in prefill"

    @property
    def adapter(self) -> str:
        """'' or, of a model with an adapter other than the one that ships, a few words that tell it."""
        model = (self.facts.get("identity") or {}).get("model") or {}
        if not model.get("adapter") or model.get("adapter_sha256") == shipped():
            return ""
        return f"adapter {(model.get('adapter_sha256') or self.facts.get('model_sha256') or 'unknown')[:8]}"

    @property
    def apart(self) -> str:
        """What keeps a run apart from others of its model, task and length: '' or a few words. Such runs are never one curve or row."""
        return ", ".join(filter(None, [self.question, self.adapter]))

    @property
    def commit(self) -> str:
        git = self.facts.get("git") or {}
        return (git.get("commit") or "unknown")[:8] + (" with changes" if git.get("dirty") else "")

    def part(self, done: Collection[str]) -> str:
        """'' of a run with rows of every subtask of its protocol, else how many it has: a mean over fewer is another mean."""
        known = (self.facts.get("protocol") or {}).get("subtasks") or ()
        return f"{len(done)} of {len(known)} subtasks" if len(done) < len(known) else ""


def read(path: Path, columns: Iterable[str]) -> pd.DataFrame:
    """Some columns of a parquet file; Missing says which file or column is not there."""
    columns = list(columns)
    if not path.exists():
        raise Missing(f"{path} is not there")
    try:
        lacking = [c for c in columns if c not in _schema(path).names]
        if lacking:
            raise Missing(f"{path} has no column {', '.join(lacking)}")
        return parts.read(path, columns).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise Missing(f"{path} cannot be read ({one_line(error)})") from error


def _schema(path: Path) -> pa.Schema:
    with parts.opened(path) as file:
        return file.schema_arrow


def facts(path: Path) -> dict:
    """The metadata of a parquet file of macbench; {} if it has none or is damaged, which ``read`` reports."""
    try:
        return json.loads((_schema(path).metadata or {}).get(b"macbench", b"{}"))
    except (OSError, ValueError, pa.ArrowException):
        return {}


def times_methods(path: Path) -> bool:
    """Whether a file is one of ``macbench.attention methods``, by its schema; False of a damaged one."""
    try:
        return bool({"bytes_counted", "rho_bytes"} & set(_schema(path).names))
    except (OSError, ValueError, pa.ArrowException):
        return False


class Records:
    """Records below ``roots``. Where the same was measured on several machines, a GPU's count; of several runs, the last."""

    def __init__(self, *roots: Path | str):
        self.roots = [Path(root) for root in roots]
        self.damaged: set[str] = set()  # files beside others that were read: a line each
        self._summaries: dict[Path, tuple[pd.DataFrame, pd.DataFrame] | Missing] = {}
        self._complete: set[tuple[Path, str]] = set()  # tables of runs

    def _files(self, pattern: str) -> list[Path]:
        return list(dict.fromkeys(p for root in self.roots for p in sorted(root.rglob(pattern))))

    @cached_property
    def runs(self) -> list[Path]:
        """Folders of accuracy runs."""
        found = run_folders(*self.roots)
        known = set(found)
        for folder in dict.fromkeys(p.parent.parent.resolve() for p in self._files("samples/part-*.parquet")):
            if folder not in known:
                self.damaged.add(f"{folder} has samples and no summary.json: the run is not finished, or the file is missing")
        return found

    @cached_property
    def trace(self) -> Source:
        """The folder of a trace."""
        files = self._files("trace/**/*.parquet")
        if not files:
            raise Missing("no trace; python -m macbench.run +experiment=fig2 scale=cpu makes one")
        # Every table says how it was made; one of them may be missing or damaged.
        made = [(path.parent, known) for path in files if {"model", "dtype", "method"} <= set(known := facts(path))]
        if not made:
            raise Missing(f"{files[0].parent}: no table has the metadata of macbench, which says how it was made")
        return Source(*max(made, key=lambda m: ("NVIDIA" in m[1].get("device", ""), m[1].get("started", ""), str(m[0]))))

    def traced(self, table: str, columns: Iterable[str]) -> pd.DataFrame:
        """A table of the trace, with column ``unit``: which text a row is of."""
        frame = read(self.trace.path / f"{table}.parquet", ["task", "subtask", "example_id", *columns])
        if frame.empty:
            raise Missing(f"{self.trace.path / table}.parquet is empty: no text was long enough")
        return frame.assign(unit=frame.task + "/" + frame.subtask + "/" + frame.example_id)

    def benchmark(self, kind: str, columns: Iterable[str], of_methods: bool = False) -> tuple[pd.DataFrame, list[Source]]:
        """Rows of task=attention or task=decode without the failed ones, and their files, the newest last; column ``file`` numbers these.

        ``of_methods``: of files that time every method at one budget (macbench.attention methods), which
        else are left out; of those the failed rows, too, whose ``error`` says why a method cannot read so little.
        """
        sources = [Source(path, facts(path)) for path in self._files(f"{kind}/**/*.parquet") if times_methods(path) == of_methods]
        sources.sort(key=lambda s: str(s.facts.get("started", "")))  # of those without a date the order of the paths stays
        gpu = any("NVIDIA" in s.device for s in sources)
        # A file that says nothing of its device is damaged, most likely, and then that is to be said.
        chosen, frames, damaged = [s for s in sources if not gpu or "NVIDIA" in s.device or not s.facts], [], []
        for i, source in enumerate(chosen):
            try:
                frame = read(source.path, [*columns, "error"])
                frames.append(frame[frame.error.isna() | of_methods].assign(file=i))
            except Missing as lack:
                damaged.append(str(lack))
        if not frames:
            raise Missing("; ".join(damaged) or f"no record of task={kind}; python -m macbench.run task={kind} makes one")
        self.damaged.update(damaged)
        return pd.concat(frames, ignore_index=True), chosen

    def step_times(self, run: Path) -> tuple[pd.Series, list[Source]]:
        """Median ms of a decode step by (method, budget) at the context and on the device of a run, from runs that had the card to themselves
        (analysis.step_times), and the files; empty without one."""
        kind, found, used = self.source(run).device, [], []
        for path in self._files("step_times.parquet"):
            try:
                frame = read(path, ["ctx", "method", "budget", "ms", "device"])
            except Missing as lack:
                self.damaged.add(str(lack))
                continue
            frame = frame[(frame.device == kind) & (frame.ctx == int(run.parent.name))]
            if len(frame):
                found.append(frame)
                used.append(Source(path, facts(path)))
        if not found:
            return pd.Series(dtype=float), []
        return pd.concat(found).groupby(["method", "budget"]).ms.median(), used

    def table(self, run: Path, name: str, columns: Iterable[str]) -> pd.DataFrame:
        """A table of an accuracy run."""
        found = sorted((run / name).glob("part-*.parquet"))
        if not found:
            raise Missing(f"{run / name} has no parts")
        columns = list(columns)
        for part in found:
            read(part, columns[:1])
        lacking = {c for part in found for c in columns if c not in _schema(part).names}
        if lacking:
            raise Missing(f"{run / name} has no column {', '.join(sorted(lacking))}")
        if name in ("steps", "layers") and (run, name) not in self._complete:
            self._whole(run, name)
            self._complete.add((run, name))
        return read_table(run, name, columns)

    def _whole(self, run: Path, name: str) -> None:
        """Missing if a table lacks rows: of every answer in ``samples`` it has a row per decode step or per layer, for the methods it is kept of."""
        try:
            answers = read_table(run, "samples", [*KEY, "decode_steps"]).dropna(subset="decode_steps")
            rows = read_table(run, name, [*KEY, *["layer"] * (name == "layers")])
        except ConfigError as error:
            raise Missing(f"{run}: {one_line(error)}") from error
        answers = answers[answers.method.isin(self.source(run).facts.get(f"{name}_of", answers.method))]
        each = answers.set_index(KEY).decode_steps
        if name == "layers":
            each = pd.Series(rows.layer.max() + 1, each.index)
        absent = int((each - rows.groupby(KEY).size().reindex(each.index, fill_value=0)).clip(lower=0).sum())
        if absent:
            raise Missing(f"{run / name} lacks {absent:,} of {int(each.sum()):,} rows that follow from samples")

    def samples(self, run: Path) -> pd.DataFrame:
        """Finished sample rows of a run (see analysis.load); Missing names the column, part or file that is not there."""
        return self._run(run)[0]

    def headline(self, run: Path) -> pd.DataFrame:
        """A row per method variant over all subtasks, see macbench.summary."""
        return self._run(run)[1]

    def _run(self, run: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
        if run not in self._summaries:
            try:
                self._summaries[run] = self._summarised(run)
            except Missing as lack:
                self._summaries[run] = lack
        if isinstance(self._summaries[run], Missing):
            raise self._summaries[run]
        return self._summaries[run]

    def _summarised(self, run: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
        self.table(run, "samples", NEEDED)
        try:
            frame = samples(run)
            rows = json.loads((run / "summary.json").read_text())
            known = sum(row["examples"] for row in rows if row["subtask"] != "all" and row["steps"])
        except (ConfigError, OSError, ValueError, KeyError, TypeError) as error:
            raise Missing(f"{run}: {one_line(error)}") from error
        if len(frame) < known:
            raise Missing(f"{run / 'samples'} has {len(frame)} of the {known} finished examples of summary.json: a part is missing")
        for name in ("steps", "layers"):  # what is drawn of samples alone does not need them
            try:
                self.table(run, name, KEY)
            except Missing as lack:
                self.damaged.add(str(lack))
        if frame.empty or frame.rho_bytes.isna().all():
            raise Missing(f"{run} has no finished example with a decode step")
        return frame, headline(summarise(frame, each=False))

    def source(self, run: Path) -> Source:
        """Where an accuracy run was made."""
        try:
            return Source(run, json.loads((run / "environment.json").read_text()))
        except (OSError, ValueError) as error:
            raise Missing(f"{run / 'environment.json'} cannot be read ({one_line(error)})") from error
