"""task=trace as a run: decode real prompts with full attention, then compute from queries, keys and values what MAC would have done."""

import sys
from pathlib import Path
from time import perf_counter

import pandas as pd
import torch

from macbench import environment
from macbench.engine import Engine, Request
from macbench.errors import ConfigError
from macbench.files import write_whole
from macbench.methods.base import is_int
from macbench.methods.full import Full
from macbench.redact import redact
from macbench.sampling import StopStrings
from macbench.trace import amending, chains, matching, records
from macbench.trace.text import layers


def check(task: dict, method: dict) -> None:
    """Values of a task's and a method's YAML; a ConfigError names the wrong one."""
    if method["name"] != "mac":
        raise ConfigError("method", method["name"], "must be mac with task=trace, which is about what MAC finds")
    for key, least in (("windows", 1), ("bands", 0), ("samples", 1)):
        values = task[key] if isinstance(task[key], list) else [task[key]]
        if not values or not all(is_int(value, least) for value in values):
            raise ConfigError(f"task.{key}", task[key], f"must be integers of at least {least}")
    taus = task["taus"] if isinstance(task["taus"], list) else [task["taus"]]
    if not taus or not all(isinstance(t, int | float) and not isinstance(t, bool) and t >= 0 for t in taus):
        raise ConfigError("task.taus", task["taus"], "must be numbers of at least 0")
    if not isinstance(task["sources"], dict):
        raise ConfigError("task.sources", task["sources"], "must name tasks with their settings: {ruler: {subtasks: [vt]}}")


def run(task: dict, method: dict, model, examples: list, engine: Engine, target: Path, facts: dict, config: str) -> int:
    """One trace. Returns the exit code: 0, or 1 if no text was long enough. Texts that ``target`` has are kept; its tables grow batch by batch.

    ``examples``: see ``prompts.examples``; ``facts``: for the metadata; ``config``: the whole configuration as YAML.
    """
    reach = max(*task["windows"], method["window"])
    facts = facts | {"texts": len(examples)}
    tables = records.read(target)
    there = set(tables["texts"][records.KEY].itertuples(index=False, name=None)) if tables else set()
    examples = [(name, example) for name, example in examples if (name, example.subtask, example.example_id) not in there]
    began, full = perf_counter(), Full()
    for start in range(0, len(examples), engine.batch):
        group = examples[start : start + engine.batch]
        frames = {name: [tables[name]] if name in tables else [] for name in records.SCHEMAS}
        for (name, example), tokens in zip(group, _written(engine, model, full, [example for _, example in group]), strict=True):
            ids = example.input_ids + tokens[:-1]  # the last token has been chosen, not processed
            steps = min(len(tokens) - 1, len(ids) - reach)
            row = {"task": name, "subtask": example.subtask, "example_id": example.example_id, "ctx": engine.ctx}
            row |= {"prompt_tokens": len(example.input_ids), "new_tokens": len(tokens), "steps": max(0, steps), "text": model.chat.decode(tokens)}
            row["note"] = None if steps > 0 else f"no decode step sees {reach} tokens before it, the largest window"
            frames["texts"].append(pd.DataFrame([row]))
            print(
                f"{name}/{example.subtask}/{example.example_id}: {row['note'] or f'{steps} steps'}, {perf_counter() - began:.1f} s", file=sys.stderr
            )
            if steps > 0:
                for table, frame in measure(engine, ids, steps, reach, task, method).items():
                    key = {k: row[k] for k in ("task", "subtask", "example_id")}
                    frames[table].append(frame.assign(**key))
        tables = {name: pd.concat(found, ignore_index=True) for name, found in frames.items() if found}
        records.write(target, tables, facts)
    for name, text in (("environment.json", environment.to_json(facts)), ("config.yaml", config)):
        write_whole(target / name, lambda file, text=text: file.write(redact(text).encode()))
    print(_table(tables, method))
    print(f"records: {target}")
    return 0 if len(tables.get("acceptance", ())) else 1


@torch.inference_mode()
def measure(engine: Engine, ids: list[int], steps: int, reach: int, task: dict, method: dict) -> dict[str, pd.DataFrame]:
    """The tables of one text: gaps, amend and chains over all layers, acceptance and groups by layer."""
    windows, taus, bands = (tuple(task[key]) for key in ("windows", "taus", "bands"))
    tau, ring, band = method["tau"], method["window"], method["band"]
    accepted, grouped, pairs, amended, replays = [], [], [], [], []
    with layers(engine, ids, steps, reach) as each:
        for i, layer in enumerate(each):
            found = matching.match(layer, windows, ring, band + method["sink"])
            accepted.append(matching.acceptance(found, taus).assign(layer=i))
            grouped.append(matching.groups(layer, found, tau, band).assign(layer=i))
            pairs.append(matching.distances(layer, found))
            amended.append(amending.errors(layer, found, bands, task["samples"]))
            replays.append(chains.parts(layer, found, tau, band))
    return {
        "acceptance": pd.concat(accepted),
        "groups": pd.concat(grouped),
        "gaps": matching.by_gap(pd.concat(pairs)),
        "amend": amending.by_band(pd.concat(amended), taus),
        "chains": chains.by_depth(*chains.replay(replays)),
    }


def _written(engine: Engine, model, full: Full, examples: list) -> list[list[int]]:
    """What full attention makes of prompts that decode in step."""
    prompts = []
    try:
        prompts = [engine.prefill(example.input_ids) for example in examples]
        requests = [
            Request(
                *(prompt, example.max_new_tokens, model.stop_ids),
                sampler=example.sampling.sampler(),
                ended=StopStrings(model.chat.decode, example.stop),
            )
            for example, prompt in zip(examples, prompts, strict=True)
        ]
        return [made.tokens for made in engine.decode_batch(requests, full)]
    finally:
        for prompt in prompts:
            prompt.free()


def _table(tables: dict[str, pd.DataFrame], method: dict) -> str:
    """Hit rate by layer at the method's own window, for a look."""
    if not len(tables.get("acceptance", ())):
        return "no text was long enough"
    frame = tables["acceptance"]
    window = min(frame.window.unique(), key=lambda w: abs(w - method["window"]))
    sums = frame[frame.window == window].groupby(["layer", "tau"])[["hits", "steps"]].sum()
    return f"hit rate by layer and tau, window {window}\n{(sums.hits / sums.steps).unstack().round(3).to_string()}"
