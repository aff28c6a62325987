"""Make some examples of a run again and compare: same texts, same counts, row by row."""

import json
import random
import tempfile
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from macbench import environment, settings
from macbench import run as runner
from macbench.counting import TOTALS
from macbench.errors import ConfigError, one_line
from macbench.generate import answers
from macbench.models.fingerprint import hashes
from macbench.models.weights import load
from macbench.records import LOCATIONS, PLACE
from macbench.untrusted import configuration

Place = tuple[str, int]
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
    groups = _groups(run, samples, plan.asked.places(), cfg.batch or 1)
    chosen = choice.sample(sorted(groups), min(examples, len(groups)))
    engine = runner.make_engine(cfg, plan.layer, plan.ctx, model)
    for group, known in dict.fromkeys(groups[place] for place in chosen):
        together = [plan.example(*place) for place in group]
        with tempfile.TemporaryDirectory() as scratch:
            made = answers(engine, model, plan.task, plan.variants, together, Path(scratch), lambda stage: lambda tokens: None)
        for example, answered in zip(together, made, strict=True):
            again = pd.DataFrame(runner.records(engine.ctx, plan.task, plan.variants, example, answered, run.name)["samples"])
            mine = samples[(samples.subtask == example.subtask) & (samples.example_id == example.example_id)]
            doubt = "" if known else "; the run does not say which examples were a batch, and another batch rounds otherwise"
            if (example.subtask, int(example.example_id)) in groups:
                found.wrong += [line + doubt for line in _differences(mine, again)]
    if chosen:
        found.notes.append(f"made again: {', '.join(f'{subtask} {index}' for subtask, index in chosen)}")


def _groups(run: Path, samples: pd.DataFrame, places: list[Place], batch: int) -> dict[Place, tuple[tuple[Place, ...], bool]]:
    """For each example that can be made again, those that decoded in step with it, in their order, and whether the run says so.

    Of earlier versions, which did not record it, it is what one process would have taken in the order of ``places``. Left out are failed
    and resumed generations, and examples of whose methods some decoded in step with others. A ConfigError for what cannot have been a batch.
    """
    rows_of = dict(list(samples.groupby(["subtask", "example_id"])))
    order, found = {place: i for i, place in enumerate(places)}, {}
    for (subtask, index), rows in rows_of.items():
        place = subtask, int(index)
        try:
            facts = [json.loads(meta or "{}") for meta in rows.meta]
            recorded = {tuple(map(str, fact.get("decoded_with", ()))) for fact in facts}
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError("RUN", run, f"meta of {subtask} {index} cannot be read ({one_line(error)})") from error
        if rows.error.notna().any() or any("resumed_at" in fact for fact in facts) or len(recorded) > 1:
            continue
        names = [tuple(name.rpartition("/")[::2]) for name in recorded.pop()]
        if len(names) > batch or not {*names} <= rows_of.keys():
            raise ConfigError("RUN", run, f"meta of {subtask} {index} names examples of a batch ({len(names)}) that the run does not have")
        known = bool(names) or batch == 1 or place not in order
        start = 0 if known else order[place] // batch * batch
        guess = [place] if known else places[start : start + batch]
        found[place] = tuple((subtask, int(index)) for subtask, index in names) or tuple(guess), known
    return found


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
