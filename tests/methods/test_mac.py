"""MAC against a plain float64 simulation of its definition, which shares no code with it."""

import math

import pytest
import torch

from macbench.errors import ConfigError
from macbench.methods.mac import MAC
from tests.methods.driver import Driver, Stream

CLOSE = {"atol": 1e-11, "rtol": 1e-11}


def union(a, b):
    """State over two disjoint key sets, straight from the definition with unnormalised sums."""
    if a[1] == -math.inf or b[1] == -math.inf:
        return b if a[1] == -math.inf else a
    lse = torch.logaddexp(a[1], b[1])
    return torch.exp(a[1] - lse) * a[0] + torch.exp(b[1] - lse) * b[0], lse


class Simulation:
    """Section "One decode step" of the paper for every head, with a dict for a ring."""

    def __init__(self, method: MAC, driver: Driver):
        self.m, self.d = method, driver
        self.entries = {}  # (head, position) -> (o, lse), depth
        heads, prompt = driver.stream.q.shape[0], driver.prompt
        for h in range(heads):
            for p in range(max(0, prompt - method.window), prompt):
                self.entries[h, p] = (driver.exact(h, p, method.sink, p + 1 - method.band), 0)

    def step(self, t):
        """Returns outputs [Hq, d], the sources of hits by head, and writes the ring."""
        m, outputs, sources = self.m, [], {}
        dim = self.d.stream.q.shape[2]
        for h in range(self.d.stream.q.shape[0]):
            best, source = math.inf, None
            for p in sorted(range(max(0, t - m.window), t), key=lambda p: p % m.window):
                (_, lse), depth = self.entries[h, p]
                if lse == -math.inf or (m.max_chain is not None and depth >= m.max_chain) or t + 1 < m.min_context:
                    continue
                distance = float((self.d.stream.q_pre[h, t] - self.d.stream.q_pre[h, p]).norm())
                if distance < best:
                    best, source = distance, p
            hit = best < m.tau * math.sqrt(2 * dim)
            sink = min(m.sink, t + 1)
            edge = max(t + 1 - m.band, sink)
            if hit:
                stored, depth = self.entries[h, source]
                entry = union(stored, self.d.exact(h, t, source + 1 - m.band, edge)), depth + 1
                sources[h] = source
            else:
                entry = self.d.exact(h, t, sink, edge), 0
            result = union(union(entry[0], self.d.exact(h, t, edge, t + 1)), self.d.exact(h, t, 0, sink))
            self.entries[h, t] = entry
            outputs.append(result[0])
        return torch.stack(outputs), sources


def run(method, prompt, steps, **stream):
    driver = Driver(method, Stream.random(prompt + steps, **stream), prompt)
    return driver, Simulation(method, driver)


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        *((prompt, {"window": 40, "band": 16}) for prompt in (10, 39, 40, 41, 130)),
        *((prompt, {"window": 40, "band": 16, "sink": 5}) for prompt in (10, 40, 130)),
        *((prompt, {"window": 16, "band": 1}) for prompt in (10, 130)),
        *((prompt, {"window": 40, "band": 16, "max_chain": 1}) for prompt in (39, 130)),
        *((prompt, {"window": 40, "band": 16, "max_chain": 0}) for prompt in (41, 130)),
        *((prompt, {"window": 40, "band": 16, "min_context": 100}) for prompt in (40, 130)),
        *((prompt, {"window": 200, "band": 70, "sink": 3}) for prompt in (41, 130)),
        *((prompt, {"window": 1, "band": 8}) for prompt in (10, 130)),
    ],
)
def test_fifty_chained_steps_equal_the_definition(settings, prompt):
    """Outputs and ring entries, prompts shorter and longer than the ring: nothing creeps in over a chain of reuses."""
    method = MAC(tau=0.45, **({"min_context": 0} | settings))
    driver, simulation = run(method, prompt, 50)
    hits = 0
    for t in range(prompt, prompt + 50):
        got = driver.step()
        want, sources = simulation.step(t)
        hits += len(sources)
        torch.testing.assert_close(got, want, **CLOSE)
        ring = method.rings[0]
        for h in range(6):
            for p in range(max(0, t + 1 - method.window), t + 1) if t == prompt + 49 else [t]:
                (out, lse), depth = simulation.entries[h, p]
                row = p % method.window
                torch.testing.assert_close(ring.lse[0, h, row], lse, **CLOSE)
                if lse > -math.inf:
                    torch.testing.assert_close(ring.out[0, h, row], out, **CLOSE)
                    assert ring.depth[0, h, row] == depth
                assert torch.equal(ring.q[0, h, row], driver.stream.q_pre[h, p])
    if prompt + 40 > max(method.band + method.sink, method.min_context) and method.max_chain != 0 and method.window > 1:
        assert hits > 20
    if method.max_chain is not None:
        assert int(method.rings[0].depth.max()) <= method.max_chain


