"""Counts: golden toys, closed forms, and poison: what was not reported as read can be NaN without changing anything."""

import copy

import numpy as np
import pytest
import torch

from macbench.counting import span_tokens
from macbench.methods.full import Full
from macbench.methods.mac import MAC
from tests.conftest import DEVICE
from tests.methods.driver import Driver, Stream
from tests.methods.test_mac import Simulation


def mac(**settings) -> MAC:
    return MAC(**({"tau": 0.45, "window": 48, "band": 16, "min_context": 0} | settings))


METHODS = {
    "full": Full,
    "mac": mac,
    "mac sink": lambda: mac(sink=6),
    "mac chain": lambda: mac(max_chain=2),
    "mac late": lambda: mac(min_context=102),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]()


def spans(*per_head):
    """int [S=1, 2, B=1, heads] from (start, stop) pairs."""
    return np.array(per_head).T[None, :, None, :]


def test_golden_mac_toys():
    """L = 16, a group of two: one head hits {4..15} and one misses; then both hit, {4..15} and {6..15}."""
    logical, physical = span_tokens(spans((4, 16), (0, 16)), 1)
    assert (logical.item() / 32, physical.item() / 16) == (0.875, 1.0)
    logical, physical = span_tokens(spans((4, 16), (6, 16)), 1)
    assert (logical.item() / 32, physical.item() / 16) == (0.6875, 0.75)


def test_union_of_random_spans_equals_sets():
    rng = np.random.default_rng(0)
    for _ in range(50):
        drawn = rng.integers(0, 30, (4, 3, 2, 2, 6))  # [steps, S, 2, B, Hq]
        logical, physical = span_tokens(drawn, 2)
        for step in range(4):
            for b in range(2):
                heads = [[set(range(*drawn[step, s, :, b, h])) for s in range(3)] for h in range(6)]
                assert logical[step, b] == sum(len(x) for spans_ in heads for x in spans_)
                groups = [set().union(*(x for h in range(g * 3, g * 3 + 3) for x in heads[h])) for g in range(2)]
                assert physical[step, b] == sum(map(len, groups))


def few(backend: str, steps: int) -> int:
    """The interpreter takes seconds per step."""
    return steps if backend == "torch" or DEVICE == "cuda" else 4


class Recorder:
    """Stands in for the ledger and remembers the spans; ``muted``, it forgets what a repeated step reports."""

    def __init__(self, ledger):
        self.ledger, self.spans, self.muted = ledger, None, False

    def read(self, layer, spans):
        self.spans = spans.clone()
        self._pass("read", layer, spans)

    def _pass(self, name, *args):
        if not self.muted:
            getattr(self.ledger, name)(*args)

    def __getattr__(self, name):
        return lambda *args: self._pass(name, *args)


