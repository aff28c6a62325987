"""Attention over selected tokens and pages against float64, on both backends; nothing else is read; the ledger counts what was selected."""

import pytest
import torch
from macbench_kernels import UnsupportedError, kernels

from macbench.counting import Ledger, Shape
from tests.conftest import DEVICE, exact_state, filled_cache

SCALE = 0.3
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32,)


def problem(lengths, group, dim, page_size, width, unit, per_query_head, kv_heads=2, dtype=torch.float32, seed=0):
    """A shuffled cache of mixed lengths; every set is a random choice of ids of its own size, with nonsense behind it."""
    generator = torch.Generator().manual_seed(seed)
    batch, longest, heads = len(lengths), max(lengths), kv_heads * group
    k, v = (torch.randn(batch, kv_heads, longest, dim, generator=generator).to(DEVICE, dtype) for _ in range(2))
    q = torch.randn(batch, heads, dim, generator=generator).to(DEVICE, dtype)
    cache = filled_cache(k, v, page_size, shuffle=True)
    cache.lengths.copy_(torch.tensor(lengths))
    cache.host_lengths = list(lengths)
    sets = heads if per_query_head else kv_heads
    ids = torch.full((batch, sets, width), 2**30 // unit, dtype=torch.int32)
    counts = torch.zeros(batch, sets, dtype=torch.int32)
    for b, length in enumerate(lengths):
        units = -(-length // unit)
        for r in range(sets):
            n = int(torch.randint(0, min(width, units) + 1, (), generator=generator)) if r else min(width, units)
            ids[b, r, :n] = torch.randperm(units, generator=generator)[:n].int()
            counts[b, r] = n
    return q, k, v, cache, ids.to(DEVICE), counts.to(DEVICE)


def tokens_of(ids, counts, unit, length):
    return [t for i in ids[:counts].tolist() for t in range(i * unit, min((i + 1) * unit, length))]


def poison(cache, keep):
    """NaN in every row but the tokens ``keep[b][g]`` of request b and KV head g."""
    pool = cache.pool
    kept = torch.zeros(pool.kv_heads, pool.pages * pool.page_size, dtype=torch.bool)
    for b, heads in enumerate(keep):
        for g, tokens in enumerate(heads):
            for t in tokens:
                kept[g, cache.tables[b][t // pool.page_size] * pool.page_size + t % pool.page_size] = True
    mask = ~kept.view(1, pool.kv_heads, pool.pages, pool.page_size, 1).to(pool.k.device)
    pool.k.masked_fill_(mask, float("nan"))
    pool.v.masked_fill_(mask, float("nan"))


CASES = [
    dict(lengths=[100, 37], group=3, dim=64, page_size=16, width=24, unit=1, per_query_head=False),
    dict(lengths=[100, 37], group=3, dim=64, page_size=16, width=24, unit=1, per_query_head=True),
    dict(lengths=[100, 1, 0], group=4, dim=64, page_size=16, width=4, unit=16, per_query_head=False),
    dict(lengths=[90], group=1, dim=128, page_size=8, width=9, unit=16, per_query_head=False),
    dict(lengths=[77, 50], group=2, dim=96, page_size=16, width=40, unit=3, per_query_head=True),
    dict(lengths=[130], group=7, dim=256, page_size=5, width=70, unit=1, per_query_head=False),
    dict(lengths=[60, 33], group=20, dim=64, page_size=1, width=8, unit=4, per_query_head=False, kv_heads=1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"g{c['group']}d{c['dim']}u{c['unit']}{'q' if c['per_query_head'] else ''}")
def test_equals_the_definition_and_reads_nothing_else(backend, case, dtype):
    q, k, v, cache, ids, counts = problem(**case, dtype=dtype)
    unit, lengths = case["unit"], case["lengths"]
    heads, kv_heads, sets = q.shape[1], k.shape[1], ids.shape[1]
    chosen = [[tokens_of(ids[b, r], int(counts[b, r]), unit, n) for r in range(sets)] for b, n in enumerate(lengths)]
    share = sets // kv_heads
    poison(cache, [[sorted(set().union(*row[g * share : (g + 1) * share])) for g in range(kv_heads)] for row in chosen])
    out, lse = kernels(backend, DEVICE).attend_selected(q, cache, 0, ids, counts, SCALE, unit)
    assert out.shape == q.shape
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    for b in range(len(lengths)):
        for h in range(heads):
            rows, g = chosen[b][h * sets // heads], h * kv_heads // heads
            if not rows:
                assert lse[b, h] == float("-inf")
                assert not out[b, h].any()
                continue
            want, want_lse = exact_state(q[b, h], k[b, g, rows], v[b, g, rows], SCALE)
            torch.testing.assert_close(out[b, h].double(), want, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(lse[b, h].double(), want_lse, atol=tolerance, rtol=tolerance)


def test_long_sets_are_split_over_programs(backend):
    case = dict(lengths=[700, 300], group=2, dim=64, page_size=16, width=600, unit=1, per_query_head=False, kv_heads=1)
    q, k, v, cache, ids, counts = problem(**case)
    out, _ = kernels(backend, DEVICE).attend_selected(q, cache, 0, ids, counts, SCALE)
    for b, length in enumerate(case["lengths"]):
        rows = tokens_of(ids[b, 0], int(counts[b, 0]), 1, length)
        for h in range(2):
            torch.testing.assert_close(out[b, h].double(), exact_state(q[b, h], k[b, 0, rows], v[b, 0, rows], SCALE)[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"g{c['group']}u{c['unit']}{'q' if c['per_query_head'] else ''}")
def test_the_ledger_counts_tokens_unions_and_ids(case):
    q, k, _, cache, ids, counts = problem(**case)
    unit, lengths = case["unit"], case["lengths"]
    kv_heads, sets = k.shape[1], ids.shape[1]
    shape = Shape(1, q.shape[1], kv_heads, q.shape[2], SCALE, device=DEVICE, batch=len(lengths))
    ledger = Ledger(shape)
    ledger.begin_step(lengths)
    ledger.selected(0, ids, counts, unit, cache.lengths)
    ledger.end_step()
    got = ledger.counts()
    for b, length in enumerate(lengths):
        chosen = [set(tokens_of(ids[b, r], int(counts[b, r]), unit, length)) for r in range(sets)]
        share = sets // kv_heads
        assert got["tokens_log"][0, 0, b] == sum(map(len, chosen)) * (q.shape[1] // sets)
        assert got["tokens_phys"][0, 0, b] == sum(len(set().union(*chosen[g * share : (g + 1) * share])) for g in range(kv_heads))
        assert got["bytes_idx"][0, 0, b] == 4 * sum(int(n) for n, tokens in zip(counts[b], chosen, strict=True) if len(tokens) < length)


def test_golden_accounting_toy():
    """Hq = 2, Hkv = 1, L = 8, sets {0,1,7} and {1,2,7}: logical 6/16, physical 4/8; d = 4: 64 of 128 bytes, 16 bytes written."""
    ledger = Ledger(Shape(1, 2, 1, 4, 0.5))
    ledger.begin_step([8])
    ledger.selected(0, torch.tensor([[[0, 1, 7], [1, 2, 7]]], dtype=torch.int32), torch.tensor([[3, 3]], dtype=torch.int32), 1, torch.tensor([8]))
    ledger.end_step()
    got = {name: int(value.sum()) for name, value in ledger.counts().items()}
    assert (got["tokens_log"], got["tokens_phys"], got["bytes_kv"], got["bytes_full"], got["bytes_write"]) == (6, 4, 64, 128, 16)


def test_wrong_sets_are_refused_in_one_line(device):
    k = torch.zeros(1, 2, 4, 64, device=device)
    q, ids = torch.zeros(1, 6, 64, device=device), torch.zeros(1, 3, 2, dtype=torch.int32, device=device)
    with pytest.raises(UnsupportedError, match="one set per KV head") as error:
        kernels("triton", device).attend_selected(q, filled_cache(k, k), 0, ids, ids[..., 0], SCALE)
    assert "\n" not in str(error.value)