def test_tau_zero_is_full_attention():
    driver, _ = run(MAC(tau=0, window=64, band=16, min_context=0), 100, 30)
    for t in range(100, 130):
        got = driver.step()
        for h in range(6):
            torch.testing.assert_close(got[h], driver.exact(h, t, 0, t + 1)[0], **CLOSE)
    assert driver.ledger.counts()["hits"].sum() == 0


def test_reuse_of_the_identical_query_is_exact():
    stream = Stream.random(140)
    stream.q_pre[:, 100:] = stream.q_pre[:, 60:100]
    stream.q[:, 100:] = stream.q[:, 60:100]
    driver = Driver(MAC(tau=1e-6, window=64, band=16, min_context=0), stream, 100)
    for t in range(100, 140):
        got = driver.step()
        for h in range(6):
            torch.testing.assert_close(got[h], driver.exact(h, t, 0, t + 1)[0], **CLOSE)
    assert driver.ledger.counts()["hits"].sum() == 40 * 6


def test_a_hit_reads_exactly_band_and_tail():
    stream = Stream.random(101)
    stream.q_pre[:, 100] = stream.q_pre[:, 77]
    method = MAC(tau=1e-6, window=64, band=16, min_context=0)
    driver = Driver(method, stream, 100)
    driver.step()
    counts = driver.ledger.counts()
    # [p + 1 - r, t] = [62, 100]: 39 tokens for every head.
    assert counts["tokens_log"].item() == 6 * 39
    assert counts["tokens_phys"].item() == 2 * 39
    assert counts["hits"].item() == 6


def test_reuse_changes_the_output_only_through_the_prefix():
    """A far match must differ from full attention: the stored state really is used."""
    stream = Stream.random(120, repeat=0.5)
    driver = Driver(MAC(tau=0.9, window=64, band=4, min_context=0), stream, 100)
    gaps = []
    for t in range(100, 120):
        got = driver.step()
        gaps += [float((got[h] - driver.exact(h, t, 0, t + 1)[0]).norm()) for h in range(6)]
    assert max(gaps) > 1e-3


def test_several_requests_equal_each_alone():
    from macbench_kernels import MacParams, PagedKVCache, PagePool, Ring, kernels

    streams = [Stream.random(90, seed=s) for s in range(2)]
    layer, params = kernels("torch"), MacParams(0.45 * math.sqrt(128), 8, 2)
    scale = 0.125

    def make(batch):
        pool = PagePool(1, 2, 64, 40, 16, torch.float64)
        return PagedKVCache(pool, batch), Ring.create(batch, 6, 32, 64, torch.float64, "cpu")

    def feed(cache, ring, rows, t):
        cache.extend(1)
        cache.append(0, *(torch.stack([getattr(s, x)[:, t : t + 1] for s in rows]) for x in "kv"))
        q_pre, q = (torch.stack([getattr(s, x)[:, t] for s in rows]) for x in ("q_pre", "q"))
        return layer.mac_step(q_pre, q, cache, 0, ring, params, scale)

    together, alone = make(2), [make(1), make(1)]
    for t in range(90):
        both = feed(*together, streams, t)
        for b in range(2):
            one = feed(*alone[b], streams[b : b + 1], t)
            torch.testing.assert_close(both.out[b], one.out[0], **CLOSE)
            assert torch.equal(both.hit[b], one.hit[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tau", -1),
        ("tau", math.nan),
        ("tau", "low"),
        ("band", 0),
        ("band", 1.5),
        ("window", 0),
        ("sink", -1),
        ("min_context", True),
        ("max_chain", -2),
    ],
)
def test_wrong_parameters_name_key_value_and_what_is_allowed(key, value):
    with pytest.raises(ConfigError, match=f"method.{key}={value}: must be") as error:
        MAC(**{key: value})
    assert "\n" not in str(error.value)
