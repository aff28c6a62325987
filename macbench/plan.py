"""What a configuration would measure: its cells, which of them are there already, and a forecast of time and disk from measured rates."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from macbench import cli
from macbench.errors import FOREIGN, ConfigError
from macbench.records import KEY, read_table
from macbench.untrusted import configuration, document

_SHOWN = 12  # lines of cells


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


def describe(cfg: DictConfig, pace: float | None, gpu: bool = False) -> str:
    """A few lines of text. ``pace``: measured seconds per cell, for tasks whose records do not tell; ``gpu``: it is for one, even if none is here."""
    found = plan(cfg)
    lines = [f"   {'there  ' if there else 'missing'} {name}" for name, there in found.cells]
    if len(lines) > _SHOWN:
        lines = [*lines[: _SHOWN - 1], f"   ... {len(lines) - _SHOWN + 1} more"]
    seconds, size, source = forecast(cfg, found, pace, gpu)
    cost = "nothing to do" if not found.missing else "no rate measured here: run one cell" if seconds is None else f"about {duration(seconds)}"
    disk = f", {size / 1e6:.2g} MB" if size and found.missing else ""
    count = f"{len(found.cells)} cells, {len(found.cells) - found.missing} there, {found.missing} missing: {cost}{disk}{source}"
    lines.append(f"   {'cells not counted' if found.note else count}")
    return "\n".join([*lines, f"   into {found.folder}", *[f"   note: {found.note}"] * bool(found.note)])


def plan(cfg: DictConfig) -> Plan:
    """The cells of a configuration; a model whose files are not here leaves them uncounted as missing, with a note."""
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
        subtasks = cfg.task.get("subtasks") or ["every subtask"]
        names = [f"{cfg.method.name}, {', '.join(cfg.compare)} / {subtask} / {cfg.limit} examples" for subtask in subtasks]
        return Plan([(name, False) for name in names], Path(cfg.runs_dir) / cfg.task.name, f"not checked further: {error}")
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


def forecast(cfg: DictConfig, found: Plan, pace: float | None, gpu: bool = False) -> tuple[float | None, float, str]:
    """(seconds, bytes, where the rate is from) of the missing cells."""
    if pace is not None:
        return found.missing * pace, found.missing * 2e3, f" (at {pace:g} s per cell, measured with this preset)"
    rates = pd.DataFrame(_rates(cfg, gpu))
    if rates.empty:
        return None, 0.0, ""
    rates = rates.assign(far=(rates.ctx / cli.parse_ctx(cfg.ctx) - 1).abs()).sort_values("far")
    best = rates.iloc[0]
    seconds = best.prefill / found.variants + best.decode
    return found.missing * seconds, found.missing * best.disk, f" (at {seconds:.2g} s per cell, measured in {best.run})"


def _rates(cfg: DictConfig, gpu: bool) -> list[dict]:
    """Seconds of prefill per example, and of decoding and bytes per (example, variant), of recorded runs of the same model and kind of task
    on the same kind of machine."""
    from macbench.models.weights import resolve_device
    from macbench.run import model_name

    gpu = (gpu and cfg.device == "auto") or resolve_device(cfg.device) != "cpu"
    wanted, rows = "NVIDIA" if gpu else "cpu", []
    for root in dict.fromkeys([Path(cfg.runs_dir), Path("runs")]):
        for folder in {p.parent.parent for p in root.glob("**/samples/*.parquet")}:
            facts = folder / "environment.json"
            if folder.parent.parent.name != model_name(cfg) or cfg.task.name not in folder.parts[-4] or not facts.exists():
                continue
            try:
                there = str(document(facts)["device"])
                batch = configuration(folder).get("batch") or 1
            except (ConfigError, *FOREIGN):
                continue
            if not there.startswith(wanted):
                continue
            frame = read_table(folder, "samples", ["prefill_s", "decode_s", "error", "ctx"])
            frame = frame[frame.error.isna()]
            size = sum(p.stat().st_size for p in folder.glob("*/*.parquet")) / max(1, len(frame))
            if len(frame):
                prefill, decode = frame.prefill_s.mean(), frame.decode_s.mean() / batch
                rows.append({"prefill": prefill, "decode": decode, "disk": size, "ctx": frame.ctx.iloc[0], "run": str(folder)})
    return rows


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
