"""The attention benchmark without Hydra: arguments of ``measure`` as JSON (one object, or several in a list), or the name of a preset;
``methods`` measures a step of every method instead (arguments of ``methods.measure`` as JSON after it).

python -m macbench.attention '{"heads": ["32/8"], "batch": [1, 16], "ctx": [32768]}' [FILE.parquet]
python -m macbench.attention methods runs/reference/h100/attention/methods.parquet
python -m macbench.attention reach runs/reference/h100/attention/reach.parquet
"""

import inspect
import json
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from macbench import environment
from macbench.attention import methods, table
from macbench.attention.bench import NO_GPU, NoGPU, compare, measure
from macbench.redact import redact

_PEERS = ["flashinfer", "flashinfer_tc", "triton"]
_LAYOUTS = {"heads": ["32/8", "32/4"], "batch": [1, 16, 64], "backends": _PEERS, "steps": 25}
PRESETS = {
    "reach": [
        # Full attention, and MAC at all hit rates and both patterns of misses.
        _LAYOUTS | {"ctx": [32 << 10, 127 << 10]},
        # Contexts in between and above: full attention, and MAC where everything or nothing hits.
        _LAYOUTS | {"ctx": [64 << 10, 128 << 10], "hit_rate": [0, 1], "steps": 15},
        # What larger rings cost, to be compared with K = 512 above.
        {"batch": [1, 16, 64], "ctx": [32 << 10], "backends": [], "window": [1024, 2048], "hit_rate": [0, 1], "steps": 25},
    ],
    # Launches by the host instead of graph replay.
    "eager": [{"batch": [1, 16], "ctx": [32 << 10], "backends": _PEERS, "modes": ["eager"], "hit_rate": [0, 1], "steps": 20}],
}


def facts(device: str, module: str = "macbench.attention") -> dict:
    """What the numbers depend on. ``module``: what was started by ``python -m``."""
    loaded = {name: sys.modules.get(name) for name in ("torch", "transformers", "triton", "flashinfer", "flash_attn")}
    versions = {name: getattr(package, "__version__", "?") for name, package in loaded.items() if package is not None}
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    command = shlex.join(["python", "-m", module, *map(redact, sys.argv[1:])])
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"command": command, "started": started, "git": environment.commit(), "device": name, "packages": versions}


def _json(text: str):
    try:
        return json.loads(text)
    except ValueError as error:
        print(f"macbench: {text}: must be methods, {', '.join(PRESETS)}, or JSON ({error})", file=sys.stderr)
        sys.exit(2)


def steps(argv: list[str]) -> int:
    """A step of every method. ``argv``: a file, a JSON object, both or none."""
    knobs = _json(next((a for a in argv if a.startswith("{")), "{}"))
    unknown = sorted(set(knobs) - set(inspect.signature(methods.measure).parameters))
    wrong = sorted(set(knobs.get("methods", ())) - set(methods.METHODS))
    for names, allowed in ((unknown, inspect.signature(methods.measure).parameters), (wrong, methods.METHODS)):
        if names:
            print(f"macbench: {', '.join(names)}: must be of {', '.join(name for name in allowed if name != 'say')}", file=sys.stderr)
            return 2
    if knobs.get("device", "cuda") == "cuda" and not torch.cuda.is_available():
        print(f"macbench: {NO_GPU}", file=sys.stderr)
        return 2
    print(methods.HEADER, flush=True)
    rows, targets = [], [Path(a) for a in argv if not a.startswith("{")]

    def keep(row: dict) -> None:  # what has been measured is kept if the machine goes away
        rows.append(row)
        print(methods.line(row), flush=True)
        for target in targets:
            table.write(rows, target, facts(knobs.get("device", "cuda")), methods.SCHEMA)

    methods.measure(**knobs, say=keep)
    return 0


def main(argv: list[str]) -> int:
    if argv[:1] == ["methods"]:
        return steps(argv[1:])
    configs = PRESETS[argv[0]] if argv and argv[0] in PRESETS else _json(argv[0]) if argv else {}
    rows: list[dict] = []
    print(table.HEADER, flush=True)
    try:
        for config in configs if isinstance(configs, list) else [configs]:
            rows += measure(**config, say=lambda row: print(table.line(row), flush=True))
            compare(rows)
            if len(argv) > 1:  # after every part: what has been measured is kept if the machine goes away
                table.write(rows, Path(argv[1]), facts(config.get("device", "cuda")))
    except NoGPU as error:
        print(f"macbench: {error}", file=sys.stderr)
        return 2
    print("\n" + table.HEADER)
    for row in rows:
        print(table.line(row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
