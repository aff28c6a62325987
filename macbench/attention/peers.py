"""Full attention by other people's kernels, each behind one call on our paged cache: ``make(...)`` -> ``run(layer) -> out [B, Hq, d]``.

A peer reads the same pages through a view of our pool (pages of a head lie next to each other; only strides differ from its own layout).
Peers that plan on the host keep the plan of the first round, and so do not see lengths grow.
"""

import os
from collections.abc import Callable

import torch
from macbench_kernels import UnsupportedError, kernels

from macbench.attention.problem import Problem

FULL_BACKENDS = ("triton", "torch", "flashinfer", "flashinfer_tc", "flash_attn", "sdpa")
# Those that read one key more in every round.
GROWING = ("triton", "torch", "flash_attn")
# How the reasons begin for which a backend may be missing from a table without the run having failed.
EXCUSES = ("not installed", "not on a CPU")


class Unavailable(Exception):
    """The backend cannot run here; the message is one line that begins with one of EXCUSES."""


def make(backend: str, problem: Problem) -> Callable[[int], torch.Tensor]:
    """Raises Unavailable if the backend's package or the device it needs is missing."""
    return {
        "triton": _triton, "torch": _torch, "flash_attn": _flash_attn, "sdpa": _sdpa,
        "flashinfer": lambda p: _flashinfer(p, False), "flashinfer_tc": lambda p: _flashinfer(p, True),
    }[backend](problem)  # fmt: skip


def _needs_gpu(backend: str, problem: Problem) -> None:
    if problem.device != "cuda":
        raise Unavailable(f"not on a CPU ({backend} needs a CUDA device)")


def _triton(problem: Problem):
    try:
        kernels("triton", problem.device)
    except UnsupportedError as error:
        excuse = EXCUSES[1] if problem.device == "cpu" else EXCUSES[0]
        raise Unavailable(f"{excuse} ({error})") from error
    from macbench_kernels.triton_attend import attend_full

    cell = problem.cell
    return lambda layer: attend_full(problem.q[layer], problem.cache, layer, cell.scale, cell.dtype).out


def _torch(problem: Problem):
    from macbench_kernels.torch_backend import attend

    def run(layer):
        stop = problem.cache.lengths[:, None].expand(-1, problem.cell.q_heads)
        spans = torch.stack([torch.zeros_like(stop), stop])[None]
        return attend(problem.q[layer], problem.cache, layer, spans, problem.cell.scale).out[0].to(problem.cell.dtype)

    return run


def _flashinfer(problem: Problem, tensor_cores: bool):
    """FlashInfer's paged decode (https://github.com/flashinfer-ai/flashinfer), its CUDA-core or its tensor-core kernel."""
    try:
        os.environ.setdefault("FLASHINFER_DISABLE_VERSION_CHECK", "1")
        import flashinfer
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    _needs_gpu("flashinfer", problem)
    cell, cache, device = problem.cell, problem.cache, problem.device
    used = -(-cell.ctx // cell.page_size)
    indptr = torch.arange(cell.batch + 1, dtype=torch.int32, device=device) * used
    indices = cache.block_table[:, :used].flatten().contiguous()
    last = torch.full((cell.batch,), (cell.ctx - 1) % cell.page_size + 1, dtype=torch.int32, device=device)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_cuda_graph=True, use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=indptr.clone(), paged_kv_indices_buffer=indices.clone(), paged_kv_last_page_len_buffer=last.clone(),
    )  # fmt: skip
    wrapper.plan(
        indptr, indices, last, cell.q_heads, cell.kv_heads, cell.head_dim, cell.page_size,
        q_data_type=cell.dtype, kv_data_type=cell.dtype, sm_scale=cell.scale,
    )  # fmt: skip
    pools = [(cache.keys(i).transpose(0, 1), cache.values(i).transpose(0, 1)) for i in range(problem.layers)]
    return lambda layer: wrapper.run(problem.q[layer], pools[layer])


def _flash_attn(problem: Problem):
    """flash-attn's paged decode (https://github.com/Dao-AILab/flash-attention); it wants pages of a multiple of 256 tokens and its own layout."""
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    _needs_gpu("flash_attn", problem)
    cell, cache = problem.cell, problem.cache
    if cell.page_size % 256:
        raise NotImplementedError(f"flash_attn takes page sizes that are multiples of 256, not {cell.page_size}")
    pools = [(cache.keys(i).permute(1, 2, 0, 3).contiguous(), cache.values(i).permute(1, 2, 0, 3).contiguous()) for i in range(problem.layers)]

    def run(layer):
        k, v = pools[layer]
        out = flash_attn_with_kvcache(
            problem.q[layer][:, None], k, v, cache_seqlens=cache.lengths, block_table=cache.block_table, softmax_scale=cell.scale
        )
        return out[:, 0]

    return run


def _sdpa(problem: Problem):
    """torch.nn.functional.scaled_dot_product_attention on the contiguous cache of each request; no paging, so only unscattered pages."""
    cell, cache = problem.cell, problem.cache
    if cell.scattered:
        raise NotImplementedError("sdpa needs contiguous pages (task.scattered=false)")
    per = cache.block_table.shape[1] * cell.page_size

    def view(pool):  # [Hkv, B * per, d] -> [B, Hkv, ctx, d]
        return pool.flatten(1, 2).unflatten(1, (cell.batch, per)).transpose(0, 1)[:, :, : cell.ctx]

    pools = [(view(cache.keys(i)), view(cache.values(i))) for i in range(problem.layers)]

    def run(layer):
        k, v = pools[layer]
        out = torch.nn.functional.scaled_dot_product_attention(problem.q[layer][:, :, None], k, v, scale=cell.scale, enable_gqa=True)
        return out[:, :, 0]

    return run
