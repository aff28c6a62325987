"""task=decode as a run: plain dicts of the configuration in, a table and one parquet file out."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from omegaconf import OmegaConf

from macbench.attention.command import check_hits, number_list
from macbench.errors import ConfigError, choose, one_line
from macbench.generate import out_of_memory
from macbench.interrupt import Terminated
from macbench.latency import table
from macbench.latency.bench import excused, measure, positions
from macbench.latency.prompts import check_folder, essays
from macbench.methods.mac import MAC
from macbench.models import random_weights
from macbench.models.weights import load, load_chat, max_context

BACKENDS = ("triton", "torch", "flashinfer")


def run(task: dict, method: dict, model, contexts: list[int], backend: str, device: str, dtype: torch.dtype, seed: int, target: Path, facts) -> int:
    """One benchmark. Returns the exit code: 0, 1 if a measurement failed, 130 or 143 if it was interrupted; rows are written as they come.

    ``model``: the ``conf/model`` node. ``facts()``: what goes into the parquet's metadata.
    """
    knobs = check(task, method, model, contexts)
    if device == "cpu":
        knobs["backends"] = ["torch"]
    if backend != "auto":
        knobs["backends"] = [choose("backend", backend, BACKENDS)]
    own = "auto" if backend == "flashinfer" else backend  # which has full attention alone
    mac = MAC(**{k: v for k, v in method.items() if k not in ("_target_", "name")}) if method["name"] == "mac" else None
    name, prompts = model["name"], None
    if model.get("random"):
        network = random_network(model, device, dtype, seed)
    else:
        chat = load_chat(model)
        with weights(name, device, dtype, "take a smaller model"):
            network = load(model, device, chat).network
        if "real" in knobs["hit_rate"]:
            prompts = essays(chat, task["data_path"])
    rows: list[dict] = []
    known = facts()
    try:
        measure(
            network, name, bool(model.get("random")), ctx=contexts, mac=mac, prompts=prompts, backend=own, seed=seed, **knobs,
            say=keep(rows, target, lambda: known, sys.stderr),
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        return interrupted(stop, rows, target)
    print("\n".join([table.HEADER, *map(table.line, rows)]))
    print(f"records: {target}")
    return 1 if any(row["error"] and not excused(row["error"]) for row in rows) else 0


def keep(rows: list[dict], target: Path | None, facts: Callable[[], dict], stream: TextIO) -> Callable[[dict], None]:
    """What happens to a row as soon as it is measured: it joins ``rows``, is printed, and all of them are written to ``target``, if there is one."""

    def say(row: dict) -> None:
        rows.append(row)
        print(table.line(row), file=stream, flush=True)
        if target is not None:
            table.write(rows, target, facts())

    return say


def interrupted(stop: KeyboardInterrupt, rows: list[dict], target: Path | None) -> int:
    """Say what is left of a benchmark that was stopped; the exit code."""
    kept = f"{len(rows)} row(s) so far are in {target}; the same command measures anew" if rows and target is not None else "nothing was written"
    print(f"macbench: interrupted; {kept}", file=sys.stderr)
    return 143 if isinstance(stop, Terminated) else 130


def random_network(model, device: str, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
    """The network of a ``conf/model`` node with random weights; a ConfigError if there is no room for them."""
    with weights(model["name"], device, dtype, "lower model.random.num_hidden_layers or take a smaller model"):
        return random_weights.build(OmegaConf.to_container(model.random, resolve=True), device, dtype, seed)


@contextmanager
def weights(name: str, device: str, dtype: torch.dtype, smaller: str) -> Iterator[None]:
    """Where weights are made or loaded: what does not fit into the memory is a ConfigError that says what is ``smaller``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        said = f"its weights in {str(dtype).removeprefix('torch.')} do not fit into the memory of {device}; {smaller} ({one_line(error)})"
        raise ConfigError("model", name, said) from error


def check(task: dict, method: dict, model, contexts: list[int]) -> dict:
    """The task's knobs as arguments of ``measure``."""
    choose("method", method["name"], ("full", "mac"))
    knobs = {key: task[key] for key in ("steps", "misses", "prefill", "generate", "max_gap")}
    knobs |= {key: task[key] if isinstance(task[key], list) else [task[key]] for key in ("batch", "hit_rate", "backends", "modes")}
    choose("task.misses", knobs["misses"], ("random", "clustered"))
    for key, allowed in (("modes", ("graph", "eager")), ("backends", BACKENDS)):
        for value in knobs[key]:
            choose(f"task.{key}", value, allowed)
    for key, least in (("steps", 4), ("max_gap", 1)):
        if isinstance(knobs[key], list):
            raise ConfigError(f"task.{key}", knobs[key], f"must be one integer of at least {least}")
        number_list(f"task.{key}", knobs[key], least)
    number_list("batch", knobs["batch"], 1)
    for key, values in (
        ("task.hit_rate", knobs["hit_rate"]),
        ("task.modes", knobs["modes"]),
        ("task.backends", knobs["backends"]),
        ("batch", knobs["batch"]),
        ("ctx", contexts),
    ):
        if not values:
            raise ConfigError(key, "[]", "must list at least one value")
    for key in ("prefill", "generate"):
        if not isinstance(knobs[key], bool):
            raise ConfigError(f"task.{key}", knobs[key], "must be true or false")
    for rate in knobs["hit_rate"]:
        if rate == "real":
            if model.get("random") or len(knobs["hit_rate"]) > 1:
                raise ConfigError("task.hit_rate", rate, "needs a model with real weights, and stands alone: task.hit_rate=[real]")
        elif isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
            raise ConfigError("task.hit_rate", rate, "must be a number from 0 to 1, or real")
    check_folder(task.get("data_path"), "real" in knobs["hit_rate"])
    number_list("ctx", contexts, 1)
    if model.get("random"):
        random_weights.check(model["random"])
    most = model["random"]["max_position_embeddings"] if model.get("random") else max_context(model)
    for ctx in contexts:
        after = positions(ctx, knobs["steps"]) - ctx
        if ctx + after > most:
            raise ConfigError("ctx", ctx, f"and the {after} decode steps after it must fit into the {most} positions of {model['name']}")
    if method["name"] == "mac" and "real" not in knobs["hit_rate"]:
        check_hits(contexts, [method["window"]], method, knobs["hit_rate"])
    return knobs
