"""task=decode without Hydra: an option of conf/model, then the arguments of ``measure`` as JSON or the name of a preset.

python -m macbench.latency random_llama31_8b '{"ctx": [32768], "batch": [1]}' [FILE.parquet]
python -m macbench.latency random_llama31_8b reach runs/reference/h100/decode/llama31_8b.parquet
"""

import json
import sys
from pathlib import Path
from time import perf_counter

import torch
import yaml

from macbench.attention.__main__ import facts
from macbench.latency import table
from macbench.latency.bench import measure
from macbench.methods.mac import MAC
from macbench.models import random_weights

_MODELS = Path(__file__).parents[2] / "conf/model"
PRESETS = {
    # Llama-3.1-8B: what one request costs at 32K and 127K, and the largest batch that fits into 80 GB.
    "reach": [
        {"ctx": [32 << 10], "batch": [1], "hit_rate": [0, 0.9, 0.99], "prefill": True, "generate": True},
        {"ctx": [127 << 10], "batch": [1, 3], "hit_rate": [0, 0.9, 0.99]},
        {"ctx": [32 << 10], "batch": [8], "hit_rate": [0, 0.9, 0.99]},
    ],
}


def main(argv: list[str]) -> int:
    if len(argv) < 2 or not torch.cuda.is_available():
        print(
            __doc__ if torch.cuda.is_available() else "macbench: times a GPU and finds no CUDA device; use python -m macbench.run task=decode",
            file=sys.stderr,
        )
        return 2
    began = perf_counter()
    spec = yaml.safe_load((_MODELS / f"{argv[0]}.yaml").read_text())
    network = random_weights.build(spec["random"], "cuda", torch.bfloat16)
    rows = []
    print(table.HEADER, flush=True)
    for config in PRESETS[argv[1]] if argv[1] in PRESETS else [json.loads(argv[1])]:
        rows += measure(network, argv[0], True, mac=MAC(), say=lambda row: print(table.line(row), flush=True), **config)
        if len(argv) > 2:
            table.write(rows, Path(argv[2]), facts("cuda", "macbench.latency"))
        print(f"{perf_counter() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
