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
_PLAIN = ("max_gap", "head_dim", "page_size", "dtype", "scattered", "steps")


def run(task: dict, method: dict, contexts: list[int], backend: str, device: str, seed: int, runs_dir: str) -> int:
    """One benchmark. Returns the exit code: 0, or 1 if a measurement failed.

    ``task`` and ``method``: plain dicts of their YAML. ``contexts``: visible tokens. ``backend``: auto, or the one backend of full attention.
    """
    knobs = {key: _list(task[key]) for key in _LISTS} | {key: task[key] for key in _PLAIN}
    _check(knobs, method)
    if backend != "auto":
        knobs["backends"] = [choose("backend", backend, FULL_BACKENDS)]
    elif device == "cpu" and "torch" not in knobs["backends"]:
        knobs["backends"].append("torch")  # the others say why they do not run there
    if device == "cpu":
        knobs["dtype"] = "float32"
    windows = _list(task["window"]) if task["window"] else [method.get("window", 512)]
    least = max(windows) + method.get("band", 0) + method.get("sink", 0) + 2
    for ctx in contexts:
        if ctx < least:
            raise ConfigError("ctx", ctx, f"must be at least {least} tokens, so that sinks, ring and band are full")
        if ctx < method.get("min_context", 0) and any(knobs["hit_rate"]):
            raise ConfigError("ctx", ctx, f"is below method.min_context={method['min_context']}: no head can hit there; lower one or raise the other")
    own = {key: method[key] for key in _OWN if key in method}
    try:
        rows = measure(
            ctx=contexts, window=windows, mac=method["name"] == "mac", device=device, seed=seed, **own, **knobs,
            say=lambda row: print(table.line(row), file=sys.stderr, flush=True),
        )  # fmt: skip
    except NoGPU as error:
        raise ConfigError("device", device, str(error)) from error
    print("\n".join([table.HEADER, *map(table.line, rows)]))
    target = Path(runs_dir) / "attention" / f"{method['name']}-{_name(knobs, contexts, windows, own)}.parquet"
    table.write(rows, target, facts(device, "macbench.run") | {"task": task, "method": method})
    print(f"records: {target}")
    return 1 if any(row["error"] and not row["error"].startswith(EXCUSES) for row in rows) else 0


def _list(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _check(knobs: dict, method: dict) -> None:
    choose("method", method["name"], ("full", "mac"))
    for key, allowed in (("misses", ("random", "clustered")), ("modes", ("graph", "eager")), ("backends", FULL_BACKENDS)):
        for value in knobs[key]:
            choose(f"task.{key}", value, allowed)
    choose("task.dtype", knobs["dtype"], ("bfloat16", "float16", "float32"))
    for pair in knobs["heads"]:
        parts = str(pair).split("/")
        if len(parts) != 2 or not all(p.isdigit() and int(p) for p in parts) or int(parts[0]) % int(parts[1]):
            raise ConfigError("task.heads", pair, "must be query heads / KV heads, the first a multiple of the second, such as 32/8")
    for value in knobs["hit_rate"]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ConfigError("task.hit_rate", value, "must be a number from 0 to 1")
    least = {"batch": 1, "max_gap": 1, "head_dim": 8, "page_size": 1, "steps": 4}
    for key, low in least.items():
        number_list(f"task.{key}", knobs[key], low)


def number_list(key: str, values, least: int) -> None:
    """One integer of at least ``least``, or a list of them."""
    for value in _list(values):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(key, value, f"must be an integer of at least {least}")


def _name(*parts) -> str:
    """Eight hex digits of what was measured."""
    from macbench.records import config_hash

    return config_hash({"parts": json.loads(json.dumps(parts, default=str))})
