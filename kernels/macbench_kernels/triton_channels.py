"""The kernels of ``channels`` in Triton: one launch for each of the three. No host synchronisation."""

import torch
import triton
import triton.language as tl

from macbench_kernels.triton_common import dependent_launch, follow, launch_options, launchable, on_device
from macbench_kernels.triton_select import MOST, STEP, ordered_bits

# Columns of scores that a program looks at together.
_COLUMNS = 1024


@triton.jit
def _row_channels(
    q_ptr, weights_ptr, rows_ptr, taken,
    kv_heads: tl.constexpr, members: tl.constexpr, dim: tl.constexpr, BOTH: tl.constexpr, MEMBERS: tl.constexpr, DIM: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one (request, KV head), whose heads lie together: q [B * Hkv, members, dim]. weights [B * Hkv, members, taken]."""
    follow(EARLY)
    pair = tl.program_id(0)
    member, channel = tl.arange(0, MEMBERS), tl.arange(0, DIM)
    real = (member < members)[:, None] & (channel < dim)[None, :]
    q = tl.load(q_ptr + (pair * members + member)[:, None] * dim + channel[None, :], mask=real, other=0.0).to(tl.float32)
    strength = tl.where(channel < dim, tl.sum(tl.abs(q), 0), -1.0)
    ahead = (strength[:, None] > strength[None, :]) | ((strength[:, None] == strength[None, :]) & (channel[:, None] < channel[None, :]))
    rank = tl.sum(ahead.to(tl.int32), 0)
    chosen = rank < taken
    inside = tl.sum(tl.where(chosen[None, :], tl.abs(q), 0.0), 1)
    tau = tl.maximum(tl.sqrt_rn(dim * inside / tl.maximum(tl.sum(tl.abs(q), 1), 1e-30)), 1e-30)
    target = (pair * members + member)[:, None] * taken + rank[None, :]
    tl.store(weights_ptr + target, q / tau[:, None], mask=real & chosen[None, :])
    row = channel
    if BOTH:
        row += tl.where(tl.sum(q, 0) > 0, 0, dim)
    tl.store(rows_ptr + pair * taken + rank, row, mask=chosen)


def strong_channels(q: torch.Tensor, kv_heads: int, taken: int, both: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See channels.strong_channels: q [B, Hq, d] -> weights float32 [B, Hkv, M, taken], rows int32 [B, Hkv, taken]."""
    launchable(q, {})
    batch, heads, dim = q.shape
    members = heads // kv_heads
    weights = torch.empty(batch, kv_heads, members, taken, dtype=torch.float32, device=q.device)
    rows = torch.empty(batch, kv_heads, taken, dtype=torch.int32, device=q.device)
    early = dependent_launch(q.device)
    with on_device(q):
        _row_channels[(batch * kv_heads,)](
            q.contiguous(), weights, rows, taken, kv_heads=kv_heads, members=members, dim=dim, BOTH=both,
            MEMBERS=triton.next_power_of_2(members), DIM=triton.next_power_of_2(dim), EARLY=early, num_warps=4, **launch_options(early),
        )  # fmt: skip
    return weights, rows


@triton.jit
def _mean_probability(
    scores_ptr, left_ptr, out_ptr, units,
    kv_heads: tl.constexpr, members: tl.constexpr, SIZE: tl.constexpr, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one (request, KV head), twice over its scores [members, units]. out [B * Hkv, units]."""
    follow(EARLY)
    pair = tl.program_id(0)
    left = tl.load(left_ptr + pair // kv_heads)
    used = tl.minimum(tl.cdiv(left, SIZE), units)  # units that have a token; often far fewer than there is room for
    member, column = tl.arange(0, MEMBERS), tl.arange(0, COLUMNS)
    real = member < members
    base = scores_ptr + (tl.zeros([], tl.int64) + pair * members + member)[:, None] * units
    top = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    for start in range(0, used, COLUMNS):
        unit = start + column
        score = tl.load(base + unit[None, :], mask=real[:, None] & (unit < units)[None, :], other=float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        pivot = tl.maximum(new_top, -1e30)
        tokens = tl.minimum(tl.maximum(left - unit * SIZE, 0), SIZE).to(tl.float32)
        total = total * tl.exp(top - pivot) + tl.sum(tl.exp(score - pivot[:, None]) * tokens[None, :], 1)
        top = new_top
    pivot, total = tl.maximum(top, -1e30), tl.maximum(total, 1e-30) * members
    for start in range(0, used, COLUMNS):
        unit = start + column
        score = tl.load(base + unit[None, :], mask=real[:, None] & (unit < units)[None, :], other=float("-inf"))
        mean = tl.sum(tl.exp(score - pivot[:, None]) / total[:, None], 0)
        tl.store(out_ptr + (tl.zeros([], tl.int64) + pair) * units + unit, mean, mask=unit < units)
    for start in range(tl.cdiv(used, COLUMNS) * COLUMNS, units, COLUMNS):
        unit = start + column
        tl.store(out_ptr + (tl.zeros([], tl.int64) + pair) * units + unit, tl.zeros([COLUMNS], tl.float32), mask=unit < units)


def mean_probability(scores: torch.Tensor, left: torch.Tensor, size: int) -> torch.Tensor:
    """See channels.mean_probability: scores float32 [B, Hkv, M, units] -> float32 [B, Hkv, units]."""
    launchable(scores, {"left": left})
    batch, kv_heads, members, units = scores.shape
    out = torch.empty(batch, kv_heads, units, dtype=torch.float32, device=scores.device)
    wide = triton.next_power_of_2(members)
    early = dependent_launch(scores.device)
    with on_device(scores):
        _mean_probability[(batch * kv_heads,)](
            scores.float().contiguous(), left.int(), out, units, kv_heads=kv_heads, members=members, SIZE=size, MEMBERS=wide,
            COLUMNS=max(128, min(_COLUMNS, 8 * _COLUMNS // wide)), EARLY=early, num_warps=8, **launch_options(early),
        )  # fmt: skip
    return out


@triton.jit
def _units(score_ptr, row, start, units, left, SIZE: tl.constexpr, NEWEST: tl.constexpr, TILE: tl.constexpr):
    """(keys, tokens that may be chosen) of the units from ``start`` on; the newest token is not among them with NEWEST."""
    unit = start + tl.arange(0, TILE)
    tokens = tl.minimum(tl.maximum(left - unit * SIZE, 0), SIZE)
    if NEWEST:
        tokens -= (unit == (left - 1) // SIZE).to(tl.int32)
    keys = ordered_bits(tl.load(score_ptr + row * units + unit, mask=unit < units, other=0.0))
    return keys, tl.where(unit < units, tokens, 0)


@triton.jit
def _tokens_from(
    keys, tokens, least, score_ptr, row, units, left, SIZE: tl.constexpr, NEWEST: tl.constexpr, TILE: tl.constexpr, FITS: tl.constexpr
):  # fmt: skip
    """How many tokens the units have whose keys are at least ``least``."""
    number = tl.sum(tl.where(keys >= least, tokens, 0), 0)
    if not FITS:
        for start in range(TILE, tl.minimum(tl.cdiv(left, SIZE), units), TILE):  # units that have a token
            more, held = _units(score_ptr, row, start, units, left, SIZE, NEWEST, TILE)
            number += tl.sum(tl.where(more >= least, held, 0), 0)
    return number


@triton.jit
def _select_tokens(
    score_ptr, left_ptr, counts_ptr, kept_ptr, removed_ptr, ids_ptr, places_ptr, units, room, keep,
    kv_heads: tl.constexpr, SIZE: tl.constexpr, NEWEST: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, FITS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one (request, KV head). Like triton_select._select, where a unit counts as many as it has tokens."""
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    left, removed = tl.load(left_ptr + row // kv_heads), tl.load(removed_ptr + row // kv_heads)
    count = tl.load(counts_ptr + row)
    one = tl.full((), 1, tl.uint32)
    keys, tokens = _units(score_ptr, row, 0, units, left, SIZE, NEWEST, TILE)
    wanted = tl.maximum(count - (1 if NEWEST else 0), 0)
    wanted = tl.minimum(wanted, _tokens_from(keys, tokens, one - one, score_ptr, row, units, left, SIZE, NEWEST, TILE, FITS))
    last = one - one  # the largest key that units of ``wanted`` tokens reach
    bit = one << 31
    for _ in range(32):
        reached = _tokens_from(keys, tokens, last | bit, score_ptr, row, units, left, SIZE, NEWEST, TILE, FITS) >= wanted
        last = tl.where(reached, last | bit, last)
        bit = bit >> 1
    rest = wanted
    if last != 0xFFFFFFFF:
        rest = wanted - _tokens_from(keys, tokens, last + one, score_ptr, row, units, left, SIZE, NEWEST, TILE, FITS)
    written = tl.full((), 1 if NEWEST else 0, tl.int32)
    if NEWEST:
        newest = left - 1
        own = tl.load(kept_ptr + row * keep + newest, mask=(newest >= 0) & (newest < keep), other=0)
        tl.store(places_ptr + row * room, newest, mask=count > 0)
        tl.store(ids_ptr + row * room, tl.where(newest < keep, own, newest + removed), mask=count > 0)
    for start in range(0, tl.minimum(tl.cdiv(left, SIZE), units), PART):
        some, held = _units(score_ptr, row, start, units, left, SIZE, NEWEST, PART)
        tied = tl.where(some == last, held, 0)
        before = tl.cumsum(tied, 0) - tied
        take = tl.where(some > last, held, tl.minimum(tl.maximum(rest - before, 0), tied))
        place = written + tl.cumsum(take, 0) - take
        for member in tl.static_range(SIZE):
            token = (start + tl.arange(0, PART)) * SIZE + member
            mask = member < take
            old = tl.load(kept_ptr + row * keep + token, mask=mask & (token < keep), other=0)
            tl.store(places_ptr + row * room + place + member, token, mask=mask)
            tl.store(ids_ptr + row * room + place + member, tl.where(token < keep, old, token + removed), mask=mask)
        written += tl.sum(take, 0)
        rest -= tl.minimum(rest, tl.sum(tied, 0))


def top_tokens(
    scores: torch.Tensor, left: torch.Tensor, counts: torch.Tensor, size: int, room: int, newest: bool, kept: torch.Tensor, removed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See channels.top_tokens: scores float32 [B, Hkv, units]; tokens come in ascending order of their places, the newest first."""
    launchable(scores, {"left": left, "counts": counts, "kept": kept, "removed": removed})
    batch, kv_heads, units = scores.shape
    ids, places = torch.zeros(2, batch, kv_heads, room, dtype=torch.int32, device=scores.device)
    tile = min(max(triton.next_power_of_2(units), 128), MOST)
    early = dependent_launch(scores.device)
    with on_device(scores):
        _select_tokens[(batch * kv_heads,)](
            scores.float().contiguous(), left.int(), counts.contiguous(), kept.contiguous(), removed, ids, places, units, room, kept.shape[-1],
            kv_heads=kv_heads, SIZE=size, NEWEST=newest, TILE=tile, PART=min(tile, STEP), FITS=units <= tile, EARLY=early,
            num_warps=min(max(tile // 512, 4), 16), **launch_options(early),
        )  # fmt: skip
    return ids, places
