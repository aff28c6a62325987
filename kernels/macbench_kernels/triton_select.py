"""Top-k of long rows in one kernel: the k-th largest score is found bit by bit, then a second look writes who is above it.

A row stays in registers for all 32 bits if it fits, so that it is read once; longer ones are read from the L2 cache again and again.
"""

import torch
import triton
import triton.language as tl

from macbench_kernels.triton_common import dependent_launch, follow, launch_options, launchable, on_device

# Scores that one program holds, and those that it writes about together: running sums take shared memory.
MOST = 16384
STEP = 4096


@triton.jit
def ordered_bits(scores):
    """Unsigned integers that are ordered like the scores."""
    bits = (scores + 0.0).to(tl.uint32, bitcast=True)  # + 0.0 makes -0 a 0
    return bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@triton.jit
def _keys(score_ptr, valid_ptr, row, start, n, TILE: tl.constexpr):
    """Unsigned integers that are ordered like the scores; 0 for what is no candidate."""
    i = start + tl.arange(0, TILE)
    scores = tl.load(score_ptr + row * n + i, mask=i < n, other=0.0)
    valid = tl.load(valid_ptr + row * n + i, mask=i < n, other=0)
    return tl.where(valid != 0, ordered_bits(scores), 0).to(tl.uint32)


@triton.jit
def _at_least(keys, score_ptr, valid_ptr, row, n, least, TILE: tl.constexpr, FITS: tl.constexpr):
    """How many keys of the row are at least ``least``."""
    if FITS:
        return tl.sum((keys >= least).to(tl.int32), 0)
    number = 0
    for start in range(0, n, TILE):
        number += tl.sum((_keys(score_ptr, valid_ptr, row, start, n, TILE) >= least).to(tl.int32), 0)
    return number


@triton.jit
def _select(
    score_ptr, valid_ptr, id_ptr, count_ptr, n, k, TILE: tl.constexpr, PART: tl.constexpr, FITS: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    one = tl.full((), 1, tl.uint32)
    keys = _keys(score_ptr, valid_ptr, row, 0, n, TILE)
    wanted = tl.minimum(_at_least(keys, score_ptr, valid_ptr, row, n, one, TILE, FITS), k)
    last = tl.full((), 0, tl.uint32)  # the largest key that at least ``wanted`` keys reach
    bit = one << 31
    for _ in range(32):
        reached = _at_least(keys, score_ptr, valid_ptr, row, n, last | bit, TILE, FITS) >= wanted
        last = tl.where(reached, last | bit, last)
        bit = bit >> 1
    above = tl.where(last == 0xFFFFFFFF, 0, _at_least(keys, score_ptr, valid_ptr, row, n, last + one, TILE, FITS))
    ties = wanted - above  # that many of those with the last key, the first ones
    written = 0
    for start in range(0, n, PART):
        some = _keys(score_ptr, valid_ptr, row, start, n, PART)
        tied = (some == last).to(tl.int32)
        rank = tl.cumsum(tied, 0)
        chosen = ((some > last) | ((tied != 0) & (rank <= ties))).to(tl.int32)
        place = written + tl.cumsum(chosen, 0) - 1
        tl.store(id_ptr + row * k + place, start + tl.arange(0, PART), mask=chosen != 0)
        written += tl.sum(chosen, 0)
        ties -= tl.minimum(ties, tl.sum(tied, 0))
    tl.store(count_ptr + row, wanted)


def top(scores: torch.Tensor, k: int, valid: torch.Tensor, ordered: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """See select.top; what is not ordered comes in ascending order of the index."""
    launchable(scores, {"valid": valid})
    n = scores.shape[-1]
    k = min(k, n)
    rows = scores.shape[:-1]
    scores, valid = scores.float().contiguous(), valid.expand(scores.shape).contiguous()
    ids = torch.zeros(*rows, k, dtype=torch.int32, device=scores.device)
    counts = torch.empty(rows, dtype=torch.int32, device=scores.device)
    if not ids.numel():
        return ids, counts.zero_()
    tile = min(max(triton.next_power_of_2(n), 128), MOST)
    early = dependent_launch(scores.device)
    with on_device(scores):
        _select[(counts.numel(),)](
            scores, valid.view(torch.uint8), ids, counts, n, k, TILE=tile, PART=min(tile, STEP), FITS=n <= tile, EARLY=early,
            num_warps=min(max(tile // 512, 4), 16), **launch_options(early),
        )  # fmt: skip
    if ordered:  # equal scores stay in ascending order; what was not chosen stays behind
        unused = torch.arange(k, device=ids.device) >= counts[..., None]
        order = (scores.gather(-1, ids.long()) + 0.0).masked_fill(unused, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
        ids = ids.gather(-1, order)
    return ids, counts
