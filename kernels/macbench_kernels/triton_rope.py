"""From the fused projection of a decode step to rotated queries and new cache rows, in one launch."""

import torch
import triton
import triton.language as tl

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.triton_common import dependent_launch, follow, launch_options, on_device


@triton.jit
def _rotate_append(
    qkv_ptr, cos_ptr, sin_ptr, lengths_ptr, slots_ptr, q_gain_ptr, k_gain_ptr, q_pre_ptr, q_ptr, k_pool_ptr, v_pool_ptr, head_stride, eps,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one head of one request; the query heads come first, then the keys, then the values."""
    follow(EARLY)
    request, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = dim // 2
    lane = tl.arange(0, HALF)
    inside = lane < half
    source = qkv_ptr + (request * (heads + 2 * kv_heads) + head) * dim
    low = tl.load(source + lane, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + half + lane, mask=inside, other=0.0).to(tl.float32)
    position = tl.maximum(tl.load(lengths_ptr + request) - 1, 0)
    slot = tl.load(slots_ptr + request)
    if head >= heads + kv_heads:
        target = v_pool_ptr + (head - heads - kv_heads) * head_stride.to(tl.int64) + slot * dim
        tl.store(target + lane, low, mask=inside)
        tl.store(target + half + lane, high, mask=inside)
    else:
        is_query = head < heads
        if NORM:
            spread = tl.rsqrt((tl.sum(low * low) + tl.sum(high * high)) / dim + eps)
            gain_ptr = tl.where(is_query, q_gain_ptr, k_gain_ptr)
            low *= spread * tl.load(gain_ptr + lane, mask=inside, other=0.0).to(tl.float32)
            high *= spread * tl.load(gain_ptr + half + lane, mask=inside, other=0.0).to(tl.float32)
        # The query before RoPE is the one in the model's precision, so that a match sees what a prompt's query would be.
        low, high = low.to(q_ptr.dtype.element_ty).to(tl.float32), high.to(q_ptr.dtype.element_ty).to(tl.float32)
        cos = tl.load(cos_ptr + position * half + lane, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + position * half + lane, mask=inside, other=0.0)
        turned_low, turned_high = low * cos - high * sin, high * cos + low * sin
        if is_query:
            at = (request * heads + head) * dim
            tl.store(q_pre_ptr + at + lane, low, mask=inside)
            tl.store(q_pre_ptr + at + half + lane, high, mask=inside)
            tl.store(q_ptr + at + lane, turned_low, mask=inside)
            tl.store(q_ptr + at + half + lane, turned_high, mask=inside)
        else:
            target = k_pool_ptr + (head - heads) * head_stride.to(tl.int64) + slot * dim
            tl.store(target + lane, turned_low, mask=inside)
            tl.store(target + half + lane, turned_high, mask=inside)


def rotate_append(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: PagedKVCache,
    layer: int,
    heads: int,
    gains: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """qkv [B, (Hq + 2 Hkv) * d] of the tokens of the cache's last ``advance`` -> queries before and after RoPE, each [B, Hq, d].

    K (rotated) and V go into the cache. cos, sin: float32 [positions, d / 2]. ``gains``: those of the RMS norms of queries and keys,
    each [d], where a model has them. No host synchronisation.
    """
    k, v = cache.keys(layer), cache.values(layer)
    kv_heads, dim = k.shape[0], k.shape[-1]
    batch = qkv.shape[0]
    q_pre, q = (torch.empty(batch, heads, dim, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    early = dependent_launch(qkv.device)
    q_gain, k_gain = gains or (qkv, qkv)
    with on_device(qkv):
        _rotate_append[(batch, heads + 2 * kv_heads)](
            qkv, cos, sin, cache.lengths, cache.slots, q_gain, k_gain, q_pre, q, k, v, k.stride(0), eps,
            heads=heads, kv_heads=kv_heads, dim=dim, HALF=triton.next_power_of_2(dim // 2), NORM=gains is not None, EARLY=early,
            num_warps=1, **launch_options(early),
        )  # fmt: skip
    return q_pre, q