def test_poison_outside_the_reported_reads(method, backend):
    """At every step: run once, poison all KV rows (and ring rows) that were not reported, rewind, run again: same output, same ring."""
    stream = Stream.random(140, dtype=torch.float32, device=DEVICE)
    driver = Driver(method, stream, 100, backend)
    method.ledger = Recorder(driver.ledger)
    partial = 0
    for _ in range(few(backend, 20)):
        t = driver.grow()
        before = copy.deepcopy(getattr(method, "rings", []))
        args = (0, stream.q_pre[None, :, t], stream.q[None, :, t], driver.cache)
        want = method.attend(*args)
        driver.ledger.end_step()
        read = torch.zeros(2, t + 1, dtype=torch.bool)
        for start, stop in method.ledger.spans[:, :, 0].tolist():
            for h in range(6):
                read[h // 3, start[h] : stop[h]] = True
        partial += int((~read).any())
        pool = driver.cache.pool
        clean = pool.k.clone(), pool.v.clone()
        used = torch.zeros(2, pool.pages * pool.page_size, dtype=torch.bool)
        for position in range(t + 1):
            slot = driver.cache.tables[0][position // pool.page_size] * pool.page_size + position % pool.page_size
            used[:, slot] = read[:, position]
        poison = (~used).view(1, 2, pool.pages, pool.page_size, 1).to(DEVICE)
        pool.k.masked_fill_(poison, float("nan"))
        pool.v.masked_fill_(poison, float("nan"))
        after = getattr(method, "rings", [])
        if after:
            method.rings = [poisoned_ring(before[0], after[0], t, method, stream)]
        method.ledger.muted = True
        torch.testing.assert_close(method.attend(*args), want, atol=0, rtol=0)
        method.ledger.muted = False
        if after:
            row = t % method.window
            for name in ("q", "out", "lse", "depth"):
                got, expected = (getattr(r, name)[:, :, row] for r in (method.rings[0], after[0]))
                torch.testing.assert_close(got, expected, atol=0, rtol=0)
            method.rings = after
        pool.k.copy_(clean[0])
        pool.v.copy_(clean[1])
    counts = driver.ledger.counts()
    if isinstance(method, MAC):
        assert counts["hits"].sum() > few(backend, 12)
        assert partial > few(backend, 6) - 4
    else:
        assert partial == 0


def poisoned_ring(before, after, t, method, stream):
    """The ring before the step, NaN wherever the step reported no read: queries not scanned, records of heads that did not hit."""
    ring = copy.deepcopy(before)
    written = min(t, method.window) if t + 1 >= method.min_context else 0
    ring.q[:, :, written:] = float("nan")
    scans = written
    for h in range(6):
        distance = (ring.q[0, h, :scans].double() - stream.q_pre[h, t].double()).norm(dim=-1)
        held = torch.tensor([t - 1 - (t - 1 - row) % method.window for row in range(scans)], device=distance.device)
        usable = held >= method.sink + method.band
        if method.max_chain is not None:
            usable &= ring.depth[0, h, :scans] < method.max_chain
        best = distance.masked_fill(~usable, float("inf"))
        hit = scans > 0 and float(best.min()) < method.tau * (2 * 64) ** 0.5
        keep = int(best.argmin()) if hit else -1
        for row in range(method.window):
            if row != keep:
                ring.out[0, h, row] = float("nan")
                ring.lse[0, h, row] = float("nan")
                if method.max_chain is None:  # otherwise the scan reads every depth, and says so
                    ring.depth[0, h, row] = -(10**6)
    return ring


def test_closed_forms(method, backend):
    """Sums over all steps equal what the definition says; which heads hit, and whom, comes from the float64 simulation of test_mac."""
    prompt, steps, heads, kv_heads, d = 100, few(backend, 30), 6, 2, 64
    stream = Stream.random(prompt + steps, dtype=torch.float32, device=DEVICE)
    driver = Driver(method, stream, prompt, backend)
    simulation = Simulation(method, driver) if isinstance(method, MAC) else None
    want = dict.fromkeys(["tokens_log", "tokens_phys", "bytes_state", "bytes_write"], 0)
    for t in range(prompt, prompt + steps):
        driver.step()
        length = t + 1
        want["bytes_write"] += kv_heads * 2 * d * 2
        if not isinstance(method, MAC):
            want["tokens_log"] += heads * length
            want["tokens_phys"] += kv_heads * length
            continue
        _, sources = simulation.step(t)
        reads = [t - (sources[h] + 1 - method.band) + 1 + method.sink if h in sources else length for h in range(heads)]
        want["tokens_log"] += sum(reads)
        want["tokens_phys"] += sum(max(reads[g * 3 : g * 3 + 3]) for g in range(kv_heads))
        scanned = min(t, method.window) if length >= method.min_context else 0
        row = 2 * d + (4 if method.max_chain is not None else 0)
        want["bytes_state"] += heads * scanned * row + len(sources) * (4 * d + 8)
        want["bytes_write"] += heads * (2 * d + 4 * d + 8)
    counts = {name: int(values.sum()) for name, values in driver.ledger.counts().items()}
    for name, value in want.items():
        assert counts[name] == value, name
    assert counts["bytes_kv"] == counts["tokens_phys"] * 2 * d * 2
    lengths = sum(range(prompt + 1, prompt + steps + 1))
    assert counts["tokens_log_full"] == heads * lengths
    assert counts["bytes_full"] == kv_heads * lengths * 2 * d * 2


def test_counts_survive_more_steps_than_a_window():
    """The ledger reduces its buffers every 256 steps: nothing is lost or counted twice there."""
    stream = Stream.random(700, q_heads=2, kv_heads=1, dtype=torch.float32)
    driver = Driver(Full(), stream, 100)
    for _ in range(600):
        driver.step()
    counts = driver.ledger.counts()
    assert counts["tokens_log"][:, 0, 0].tolist() == [2 * n for n in range(101, 701)]
    assert (counts["tokens_log"] == counts["tokens_log_full"]).all()
