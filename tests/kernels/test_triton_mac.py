"""The fused MAC step against the composed torch reference, and against poison: on the CPU interpreted in float32, on a GPU in bf16 and fp16."""

import pytest
import torch
from macbench_kernels import MacParams, Ring, UnsupportedError, kernels, scanned_rows
from macbench_kernels.mac import compose
from macbench_kernels.torch_backend import attend, match
from macbench_kernels.triton_mac import mac_step

from tests.conftest import DEVICE, filled_cache

pytestmark = pytest.mark.usefixtures("seed")
DTYPES = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32,)
reference = compose(match, attend)


def problem(lengths, group, dim, capacity, page_size=16, kv_heads=2, dtype=torch.float32, fill=True):
    """Cache of mixed lengths, a ring with entries, and a query that is near some entries and far from the others; the first head's is near."""
    normal = torch.randn
    batch, longest, heads = len(lengths), max(lengths), kv_heads * group
    k, v = (normal(batch, kv_heads, longest, dim).to(DEVICE, dtype) for _ in range(2))
    cache = filled_cache(k, v, page_size, shuffle=True)
    cache.lengths.copy_(torch.tensor(lengths))
    cache.host_lengths = list(lengths)
    ring = Ring.create(batch, heads, capacity, dim, dtype, DEVICE)
    if fill:
        ring.q.copy_(normal(*ring.q.shape))
        ring.out.copy_(normal(*ring.out.shape))
        ring.lse.copy_(3 + normal(*ring.lse.shape))
        ring.depth.copy_(torch.randint(0, 4, ring.depth.shape))
        ring.depth[0, 0] = 0
    near = torch.randint(0, capacity, (batch, heads)).to(DEVICE)
    row = ring.q[torch.arange(batch, device=DEVICE)[:, None], torch.arange(heads, device=DEVICE), near].float()
    close = (torch.rand(batch, heads, 1) < 0.6).to(DEVICE)
    close[0, 0] = True
    q_pre = torch.where(close, row + 0.02 * normal(batch, heads, dim).to(DEVICE), 4 * normal(batch, heads, dim).to(DEVICE)).to(dtype)
    return q_pre, normal(batch, heads, dim).to(DEVICE, dtype), cache, ring


def copied(ring: Ring) -> Ring:
    return Ring(ring.q.clone(), ring.out.clone(), ring.lse.clone(), ring.depth.clone())


def assert_same(step, ring, want, want_ring, dtype, visible):
    """Two steps agree; requests without a token have no ring entry to compare."""
    for name in ("spans", "looked_up", "hit", "chain", "scanned"):
        assert torch.equal(getattr(step, name), getattr(want, name)), name
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    lengths = want.spans[1, 1, :, 0].long()
    here = visible.nonzero()[:, 0]
    row = (lengths[here] - 1) % ring.capacity
    # Of the ring the new entries alone: those that stay as they were would hide them.
    for got, expected in [(step.out, want.out), (ring.out[here, :, row], want_ring.out[here, :, row])]:
        got, expected = got.double(), expected.double()
        assert torch.isfinite(got).all()
        assert (got - expected).norm() <= tolerance * expected.norm()
    torch.testing.assert_close(ring.out[visible], want_ring.out[visible], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ring.lse[visible], want_ring.lse[visible], atol=tolerance, rtol=tolerance)
    assert torch.equal(ring.q[visible], want_ring.q[visible])
    assert torch.equal(ring.depth[visible], want_ring.depth[visible])


