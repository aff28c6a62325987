"""What a configuration would measure: its cells, which of them are there already, and a forecast of time and disk from measured rates."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pyarrow as pa
from omegaconf import DictConfig, OmegaConf

from macbench import cli, parts
from macbench.errors import FOREIGN, ConfigError
from macbench.models.weights import resolve_device
from macbench.records import KEY, PACKED, read_table
from macbench.untrusted import configuration, document

_SHOWN = 12  # lines of cells
# Bytes on disk per row or text in the reference runs, for where no such record is.
_BYTES = {"attention": 300, "decode": 1450, "trace": 13_000}
Pace = tuple[float, str]  # seconds per cell, and in words whether that was measured


@dataclass
class Plan:
    """``cells``: a line each, with True if its result is there. ``folder``: where results go. ``note``: what could not be found out.
    ``variants``: how many cells share a prefill."""

    cells: list[tuple[str, bool]]
    folder: Path
    note: str = ""
    variants: int = 1

    @property
    def missing(self) -> int:
        return sum(not there for _, there in self.cells)


def describe(cfg: DictConfig, pace: Pace | None, gpu: bool = False) -> str:
    """A few lines of text. ``pace``: for tasks whose records do not tell; ``gpu``: it is for one, even if none is here."""
    found = plan(cfg)
    if found.note:
        return f"   cells not counted: {found.note}\n   into {found.folder}"
    lines = [f"   {'there  ' if there else 'missing'} {name}" for name, there in found.cells]
    if len(lines) > _SHOWN:
        lines = [*lines[: _SHOWN - 1], f"   ... {len(lines) - _SHOWN + 1} more"]
    cost = "nothing to do"
    if found.missing:
        (seconds, time_from), (size, size_from) = forecast(cfg, found, pace, gpu), disk(cfg, found)
        cost = "no rate measured here: run one cell" if seconds is None else f"about {duration(seconds)} ({time_from})"
        cost += "" if size is None else f", {size / 1e6:.2g} MB ({size_from})"
    lines.append(f"   {len(found.cells)} cells, {len(found.cells) - found.missing} there, {found.missing} missing: {cost}")
    return "\n".join([*lines, f"   into {found.folder}"])


def plan(cfg: DictConfig) -> Plan:
    """The cells of a configuration; a model or data that is not here leaves them uncounted, with a note."""
    from macbench import run

    if cfg.task.name in ("attention", "decode"):
        target = run.target(cfg)
        return Plan([(name, target.exists()) for name in _synthetic(cfg)], target)
    if cfg.task.name == "trace":
        target = run.target(cfg)
        names = [f"{task}/{subtask}/{i}" for task, subtask, count in _sources(cfg) for i in range(count)]
        return Plan([(name, (target / "config.yaml").exists()) for name in names], target)  # written when every text is there
    try:
        prepared = run.prepare(cfg)
    except ConfigError as error:
        return Plan([], Path(cfg.runs_dir) / cfg.task.name, str(error))
    folder = run.run_folder(cfg, prepared)
    done = _done(folder)
    wanted = [(v.name, v.label, subtask, str(i)) for subtask, i in prepared.asked.places() for v in prepared.variants]
    return Plan([(" ".join(filter(None, key)), key in done) for key in wanted], folder, variants=len(prepared.variants))


def _done(folder: Path) -> set[tuple]:
    frame = read_table(folder, "samples", [*KEY, "error"])
    return set(frame[frame.error.isna()][KEY].itertuples(index=False, name=None))


def _synthetic(cfg: DictConfig) -> list[str]:
    """Rows of task=attention and task=decode."""

    def several(value) -> list:
        return list(value) if OmegaConf.is_list(value) else [value]

    task = cfg.task
    batch = several(task.batch if cfg.batch is None else cfg.batch)
    mac = cfg.method.name == "mac"
    rates = [f"mac {rate}" for rate in several(task.hit_rate)] * mac
    if task.name == "decode":
        kinds = [f"full {b}" for b in several(task.backends)] + ["full generate"] * bool(task.generate) + rates
        return [f"ctx {c}, batch {b}: {kind}" for c, b, kind in product(several(cfg.ctx), batch, kinds)]
    mixed = [f"mac {r} {m}" for r in several(task.hit_rate) for m in (several(task.misses) if 0 < float(r) < 1 else [""])] * mac
    windows = several(task.window if task.window is not None else cfg.method.get("window", 512))
    kinds = [f"full {b}" for b in several(task.backends)] + [f"{k}, K {w}" for w in windows for k in [*["match"] * bool(task.match), *mixed]]
    return [f"{h} heads, batch {b}, ctx {c}: {kind}" for h, b, c, kind in product(several(task.heads), batch, several(cfg.ctx), kinds)]


def _sources(cfg: DictConfig) -> list[tuple[str, str, int]]:
    found = []
    for name, changes in cfg.task.sources.items():
        if changes is not None:
            subtasks = changes.get("subtasks") or ["every subtask"]
            found += [(name, subtask, min(cfg.limit, changes.get("limit", cfg.limit))) for subtask in subtasks]
    return found


def forecast(cfg: DictConfig, found: Plan, pace: Pace | None, gpu: bool = False) -> tuple[float | None, str]:
    """Seconds that the missing cells take, and where the rate is from."""
    if pace is not None:
        return found.missing * pace[0], f"at {pace[0]:g} s per cell, {pace[1]}"
    gpu = (gpu and cfg.device == "auto") or resolve_device(cfg.device) != "cpu"
    rates = [rate for rate in _recorded(cfg) if rate.device.startswith("NVIDIA" if gpu else "cpu")]
    if not rates:
        return None, ""
    seconds = rates[0].prefill / found.variants + rates[0].decode
    return found.missing * seconds, f"at {seconds:.2g} s per cell, measured in {rates[0].run}"


def disk(cfg: DictConfig, found: Plan) -> tuple[float | None, str]:
    """Bytes of the missing cells' records, and where the rate is from."""
    if cfg.task.name in _BYTES:
        cells, size, places = 0, 0, set()
        for path in {p for root in _roots(cfg) for p in root.glob(f"**/{cfg.task.name}/**/*.parquet")}:
            if cfg.task.name != "trace" or path.name == "texts.parquet":  # a text has a row there and many in the tables beside it
                try:
                    with parts.opened(path) as file:
                        cells += file.metadata.num_rows
                except (OSError, ValueError, pa.ArrowException):
                    continue
                files = path.parent.glob("*.parquet") if cfg.task.name == "trace" else [path]
                size += sum(p.stat().st_size for p in files)
                places.add(str(path.parent))
        each = size / cells if cells else _BYTES[cfg.task.name]
        return found.missing * each, f"{each:,.0f} B per cell, " + (f"as in {', '.join(sorted(places))}" if cells else "as in the reference runs")
    rates = _recorded(cfg)
    if not rates:
        return None, ""
    return found.missing * rates[0].disk, f"{'packed ' * rates[0].packed}as in {rates[0].run}"


