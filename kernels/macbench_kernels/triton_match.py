"""Ring match: the nearest of the last K queries of every head, by direct L2 distance."""

import torch
import triton
import triton.language as tl

from macbench_kernels.dispatch import UnsupportedError
from macbench_kernels.ring import Match, Ring
from macbench_kernels.triton_common import DTYPES, on_device

BLOCK_ROWS = 64


@triton.jit
def _match(
    q_ptr, ring_ptr, depth_ptr, position_ptr, slot_ptr, source_ptr, distance_ptr, hit_ptr,
    radius, oldest, max_chain, min_context, heads, capacity,
    dim: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """One program: one (request, query head). ring [B, Hq, capacity, dim]."""
    row = tl.program_id(0)
    position = tl.load(position_ptr + row // heads)
    channel = tl.arange(0, DIM)
    q = tl.load(q_ptr + row * dim + channel, mask=channel < dim, other=0.0).to(tl.float32)
    rows = tl.where(position + 1 >= min_context, tl.minimum(position, capacity), 0)
    base = row.to(tl.int64) * capacity
    best, best_slot = position * 0.0 + float("inf"), position * 0  # tensors even where the loop does not run
    for block in range(0, rows, BLOCK):
        slot = block + tl.arange(0, BLOCK)
        # The last position that was written to this row; all of them are below `position`.
        held = position - 1 - (position - 1 - slot + capacity) % capacity
        eligible = (slot < rows) & (held >= oldest)
        if CHAIN:
            depth = tl.load(depth_ptr + base + slot, mask=slot < rows, other=0)
            eligible = eligible & (depth < max_chain)
        old = tl.load(ring_ptr + (base + slot)[:, None] * dim + channel, mask=(slot < rows)[:, None] & (channel < dim), other=0.0)
        gap = old.to(tl.float32) - q
        distance = tl.where(eligible, tl.sum(gap * gap, 1), float("inf"))
        near = tl.min(distance)
        first = tl.min(tl.where(distance == near, slot, capacity))  # ties: the lowest row
        best_slot = tl.where(near < best, first, best_slot)
        best = tl.minimum(near, best)
    best = tl.sqrt(best)
    tl.store(slot_ptr + row, best_slot.to(tl.int64))
    tl.store(source_ptr + row, position - 1 - (position - 1 - best_slot + capacity) % capacity)
    tl.store(distance_ptr + row, best)
    tl.store(hit_ptr + row, best < radius)


def match(
    q: torch.Tensor, ring: Ring, position: torch.Tensor, radius: float, oldest: int, max_chain: int | None = None, min_context: int = 0
) -> Match:
    """See torch_backend.match: q [B, Hq, d] before RoPE, position int32 [B]. No host synchronisation."""
    if q.dtype not in DTYPES or q.dtype != ring.q.dtype:
        raise UnsupportedError(f"dtype {q.dtype} with a ring of {ring.q.dtype}: triton kernels take float16, bfloat16 or float32, the same for both")
    q = q.contiguous()
    batch, heads, dim = q.shape
    shape = (batch, heads)
    slot = torch.empty(shape, dtype=torch.int64, device=q.device)
    source = torch.empty(shape, dtype=torch.int32, device=q.device)
    distance = torch.empty(shape, dtype=torch.float32, device=q.device)
    hit = torch.empty(shape, dtype=torch.bool, device=q.device)
    with on_device(q):
        _match[(batch * heads,)](
            q, ring.q, ring.depth, position, slot, source, distance, hit,
            radius, max(oldest, 0), 0 if max_chain is None else max_chain, min_context, heads, ring.capacity,
            dim=dim, DIM=triton.next_power_of_2(dim), BLOCK=BLOCK_ROWS, CHAIN=max_chain is not None,
        )  # fmt: skip
    return Match(slot, source, distance, hit)