CASES = [
    dict(lengths=[150, 90], group=4, dim=64, capacity=40, params=MacParams(4.0, 16)),
    dict(lengths=[150, 0, 1, 20], group=3, dim=64, capacity=40, params=MacParams(4.0, 16)),
    dict(lengths=[200], group=7, dim=96, capacity=70, params=MacParams(4.0, 32, sink=3)),
    dict(lengths=[130, 77], group=1, dim=128, capacity=64, params=MacParams(5.0, 24, sink=20, min_context=100)),
    dict(lengths=[140], group=5, dim=64, capacity=33, page_size=1, params=MacParams(4.0, 16, max_chain=2)),
    dict(lengths=[140], group=16, dim=64, capacity=33, page_size=5, params=MacParams(4.0, 16)),
    dict(lengths=[90], group=2, dim=256, capacity=17, page_size=64, params=MacParams(6.0, 8)),
    dict(lengths=[60], group=4, dim=64, capacity=40, params=MacParams(4.0, 256)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"g{c['group']}d{c['dim']}n{c['lengths'][0]}")
def test_equals_the_composed_reference(case, dtype):
    case = dict(case)
    params = case.pop("params")
    q_pre, q, cache, ring = problem(**case, dtype=dtype)
    other = copied(ring)
    scale = q.shape[-1] ** -0.5
    step = mac_step(q_pre, q, cache, 0, ring, params, scale)
    want = reference(q_pre, q, cache, 0, other, params, scale)
    visible = cache.lengths > 0
    assert_same(step, ring, want, other, dtype, visible)
    if min(case["lengths"]) > 2 * params.band + case["capacity"]:
        assert step.hit.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("occupancy", [1, 4])
def test_who_shares_the_tiles_changes_nothing(occupancy, dtype):
    """Reads cut into few long pieces or many short ones; a step with sinks has two reads per KV head."""
    q_pre, q, cache, ring = problem([150, 0, 90], 4, 64, 40, dtype=dtype)
    other, params = copied(ring), MacParams(4.0, 16, sink=3)
    step = mac_step(q_pre, q, cache, 0, ring, params, 0.125, occupancy=occupancy)
    assert_same(step, ring, reference(q_pre, q, cache, 0, other, params, 0.125), other, dtype, cache.lengths > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_was_never_filled_is_looked_up_but_no_hit(dtype):
    q_pre, q, cache, ring = problem([150], 4, 64, 40, dtype=dtype, fill=False)
    other, params = copied(ring), MacParams(1e9, 16)
    step = mac_step(q_pre, q, cache, 0, ring, params, 0.125)
    want = reference(q_pre, q, cache, 0, other, params, 0.125)
    assert step.looked_up.all()
    assert not step.hit.any()
    assert_same(step, ring, want, other, dtype, cache.lengths > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_entry_in_the_row_that_is_overwritten(dtype):
    """The oldest entry sits where the new one goes: it is read before it is written."""
    q_pre, q, cache, ring = problem([161], 4, 64, 40, dtype=dtype)
    q_pre = ring.q[:, :, 160 % 40].clone()
    other, params = copied(ring), MacParams(1.0, 16)
    step = mac_step(q_pre, q, cache, 0, ring, params, 0.125)
    want = reference(q_pre, q, cache, 0, other, params, 0.125)
    assert step.hit.all()
    assert (step.spans[0, 0] == 160 - 40 + 1 - 16).all()
    assert_same(step, ring, want, other, dtype, cache.lengths > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sink", "max_chain", "min_context"), [(0, None, 0), (5, None, 100), (0, 2, 0)])
def test_reads_only_what_it_reports(dtype, sink, max_chain, min_context):
    """Keys outside the spans, ring queries that no match looks at, and states and depths of heads without a match may hold anything."""
    band, capacity = 16, 40
    q_pre, q, cache, ring = problem([150, 30], 4, 64, capacity, dtype=dtype)
    again, params = copied(ring), MacParams(4.0, band, sink, min_context, max_chain)
    step = mac_step(q_pre, q, cache, 0, ring, params, 0.125)
    size = cache.page_size
    needed = torch.zeros(2, cache.pool.pages, size, dtype=torch.bool)
    for b in range(2):
        for s in range(step.spans.shape[0]):
            for h in range(8):
                for key in range(*step.spans[s, :, b, h].tolist()):
                    needed[h // 4, cache.tables[b][key // size], key % size] = True
    assert not needed.all()
    for pool in (cache.keys(0), cache.values(0)):
        pool[~needed.to(DEVICE)] = float("nan")

    scanned = scanned_rows(cache.lengths - 1, capacity, min_context)  # of request 1 the first 29 rows, or none
    unscanned = (torch.arange(capacity, device=DEVICE) >= scanned[:, None])[:, None].expand(2, 8, capacity)
    assert unscanned.any()
    again.q[unscanned] = float("nan")
    unread = torch.ones(2, 8, capacity, dtype=torch.bool, device=DEVICE)
    assert torch.equal(step.looked_up, step.hit)  # no row of this ring is empty
    request, head = torch.nonzero(step.hit, as_tuple=True)
    source = step.spans[0, 0] - 1 + band
    unread[request, head, source[request, head] % capacity] = False
    again.out[unread] = float("nan")
    again.lse[unread] = float("nan")
    again.depth[unread if max_chain is None else unscanned] = -(10**6)  # a bound on chains makes the scan look at every depth
    poisoned = mac_step(q_pre, q, cache, 0, again, params, 0.125)
    for got, want in zip(poisoned, step, strict=True):
        assert torch.equal(got, want)
    request = torch.arange(2, device=DEVICE)
    for name in ("q", "out", "lse", "depth"):
        got, want = (getattr(r, name)[request, :, (cache.lengths - 1) % capacity] for r in (again, ring))
        assert torch.equal(got, want), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_chained_steps_stay_with_the_reference(dtype):
    """Entries are built on entries: after 100 steps the output and the whole ring still agree with float32 arithmetic on the same choices."""
    steps = 100 if DEVICE == "cuda" else 9
    batch, kv_heads, group, dim, capacity, first = 2, 2 if DEVICE == "cuda" else 1, 4, 64, 24, 100
    heads, params, scale = kv_heads * group, MacParams(3.0, 16), 0.125
    k, v = (torch.randn(batch, kv_heads, first + steps, dim).to(dtype) for _ in range(2))
    cache = filled_cache(k[:, :, :first].to(DEVICE), v[:, :, :first].to(DEVICE))
    exact = filled_cache(k[:, :, :first].float(), v[:, :, :first].float())
    ring = Ring.create(batch, heads, capacity, dim, dtype, DEVICE)
    exact_ring = Ring.create(batch, heads, capacity, dim, torch.float32, "cpu")
    pattern = torch.randn(batch, heads, 3, dim)
    reused = 0
    for t in range(steps):
        for each, kind in ((cache, DEVICE), (exact, "cpu")):
            each.extend(1)
            new = (x[:, :, first + t : first + t + 1].to(kind, each.pool.k.dtype) for x in (k, v))
            each.append(0, *new)
        base = pattern[:, :, t % 3]
        base += 0.05 * torch.randn(batch, heads, dim)  # a walk, so that the nearest row is the latest, whatever the rounding
        far = torch.rand(batch, heads, 1) < 0.1
        q_pre = torch.where(far, 5 * torch.randn(batch, heads, dim), base).to(dtype)
        q = torch.randn(batch, heads, dim).to(dtype)
        step = mac_step(q_pre.to(DEVICE), q.to(DEVICE), cache, 0, ring, params, scale)
        want = reference(q_pre.float(), q.float(), exact, 0, exact_ring, params, scale)
        assert torch.equal(step.spans.cpu(), want.spans)
        assert torch.equal(step.chain.cpu(), want.chain)
        assert (step.out.cpu().float() - want.out).norm() <= 1e-2 * want.out.norm()
        reused += int(want.hit.sum())
    assert reused > steps * heads * batch // 2
    assert (ring.out.cpu() - exact_ring.out).norm() <= 1e-2 * exact_ring.out.norm()
    finite = torch.isfinite(exact_ring.lse)
    assert (ring.lse.cpu() - exact_ring.lse)[finite].abs().max() <= 1e-2


def captured_step(step):
    """(results, replay) of a step on static buffers: one CUDA graph, or on a CPU the same call into the same result tensors."""
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        return results, graph.replay
    results = [torch.empty_like(part) for part in step()]

    def replay():
        for kept, part in zip(results, step(), strict=True):
            kept.copy_(part)

    return results, replay


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_graph_serves_growing_lengths_and_changing_hits(dtype):
    """On a GPU a graph captured once and replayed 200 times; on a CPU 5 steps on the same static buffers. Equal to fresh calls."""
    steps, first = (200, 700) if DEVICE == "cuda" else (5, 70)
    batch, kv_heads, group, dim, capacity = 3, *((2, 4, 128) if DEVICE == "cuda" else (1, 2, 32)), 64
    heads, params, scale = kv_heads * group, MacParams(4.0, 32), 0.1
    k, v = (torch.randn(batch, kv_heads, first + steps, dim, device=DEVICE, dtype=dtype) for _ in range(2))
    cache = filled_cache(k, v)
    start = torch.tensor([first, 1, first // 2], dtype=torch.int32, device=DEVICE)
    ring = Ring.create(batch, heads, capacity, dim, dtype, DEVICE)
    eager_ring = copied(ring)
    pattern = torch.randn(steps, batch, heads, dim, device=DEVICE)
    repeats = torch.rand(steps, batch, heads, 1, device=DEVICE) < torch.linspace(0, 1, steps, device=DEVICE)[:, None, None, None]
    for t in range(1, steps):
        pattern[t] = torch.where(repeats[t], pattern[t - 1], pattern[t])
    q_pre, q = pattern.to(dtype), torch.randn(steps, batch, heads, dim, device=DEVICE).to(dtype)

    x, y = q_pre[0].clone(), q[0].clone()
    cache.lengths.copy_(start)
    warm = copied(ring)
    mac_step(x, y, cache, 0, warm, params, scale)

    def on_buffers():
        result = mac_step(x, y, cache, 0, ring, params, scale)
        cache.lengths += 1
        return result

    clean = copied(ring)
    captured, replay = captured_step(on_buffers)
    for name in ("q", "out", "lse", "depth"):
        getattr(ring, name).copy_(getattr(clean, name))
    replayed = []
    cache.lengths.copy_(start)
    for t in range(steps):
        x.copy_(q_pre[t])
        y.copy_(q[t])
        replay()
        replayed.append([part.clone() for part in captured])
    cache.lengths.copy_(start)
    hits = []
    for t in range(steps):
        step = mac_step(q_pre[t], q[t], cache, 0, eager_ring, params, scale)
        cache.lengths += 1
        hits.append(int(step.hit.sum()))
        for got, want in zip(replayed[t], step, strict=True):
            assert torch.equal(got, want)
    assert len(set(hits)) > (5 if DEVICE == "cuda" else 2)
    assert torch.equal(ring.out, eager_ring.out)


def test_unsupported_input_is_one_line():
    _, q, cache, ring = problem([20], 2, 64, 8)
    for bad in (q.double(), q[:, :3], q[..., :4]):
        with pytest.raises(UnsupportedError) as error:
            kernels("triton", DEVICE).mac_step(bad, bad, cache, 0, ring, MacParams(1.0, 4), 1.0)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_items_than_fit_in_one_look(dtype, monkeypatch):
    """The prefix sum over all work is made in chunks once there are many requests."""
    monkeypatch.setattr("macbench_kernels.triton_attend._PROLOGUE_ELEMENTS", 32)
    lengths = [int(n) for n in torch.randint(0, 90, (20,))]
    q_pre, q, cache, ring = problem(lengths, 1, 64, 16, dtype=dtype)
    other, params = copied(ring), MacParams(4.0, 16)
    step = mac_step(q_pre, q, cache, 0, ring, params, 0.125)
    want = reference(q_pre, q, cache, 0, other, params, 0.125)
    assert_same(step, ring, want, other, dtype, cache.lengths > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sink", [0, 30])
def test_many_pieces_of_one_item(dtype, sink, monkeypatch):
    """One program per tile, and fewer pieces loaded at once than there are."""
    monkeypatch.setattr("macbench_kernels.triton_common._INTERPRETED_PROCESSORS", 40)
    monkeypatch.setattr("macbench_kernels.triton_attend._MERGE_ELEMENTS", 32)
    q_pre, q, cache, ring = problem([500], 2, 64, 32, kv_heads=1, dtype=dtype)
    other, params = copied(ring), MacParams(4.0, 150, sink=sink)
    step = mac_step(q_pre, q, cache, 0, ring, params, 0.125, block=64, occupancy=1)
    want = reference(q_pre, q, cache, 0, other, params, 0.125)
    assert_same(step, ring, want, other, dtype, cache.lengths > 0)
