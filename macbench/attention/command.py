"""task=attention as a run: a resolved configuration in, a table and one parquet file out."""

import json
import sys
from pathlib import Path

from macbench.attention import table
from macbench.attention.__main__ import facts
from macbench.attention.bench import NoGPU, measure
from macbench.attention.peers import EXCUSES, FULL_BACKENDS
from macbench.errors import ConfigError, choose

_LISTS = ("heads", "batch", "hit_rate", "misses", "backends", "modes")
_OWN = ("band", "tau", "sink", "min_context", "max_chain")
# What the kernels take.
_MOST_HEADS_OF_A_GROUP, _WIDEST_HEAD = 64, 256
_PLAIN = ("max_gap", "head_dim", "page_size", "dtype", "scattered", "match", "steps")


def run(task: dict, method: dict, contexts: list[int], backend: str, device: str, seed: int, runs_dir: str) -> int:
    """One benchmark. Returns the exit code: 0, or 1 if a measurement failed.

    ``task`` and ``method``: plain dicts of their YAML. ``contexts``: visible tokens. ``backend``: auto, or the one backend of full attention.
    """
    resolved = knobs, windows, own = resolve(task, method, contexts, backend, device)
    try:
        rows = measure(
            ctx=contexts, window=windows, mac=method["name"] == "mac", device=device, seed=seed, **own, **knobs,
            say=lambda row: print(table.line(row), file=sys.stderr, flush=True),
        )  # fmt: skip
    except NoGPU as error:
        raise ConfigError("device", device, str(error)) from error
    print("\n".join([table.HEADER, *map(table.line, rows)]))
    path = target(runs_dir, method, contexts, resolved)
    table.write(rows, path, facts(device, "macbench.run") | {"task": task, "method": method})
    print(f"records: {path}")
    return 1 if any(row["error"] and not row["error"].startswith(EXCUSES) for row in rows) else 0


def resolve(task: dict, method: dict, contexts: list[int], backend: str, device: str) -> tuple[dict, list[int], dict]:
    """Arguments of ``measure``: the task's knobs, ring sizes, and the method's own knobs; a mistake is a ConfigError."""
    knobs = {key: _list(task[key]) for key in _LISTS} | {key: task[key] for key in _PLAIN}
    _check(knobs, method, task["window"])
    if not contexts:
        raise ConfigError("ctx", "[]", "must list at least one value")
    choose("device", device, ("cuda", "cpu"))
    if backend != "auto":
        knobs["backends"] = [choose("backend", backend, FULL_BACKENDS)]
    elif device == "cpu" and "torch" not in knobs["backends"]:
        knobs["backends"].append("torch")  # the others say why they do not run there
    if device == "cpu" and knobs["dtype"] != "float32":
        print(f"macbench: note: task.dtype={knobs['dtype']} becomes float32 on a CPU", file=sys.stderr)
        knobs["dtype"] = "float32"
    windows = _list(task["window"]) if task["window"] is not None else [method.get("window", 512)]
    check_hits(contexts, windows, method, knobs["hit_rate"])
    return knobs, windows, {key: method[key] for key in _OWN if key in method}


def check_hits(contexts: list[int], windows: list[int], method: dict, hit_rates: list[float]) -> None:
    """Raise a ConfigError for a context at which synthetic hits cannot be: shorter than what a hit reads, or below the method's min_context."""
    least = max(windows) + method.get("band", 0) + method.get("sink", 0) + 2
    for ctx in contexts:
        if ctx < least:
            raise ConfigError("ctx", ctx, f"must be at least {least} tokens, so that sinks, ring and band are full")
        if ctx < method.get("min_context", 0) and any(hit_rates):
            raise ConfigError("ctx", ctx, f"is below method.min_context={method['min_context']}: no head can hit there; lower one or raise the other")


def target(runs_dir: str, method: dict, contexts: list[int], resolved: tuple) -> Path:
    """The parquet file of a benchmark."""
    knobs, windows, own = resolved
    return Path(runs_dir) / "attention" / f"{method['name']}-{_name(knobs, contexts, windows, own)}.parquet"


def _list(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _check(knobs: dict, method: dict, window) -> None:
    choose("method", method["name"], ("full", "mac"))
    for key in _LISTS:
        if not knobs[key]:
            raise ConfigError(f"task.{key}" if key != "batch" else key, "[]", "must list at least one value")
    for key, allowed in (("misses", ("random", "clustered")), ("modes", ("graph", "eager")), ("backends", FULL_BACKENDS)):
        for value in knobs[key]:
            choose(f"task.{key}", value, allowed)
    choose("task.dtype", knobs["dtype"], ("bfloat16", "float16", "float32"))
    for pair in knobs["heads"]:
        parts = str(pair).split("/")
        good = len(parts) == 2 and all(p.isdigit() and int(p) for p in parts) and int(parts[0]) % int(parts[1]) == 0
        if not good or int(parts[0]) // int(parts[1]) > _MOST_HEADS_OF_A_GROUP:
            raise ConfigError(
                "task.heads",
                pair,
                f"must be query heads / KV heads, the first a multiple of the second up to {_MOST_HEADS_OF_A_GROUP} times, such as 32/8",
            )
    for value in knobs["hit_rate"]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ConfigError("task.hit_rate", value, "must be a number from 0 to 1")
    number_list("task.batch", knobs["batch"], 1)
    for key, low in {"max_gap": 1, "head_dim": 8, "page_size": 1, "steps": 4}.items():
        if isinstance(knobs[key], list):
            raise ConfigError(f"task.{key}", knobs[key], f"must be one integer of at least {low}")
        number_list(f"task.{key}", knobs[key], low)
    if knobs["head_dim"] % 8 or knobs["head_dim"] > _WIDEST_HEAD:
        raise ConfigError("task.head_dim", knobs["head_dim"], f"must be a multiple of 8 up to {_WIDEST_HEAD}")
    for key in ("scattered", "match"):
        if not isinstance(knobs[key], bool):
            raise ConfigError(f"task.{key}", knobs[key], "must be true or false")
    if window is not None:
        if not _list(window):
            raise ConfigError("task.window", "[]", "must be null or integers of at least 1")
        number_list("task.window", window, 1)


def number_list(key: str, values, least: int) -> None:
    """One integer of at least ``least``, or a list of them."""
    for value in _list(values):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(key, value, f"must be an integer of at least {least}")


def _name(*parts) -> str:
    """Eight hex digits of what was measured."""
    from macbench.records import config_hash

    return config_hash({"parts": json.loads(json.dumps(parts, default=str))})
