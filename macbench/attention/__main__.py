"""The attention benchmark without Hydra: python -m macbench.attention '{"heads": ["32/8"], "batch": [1, 16], "ctx": [32768]}' [FILE.parquet]"""

import json
import platform
import shlex
import sys
from pathlib import Path

import torch

from macbench.attention import table
from macbench.attention.bench import NoGPU, measure


def facts(device: str) -> dict:
    """What the numbers depend on."""
    versions = {}
    for name in ("torch", "triton", "flashinfer", "flash_attn"):
        module = sys.modules.get(name)
        if module is not None:
            versions[name] = getattr(module, "__version__", "?")
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {"command": shlex.join(["python", "-m", "macbench.attention", *sys.argv[1:]]), "device": name, "packages": versions}


def main(argv: list[str]) -> int:
    config = json.loads(argv[0]) if argv else {}
    print(table.HEADER, flush=True)
    try:
        rows = measure(**config, say=lambda row: print(table.line(row), flush=True))
    except NoGPU as error:
        print(f"macbench: {error}", file=sys.stderr)
        return 2
    print("\n" + table.HEADER)
    for row in rows:
        print(table.line(row))
    if len(argv) > 1:
        table.write(rows, Path(argv[1]), facts(config.get("device", "cuda")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