@dataclass
class _Rate:
    """Of a recorded run: seconds of prefill per example, and of decoding and bytes on disk per (example, variant)."""

    prefill: float
    decode: float
    disk: float
    ctx: int
    device: str
    packed: bool
    run: Path


def _roots(cfg: DictConfig) -> list[Path]:
    return list(dict.fromkeys([Path(cfg.runs_dir), Path("runs")]))


def _recorded(cfg: DictConfig) -> list[_Rate]:
    """Recorded runs of the same model and kind of task, those of the nearest context first."""
    from macbench.run import model_name

    found = []
    for folder in sorted({p.parent.parent for root in _roots(cfg) for p in root.glob("**/samples/*.parquet")}):
        if folder.parent.parent.name != model_name(cfg) or cfg.task.name not in folder.parts[-4]:
            continue
        try:
            device = str(document(folder / "environment.json")["device"])
            batch = configuration(folder).get("batch") or 1
            frame = read_table(folder, "samples", ["prefill_s", "decode_s", "error", "ctx"])
        except (ConfigError, *FOREIGN):
            continue
        frame = frame[frame.error.isna()]
        size = sum(p.stat().st_size for p in folder.glob("*/*.parquet")) / max(1, len(frame))
        if len(frame):
            packed = (folder / "samples" / f"{PACKED}.parquet").exists()
            found.append(_Rate(frame.prefill_s.mean(), frame.decode_s.mean() / batch, size, int(frame.ctx.iloc[0]), device, packed, folder))
    return sorted(found, key=lambda rate: abs(rate.ctx / cli.parse_ctx(cfg.ctx) - 1))


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
