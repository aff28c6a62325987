"""Layers that ``model.device_map=auto`` spreads over two GPUs of a kind against all on one of them: ``python -m tests.gpus``. Neither has graphs or
fused kernels, so they differ in nothing but places. Exit code 1 if tokens or counts of a method differ."""

import torch
from macbench_kernels import kernels

from macbench.engine import Engine, Request
from macbench.models.forward import Modules
from macbench.models.weights import load
from tests import real
from tests.methods.cases import CASES

engines, ids = [], real.chat().encode("".join(case.make().__doc__ for case in CASES.values()))
for device_map in (None, "auto"):
    real.spec().device_map = device_map
    engine = Engine(load(real.spec(), "cuda", real.chat(), 1 << 30).network, kernels("triton", "cuda"), 4096, graph=False)
    engine.forward = Modules(engine.network)
    engines.append((engine, engine.prefill(ids[:3000], 512, column_sums=True)))
print("layers on", *(dict.fromkeys(map(str, engine.shape.devices)) or ["one GPU alone: this shows nothing"]))
wrong = not engine.shape.devices
for name, case in CASES.items():
    made, logits = [], []
    for engine, prompt in engines:
        request = Request(prompt, 48, feed=ids[3000:3048])
        made += engine.decode_batch([request], case.make(), watch=lambda step, row, kept=logits: kept.append(row[0].cpu()))
    one, two = torch.stack(logits).chunk(2)
    turned, other = int((one.argmax(-1) != two.argmax(-1)).sum()), [k for k, x in made[0].counts.items() if (x != made[1].counts[k]).any()]
    print(f"{name}: {turned} of {len(one)} tokens differ, logits by at most {(one - two).abs().max():.2g}, counts: {other or 'the same'}", flush=True)
    wrong |= bool(turned or other)
raise SystemExit(wrong)
