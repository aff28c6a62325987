"""task=decode without Hydra: an option of conf/model, then the arguments of ``measure`` as JSON or the name of a preset.

python -m macbench.latency random_llama31_8b '{"ctx": [32768], "batch": [1]}' [FILE.parquet]
python -m macbench.latency random_llama31_8b reach runs/reference/h100/decode/llama31_8b.parquet
"""

import json
import sys
from pathlib import Path
from time import perf_counter

import torch
from omegaconf import OmegaConf

from macbench.attention.__main__ import facts
from macbench.attention.table import ready
from macbench.cli import load_option, options
from macbench.errors import ConfigError, choose, one_line
from macbench.latency import command, table
from macbench.latency.bench import measure
from macbench.methods.mac import MAC

PRESETS = {
    # Llama-3.1-8B: what one request costs at 32K and 127K, and the largest batch that fits into 80 GB.
    "reach": [
        {"ctx": [32 << 10], "batch": [1], "hit_rate": [0, 0.9, 0.99], "prefill": True, "generate": True},
        {"ctx": [127 << 10], "batch": [1, 3], "hit_rate": [0, 0.9, 0.99]},
        {"ctx": [32 << 10], "batch": [8], "hit_rate": [0, 0.9, 0.99]},
    ],
}


def asked(argv: list[str]) -> tuple[object, list[dict], Path | None]:
    """The ``conf/model`` node, arguments of ``measure`` for each part, and where rows go; a mistake is a ConfigError."""
    name, grid, *file = argv
    choose("model", name, [option for option in options("model") if load_option("model", option).get("random")])
    model = load_option("model", name)
    try:
        parts = PRESETS[grid] if grid in PRESETS else [json.loads(grid)]
    except ValueError as error:
        raise ConfigError("grid", grid, f'must be {", ".join(PRESETS)}, or a JSON object such as {{"ctx": [32768]}} ({one_line(error)})') from error
    checked = [_checked(part, model) for part in parts]
    return model, checked, ready(Path(file[0])) if file else None


def _checked(part: object, model) -> dict:
    defaults = {k: v for k, v in OmegaConf.to_container(load_option("task", "decode")).items() if k not in ("name", "data_path")} | {
        "ctx": [32 << 10]
    }
    if not isinstance(part, dict):
        raise ConfigError("grid", part, f"must be an object with keys of {', '.join(defaults)}")
    for key in part:
        choose("grid", key, defaults)
    knobs = defaults | part
    contexts = knobs.pop("ctx") if isinstance(knobs["ctx"], list) else [knobs.pop("ctx")]
    mac = MAC()
    method = {"name": "mac", "window": mac.window, "band": mac.band, "sink": mac.sink, "min_context": mac.min_context}
    return command.check(knobs, method, model, contexts) | {"ctx": contexts}


def main(argv: list[str]) -> int:
    if len(argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    began = perf_counter()
    try:
        model, parts, target = asked(argv)
        if not torch.cuda.is_available():
            raise ConfigError("device", "cuda", "times a GPU and finds no CUDA device; use python -m macbench.run task=decode")
        network = command.random_network(model, "cuda", torch.bfloat16)
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        return 2
    rows: list[dict] = []
    say = command.keep(rows, target, lambda: facts("cuda", "macbench.latency"), sys.stdout)
    print(table.HEADER, flush=True)
    try:
        for part in parts:
            measure(network, model.name, True, mac=MAC(), say=say, **part)
            print(f"{perf_counter() - began:.0f} s", flush=True)
    except KeyboardInterrupt as stop:
        return command.interrupted(stop, rows, target)
    except OSError as error:  # a disk that is full or gone
        print(f"macbench: {ConfigError('file', target, one_line(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
