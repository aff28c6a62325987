"""Make some examples of a run again and compare: same texts, same counts, row by row."""

import random
import tempfile
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from macbench import environment, settings
from macbench import run as runner
from macbench.counting import TOTALS
from macbench.errors import ConfigError
from macbench.generate import answers
from macbench.models.fingerprint import hashes
from macbench.models.weights import load
from macbench.records import LOCATIONS, PLACE
from macbench.untrusted import configuration

# Of a sample row; times differ, and ratios follow from counts.
_SAME = ("text", "score", "finish_reason", "prompt_tokens", "new_tokens", "decode_steps", *TOTALS)


def regenerate(run: Path, tables: dict[str, pd.DataFrame], examples: int, choice: random.Random, device: str, found, places: dict[str, str]) -> None:
    """Adds to ``found`` (see verify.py) what is different. ``tables``: those of the run. ``places``: by key of LOCATIONS, where it lies here;
    else the place that the run names or, if pack.py took it out, the default. Resumed generations are left out: see partial.py.
    """
    cfg = configuration(run)
    settings.own_classes_only(cfg)
    settings.check_numbers(cfg, "seed", "engine.page_size", "engine.prefill_chunk")  # of what a command must be; earlier ones had fewer keys
    cfg.device = device
    _locate(cfg, places)
    plan = runner.prepare(cfg)
    name = runner.run_name(cfg, plan)
    if name != run.resolve().name:
        raise ConfigError("RUN", run, f"its configuration now makes {name}: data, protocol or defaults changed, or dtype and backend on this device")
    model = load(cfg.model, plan.device, plan.chat, runner.cache_bytes(cfg, plan))
    now = environment.facts(plan.device, plan.layer.name, str(plan.dtype), hashes(cfg.model))
    found.notes += environment.continued(run, now)
    samples = tables["samples"]
    resumed = samples.meta.str.contains('"resumed_at"', na=False) | samples.error.notna()
    groups = samples.assign(resumed=resumed).groupby(["subtask", "example_id"]).resumed.any()
    places = sorted(groups.index[~groups])
    chosen = choice.sample(places, min(examples, len(places)))
    engine = runner.make_engine(cfg, plan.layer, plan.ctx, model)
    for start in range(0, len(chosen), engine.batch):
        group = [plan.example(subtask, int(index)) for subtask, index in chosen[start : start + engine.batch]]
        with tempfile.TemporaryDirectory() as scratch:
            made = answers(engine, model, plan.task, plan.variants, group, Path(scratch), lambda stage: lambda tokens: None)
        for example, answered in zip(group, made, strict=True):
            again = pd.DataFrame(runner.records(engine.ctx, plan.task, plan.variants, example, answered, run.name)["samples"])
            mine = samples[(samples.subtask == example.subtask) & (samples.example_id == example.example_id)]
            found.wrong += _differences(mine, again)
    if chosen:
        found.notes.append(f"made again: {', '.join(f'{subtask} {index}' for subtask, index in chosen)}")


def _locate(cfg, places: dict[str, str]) -> None:
    for key in LOCATIONS:
        recorded = OmegaConf.select(cfg, key)
        if key in places:
            OmegaConf.update(cfg, key, places[key])
        elif recorded == PLACE and key == "model.adapter":
            raise ConfigError(key, recorded, "the run does not say where it lay; say where it lies here")
        elif recorded == PLACE:
            OmegaConf.update(cfg, key, None)


def _differences(recorded: pd.DataFrame, again: pd.DataFrame) -> list[str]:
    lines = []
    for row in recorded.itertuples():
        (new,) = again[(again.method == row.method) & (again.variant == row.variant)].to_dict("records")
        if new.get("error"):
            different = [f"error: {new['error']}"]
        else:
            different = [column for column in _SAME if new[column] != getattr(row, column)]
        if different:
            lines.append(f"{row.method} {row.variant} {row.subtask} {row.example_id} made again differs in {', '.join(different)}")
    return lines
