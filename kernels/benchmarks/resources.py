"""Registers, shared memory and spills of every Triton kernel for an H100, compiled here: no GPU is needed.

python kernels/benchmarks/resources.py [folder for PTX and TTGIR]
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1]))
from macbench_kernels import (
    Codes,
    MacParams,
    PagedKVCache,
    PagePool,
    Ring,
    Scheme,
    triton_attend,
    triton_channels,
    triton_common,
    triton_mac,
    triton_match,
    triton_quantised,
    triton_scores,
    triton_select,
    triton_selected,
    triton_summaries,
)

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
    torch.uint8: "*u8", torch.int16: "*i16",
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg")
compiled: dict[str, tuple] = {}


def compile_only(kernel: JITFunction, *args, grid, warmup=False, **kwargs):
    """Stands in for a launch: compiles with the specialisation that the real arguments would get."""
    options = {key: kwargs.pop(key) for key in list(kwargs) if key in OPTIONS}
    bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for place, (name, param) in enumerate((p.name, p) for p in kernel.params):
        value = bound[name]
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
            continue
        signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    compiled[kernel.fn.__name__] = (built, grid)


def resources(built) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.run([str(CUOBJDUMP), "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    ptx = built.asm["ptx"]
    uses = {name: ptx.count(name) for name in ("wgmma.mma_async", "mma.sync", "cp.async.cg", "cp.async.ca", "ld.global.v4", "bar.sync")}
    return f"regs {found[1]:>3} stack {found[2]:>3} smem {built.metadata.shared:>6}  " + " ".join(f"{k}={v}" for k, v in uses.items() if v)


def peers(q: torch.Tensor, cache: PagedKVCache, ring: Ring):
    """Calls of the kernels that other methods than MAC use."""
    (_, heads, dim), kv_heads = q.shape, cache.pool.kv_heads
    ids, counts, stop = (torch.zeros(1, *size, dtype=torch.int32) for size in ((kv_heads, 4096), (kv_heads,), ()))
    scores, lse = torch.zeros(1, heads, 4096), ring.lse[..., 0]

    def quantised(bits: int):
        schemes = (Scheme(8, 1, dim, symmetric=True),) * 2 if bits == 8 else (Scheme(bits, 32, 1), Scheme(bits, 1, 32))
        k, v = (Codes.create(s, 1, kv_heads, 4096, dim, lambda name, *size, dtype: torch.zeros(size, dtype=dtype)) for s in schemes)
        triton_quantised.quantise_rows(v, cache.values(0), cache, stop)
        triton_quantised.attend_quantised(q, cache, 0, k, v, stop, stop, 1.0)

    yield lambda: triton_selected.attend_selected(q, cache, 0, ids, counts, 1.0, scores=scores)
    yield lambda: triton_channels.strong_channels(q, kv_heads, dim // 2, True)
    yield lambda: triton_channels.mean_probability(scores[:, None], stop[None], 3)
    for n in (11008, 41600):
        long = torch.zeros(1, kv_heads, n)
        yield lambda long=long: triton_channels.top_tokens(long, stop[None], counts, 3, 6500, True, ids, stop[None])
        yield lambda long=long: triton_select.top(long, 400, torch.ones((), dtype=torch.bool), False)
    yield lambda: triton_scores.least_attended(scores, lse, ids, counts, stop, 5, counts.long(), scores[:, :kv_heads].contiguous())
    yield lambda: triton_scores.column_sums(q[:, :, None].repeat(1, 1, 64, 1), cache, 0, 64, lse[..., None].repeat(1, 1, 64), 1.0)
    for bits in (2, 4, 8):
        yield lambda bits=bits: quantised(bits)


def main(folder: Path | None) -> None:
    for dtype, dim, group, page, knobs in [
        (torch.bfloat16, 128, 4, 16, {}),
        (torch.bfloat16, 128, 8, 16, {}),
        (torch.bfloat16, 128, 4, 16, {"block": 128}),
        (torch.bfloat16, 64, 3, 16, {}),
        (torch.bfloat16, 96, 7, 1, {}),
        (torch.float16, 256, 16, 64, {}),
        (torch.float32, 128, 4, 16, {}),
    ]:
        heads = 4 * group
        cache = PagedKVCache(PagePool(1, 4, dim, 64, page, dtype), 1)
        cache.extend(page * 32)
        ring = Ring.create(1, heads, 512, dim, dtype, "cpu")
        q = torch.zeros(1, heads, dim, dtype=dtype)
        spans = torch.zeros(1, 2, 1, heads, dtype=torch.int32)
        ids, counts = torch.zeros(1, 4, 512, dtype=torch.int32), torch.ones(1, 4, dtype=torch.int32)
        own = torch.zeros(1, heads, 512, dtype=torch.int32), torch.ones(1, heads, dtype=torch.int32)
        bounds, means = torch.zeros(1, 4, 2 * dim, 1024, dtype=dtype), torch.zeros(1, 4, 1024, dim, dtype=dtype)
        shared, each, masses = torch.zeros(1, 4, 1, 2 * dim), torch.zeros(1, 4, group, 40), torch.zeros(1, 4, group, 1024)
        rows, units = torch.zeros(1, 4, 40, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        print(f"-- {dtype} d={dim} group={group} page={page} {knobs or ''}")
        for call in (
            lambda: triton_mac.mac_step(q, q, cache, 0, ring, MacParams(1.0, 256), 1.0, **knobs),
            lambda: triton_attend.attend(q, cache, 0, spans, 1.0),
            lambda: triton_attend.attend_full(q, cache, 0, 1.0, **knobs),
            lambda: triton_selected.attend_selected(q, cache, 0, ids, counts, 1.0),
            lambda: triton_selected.attend_selected(q, cache, 0, ids, counts, 1.0, page),
            lambda: triton_selected.attend_selected(q, cache, 0, *own, 1.0),
            lambda: triton_summaries.extend_bounds(bounds, cache, 0, 16),
            lambda: triton_summaries.extend_bounds(bounds, cache, 0, 3, units),
            lambda: triton_summaries.row_scores(shared, bounds, units),
            lambda: triton_summaries.row_scores(each, bounds, units, rows),
            lambda: triton_summaries.weigh_rows(masses, means),
            lambda: triton_summaries.token_scores(q, cache, 0, 1.0, 4096),
            *(() if knobs else peers(q, cache, ring)),
        ):
            compiled.clear()
            call()
            for name, (built, grid) in compiled.items():
                print(f"{name:<16} grid {grid!s:<10} {resources(built)}")
                if folder:
                    folder.mkdir(parents=True, exist_ok=True)
                    for kind in ("ptx", "ttgir"):
                        (folder / f"{name}-{str(dtype)[6:]}-{dim}-{group}.{kind}").write_text(built.asm[kind])


if __name__ == "__main__":
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(triton_common, "INTERPRETED", True),  # nothing is launched, so tensors may lie on the CPU
        mock.patch.object(triton_common, "_INTERPRETED_PROCESSORS", 132),
        mock.patch.object(triton_match, "dependent_launch", lambda device: True),
        mock.patch.object(triton_attend, "dependent_launch", lambda device: True),
        mock.patch.object(triton_mac, "dependent_launch", lambda device: True),
        mock.patch.object(triton_channels, "dependent_launch", lambda device: True),
        mock.patch.object(triton_select, "dependent_launch", lambda device: True),
        mock.patch.object(triton_selected, "dependent_launch", lambda device: True),
        mock.patch.object(triton_summaries, "dependent_launch", lambda device: True),
    ):
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
