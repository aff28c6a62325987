"""Ring match: the nearest of the last K queries of every head, by direct L2 distance.

The rows of a head are split over several programs. A split leaves one int64 per head, ordered like (distance, row):

    bits of the squared distance (float32) << 32 | row << 1 | the row's state is not empty

so that the minimum over splits is the nearest row and ties go to the lowest. Whoever needs the match takes that minimum itself.
"""

import torch
import triton
import triton.language as tl

from macbench_kernels.ring import Match, Ring
from macbench_kernels.triton_common import check_ring, dependent_launch, follow, launch_options, launchable, on_device, processors

BLOCK_ROWS = 64
# Rows of a head are split until there are about this many programs per multiprocessor.
PROGRAMS_PER_PROCESSOR = 4
MAX_SPLITS = 8
NOTHING: tl.constexpr = tl.constexpr(0x7F800000 << 32)  # infinitely far, row 0, empty


@triton.jit
def _scan(
    q_ptr, ring_ptr, lse_ptr, depth_ptr, position_ptr, keys_ptr, found_ptr, scanned_ptr,
    shift, radius, oldest, max_chain, min_context, heads, capacity, share,
    dim: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, CHAIN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: ``share`` rows of one (request, query head). ring [B, Hq, capacity, dim]; keys and found [splits, B, Hq]."""
    row, split = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, DIM)
    follow(EARLY)
    position = tl.load(position_ptr + row // heads) + shift
    q = tl.load(q_ptr + row * dim + channel, mask=channel < dim, other=0.0).to(tl.float32)
    rows = _scannable(position, min_context, capacity)
    base = row.to(tl.int64) * capacity
    best = tl.full([BLOCK], NOTHING, tl.int64)
    begin = split * share
    for block in tl.range(begin, tl.minimum(begin + share, rows), BLOCK, num_stages=STAGES):
        slot = block + tl.arange(0, BLOCK)
        written = slot < rows
        held = source_of(slot, position, capacity)
        eligible = written & (held >= oldest)
        if CHAIN:
            eligible = eligible & (tl.load(depth_ptr + base + slot, mask=written, other=0) < max_chain)
        inside = written[:, None]
        if dim != DIM:
            inside = inside & (channel < dim)[None, :]
        old = tl.load(ring_ptr + (base + slot)[:, None] * dim + channel[None, :], mask=inside, other=0.0)
        gap = old.to(tl.float32) - q[None, :]
        distance = tl.where(eligible, tl.sum(gap * gap, 1), float("inf"))
        key = (distance.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (slot.to(tl.int64) << 1)
        best = tl.minimum(best, tl.where(eligible, key, NOTHING))
    near = tl.min(best, 0)
    distance, slot, _ = unpack(near)
    # A row that was never filled holds the empty state: it can be near, but there is nothing to reuse.
    lse = tl.load(lse_ptr + base + slot, mask=distance < radius, other=float("-inf"))
    target = split * tl.num_programs(0) + row
    tl.store(found_ptr + target, lse)
    tl.store(keys_ptr + target, near | (lse > float("-inf")).to(tl.int64))
    tl.store(scanned_ptr + row // heads, rows, mask=(split == 0) & (row % heads == 0))


@triton.jit
def _scannable(position, min_context, capacity):
    """Rows that a match at ``position`` looks at: see ring.scanned_rows."""
    return tl.where(position + 1 >= min_context, tl.minimum(tl.maximum(position, 0), capacity), 0)


@triton.jit
def unpack(key):
    """(distance, row, state is not empty) of a packed match."""
    distance = tl.sqrt_rn((key >> 32).to(tl.int32).to(tl.float32, bitcast=True))
    return distance, ((key & 0xFFFFFFFF) >> 1).to(tl.int32), (key & 1) != 0


@triton.jit
def nearest(keys_ptr, row, wanted, rows, SPLITS: tl.constexpr):
    """Packed match of each head ``row`` = request * heads + head, the minimum over the splits; keys [SPLITS, rows]."""
    key = tl.load(keys_ptr + row, mask=wanted, other=NOTHING)
    for split in tl.static_range(1, SPLITS):
        key = tl.minimum(key, tl.load(keys_ptr + split * rows + row, mask=wanted, other=NOTHING))
    return key


@triton.jit
def nearest_state(keys_ptr, found_ptr, row, rows, SPLITS: tl.constexpr):
    """(packed match, lse of its ring row) of one head; found [SPLITS, rows] keeps the lse, whose row may be overwritten meanwhile."""
    key, lse = tl.load(keys_ptr + row), tl.load(found_ptr + row)
    for split in tl.static_range(1, SPLITS):
        other = tl.load(keys_ptr + split * rows + row)
        lse = tl.where(other < key, tl.load(found_ptr + split * rows + row), lse)
        key = tl.minimum(key, other)
    return key, lse


@triton.jit
def source_of(slot, position, capacity):
    """Position that a ring row holds just before ``position`` (at least 1) is written."""
    last = position - 1
    held = last - (last + capacity) % capacity + slot
    return tl.where(held > last, held - capacity, held)


@triton.jit
def _report(
    keys_ptr, position_ptr, slot_ptr, source_ptr, distance_ptr, hit_ptr, radius, heads, rows, capacity,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK heads of all requests; the packed match as the fields of ``Match``."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    follow(EARLY)
    position = tl.load(position_ptr + row // heads, mask=inside, other=1)
    distance, slot, _ = unpack(nearest(keys_ptr, row, inside, rows, SPLITS))
    tl.store(slot_ptr + row, slot.to(tl.int64), mask=inside)
    tl.store(source_ptr + row, source_of(slot, position, capacity), mask=inside)
    tl.store(distance_ptr + row, distance, mask=inside)
    tl.store(hit_ptr + row, distance < radius, mask=inside)


def scan(
    q: torch.Tensor, ring: Ring, position: torch.Tensor, shift: int, radius: float, oldest: int, max_chain: int | None, min_context: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the scan. q [B, Hq, d] contiguous; position int32 [B], to which ``shift`` is added.

    Returns packed matches int64 [splits, B, Hq], the lse of the matched rows float32 [splits, B, Hq] (-inf outside the radius), and how many
    rows of each head's ring were scanned, int32 [B].
    """
    batch, heads, dim = q.shape
    wide = triton.next_power_of_2(dim)
    block = max(16, min(BLOCK_ROWS, 16384 // (wide * q.element_size())))
    aim = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(q.device), batch * heads)
    splits = min(triton.next_power_of_2(aim), MAX_SPLITS, triton.next_power_of_2(triton.cdiv(ring.capacity, block)))
    share = triton.cdiv(triton.cdiv(ring.capacity, splits), block) * block
    keys = torch.empty(splits, batch, heads, dtype=torch.int64, device=q.device)
    found = torch.empty(splits, batch, heads, dtype=torch.float32, device=q.device)
    scanned = torch.empty(batch, dtype=torch.int32, device=q.device)
    early = dependent_launch(q.device)
    _scan[(batch * heads, splits)](
        q, ring.q, ring.lse, ring.depth, position, keys, found, scanned,
        shift, radius, max(oldest, 0), 0 if max_chain is None else max_chain, min_context, heads, ring.capacity, share,
        dim=dim, DIM=wide, BLOCK=block, STAGES=2, CHAIN=max_chain is not None, EARLY=early, num_warps=4, **launch_options(early),
    )  # fmt: skip
    return keys, found, scanned


def match(
    q: torch.Tensor, ring: Ring, position: torch.Tensor, radius: float, oldest: int, max_chain: int | None = None, min_context: int = 0
) -> Match:
    """See torch_backend.match: q [B, Hq, d] before RoPE, position int32 [B]. No host synchronisation."""
    check_ring(q, ring)
    launchable(q, {"positions": position})
    q = q.contiguous()
    shape, rows = q.shape[:2], q.shape[0] * q.shape[1]
    slot = torch.empty(shape, dtype=torch.int64, device=q.device)
    source = torch.empty(shape, dtype=torch.int32, device=q.device)
    distance = torch.empty(shape, dtype=torch.float32, device=q.device)
    hit = torch.empty(shape, dtype=torch.bool, device=q.device)
    if rows == 0:
        return Match(slot, source, distance, hit)
    early = dependent_launch(q.device)
    with on_device(q):
        keys, _, _ = scan(q, ring, position, 0, radius, oldest, max_chain, min_context)
        _report[(triton.cdiv(rows, 128),)](
            keys, position, slot, source, distance, hit, radius, shape[1], rows, ring.capacity,
            SPLITS=keys.shape[0], BLOCK=128, EARLY=early, **launch_options(early),
        )  # fmt: skip
    return Match(slot, source, distance, hit)
