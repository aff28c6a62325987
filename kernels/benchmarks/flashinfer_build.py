"""Build FlashInfer's decode kernels for bf16 and d = 128 ahead of a benchmark, so that no timing waits for a compiler."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
from macbench.attention import peers
from macbench.attention.problem import Cell, Problem

for backend in sys.argv[1:] or ("flashinfer", "flashinfer_tc"):
    for heads in ((32, 8), (32, 4)):
        problem = Problem(Cell(*heads, 1, 1024), "cuda", 1, 2, 0)
        run = peers.make(backend, problem)
        want = peers.make("torch", problem)(0).float()
        print(backend, heads, "relative error", float((run(0).float() - want).norm() / want.norm()), flush=True)
torch.cuda.synchronize()
