"""What a trace computes, against loops in float64, MAC's own kernel step, and the engine's own decoding."""

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
import torch
from macbench_kernels import MacParams, PagedKVCache, PagePool, Ring, kernels

from macbench.engine import Engine
from macbench.methods.full import Full
from macbench.methods.mac import MAC
from macbench.trace import amending, chains, command, matching, records
from macbench.trace.states import state
from macbench.trace.text import Layer, layers
from tests.conftest import exact_state
from tests.models.tiny import tiny

HEADS, KV_HEADS, DIM, TOKENS, STEPS, REACH = 6, 2, 16, 90, 30, 24
RING, BAND, TAU = 12, 5, 0.75


@pytest.fixture(scope="module")
def layer() -> Layer:
    """Queries that often repeat an earlier one, some of them exactly."""
    torch.manual_seed(3)
    n = STEPS + REACH
    x = torch.randn(HEADS, n, DIM, dtype=torch.float64)
    for i in range(1, n):
        for h in range(HEADS):
            back = int(torch.randint(1, min(i, 20) + 1, ()))
            if torch.rand(()) < 0.7:
                x[h, i] = x[h, i - back] + (torch.rand(()) < 0.6) * 0.3 * torch.randn(DIM, dtype=torch.float64)
    k, v = (torch.randn(KV_HEADS, TOKENS, DIM, dtype=torch.float64) for _ in range(2))
    return Layer(x, 2 * x.flip(-1), k, v, TOKENS - n, STEPS, DIM**-0.5)


@pytest.fixture(scope="module")
def found(layer) -> matching.Matches:
    return matching.match(layer, (4, REACH), RING, oldest=BAND)


def earlier(layer: Layer, head: int, position: int, window: int) -> dict[int, float]:
    """Distance to each of the last ``window`` queries, by position."""
    i = position - layer.first
    return {position - g: math.dist(layer.x[head, i].tolist(), layer.x[head, i - g].tolist()) / layer.unit for g in range(1, window + 1)}


def test_nearest_queries(layer, found):
    for head in range(HEADS):
        for step, position in enumerate(layer.positions.tolist()):
            for window, got in found.nearest.items():
                assert float(got[head, step]) == pytest.approx(min(earlier(layer, head, position, window).values()), abs=1e-12)
            near = earlier(layer, head, position, RING)
            least = min(near.values())
            assert int(found.source[head, step]) == min((p for p, x in near.items() if x == pytest.approx(least, abs=1e-12)), key=lambda p: p % RING)


def test_entries_without_keys_are_not_eligible(layer):
    late = matching.match(layer, (4,), RING, oldest=TOKENS - 10)
    first = layer.positions[0]
    assert late.nearest[4][:, : TOKENS - 10 - first + 1].isinf().all()
    assert late.nearest[4][:, -1].isfinite().all()


def test_hit_rates_and_gaps(layer, found):
    table = matching.acceptance(found, (TAU,)).set_index(["head", "window"])
    pairs = matching.distances(layer, found)
    for head in range(HEADS):
        for window in (4, RING, REACH):
            near = [min(earlier(layer, head, p, window).values()) for p in layer.positions.tolist()]
            assert table.hits[head, window] == sum(x < TAU for x in near) and table.steps[head, window] == STEPS
    gaps = [p - int(found.source[h, i]) for h in range(HEADS) for i, p in enumerate(layer.positions.tolist())]
    classes = matching.by_gap(pairs).set_index(["pairs", "gap_low"])
    assert classes["count"]["nearest", 4] == sum(4 <= g <= 7 for g in gaps)
    i = layer.positions - layer.first
    for space, of in (("pre", layer.x), ("post", layer.q)):
        apart = (of[:, i] - of[:, i - 8]).norm(dim=-1) / layer.unit
        assert classes[f"{space}_p50"]["every", 8] == pytest.approx(np.median(apart))
        assert classes[f"{space}_mean"]["every", 8] == pytest.approx(float(apart.mean()))


def test_spread_inside_groups(layer, found):
    table = matching.groups(layer, found, TAU, BAND)
    size = HEADS // KV_HEADS
    for g, row in enumerate(table.itertuples()):
        mine = range(g * size, (g + 1) * size)
        steps = [s for s in range(STEPS) if all(found.nearest[RING][h, s] < TAU for h in mine)]
        spreads = [max(int(found.source[h, s]) for h in mine) - min(int(found.source[h, s]) for h in mine) for s in steps]
        starts = [[int(layer.positions[s] - found.source[h, s]) + BAND for h in mine] for s in steps]
        assert (row.hit_all, row.spread_max) == (len(steps), max(spreads)) and len(steps) > 2
        assert row.spread_mean == pytest.approx(np.mean(spreads)) and row.spread_p50 == pytest.approx(np.median(spreads))
        assert row.read_own == pytest.approx(np.mean(starts)) and row.read_group == pytest.approx(np.mean([max(s) for s in starts]))


def test_states_over_any_range(layer):
    start, stop = torch.tensor([[0, 7]]).repeat(HEADS, 1), torch.tensor([[90, 31]]).repeat(HEADS, 1)
    got = state(layer, layer.q[:, :2], start, stop)
    for h in range(HEADS):
        for i, (a, b) in enumerate([(0, 90), (7, 31)]):
            out, lse = exact_state(layer.q[h, i], layer.k[h // 3, a:b], layer.v[h // 3, a:b], layer.scale)
            torch.testing.assert_close((got.out[h, i], got.lse[h, i]), (out, lse))


def test_error_of_amending_one_match(layer, found):
    """Softmax over the two parts by hand: the old query's scores before the band, the new one's from there on."""
    table = amending.errors(layer, found, (0, 4, 8), samples=STEPS)
    picked = table[(table.position == TOKENS - 3) & (table["head"] == 4)].set_index("band")
    t = TOKENS - 3
    p = int(found.source[4, -3])
    old, new = layer.q[4, p - layer.first], layer.q[4, t - layer.first]
    k, v = layer.k[1, : t + 1], layer.v[1, : t + 1]
    exact = exact_state(new, k, v, layer.scale)[0]
    for band in (0, 4, 8):
        scores = torch.cat([k[: p + 1 - band] @ old, k[p + 1 - band :] @ new]) * layer.scale
        got = torch.softmax(scores, 0) @ v
        assert picked.error[band] == pytest.approx(float((got - exact).norm() / exact.norm()))
    everything = amending.by_band(table, (TAU, 9.0)).set_index(["tau", "band"])
    assert everything["count"][9.0, 4] == table[table.band == 4].shape[0]
    near = table[(table.band == 4) & (table.distance < TAU)].error
    assert everything.error_p90[TAU, 4] == pytest.approx(np.quantile(near, 0.9))


def test_a_replay_is_what_the_kernels_do(layer, found):
    """MAC's own step over the same queries, token by token: same hits, same depths, same outputs."""
    pool = PagePool(1, KV_HEADS, DIM, TOKENS // 16 + 2, 16, torch.float64)
    cache = PagedKVCache(pool)
    before = TOKENS - STEPS
    cache.extend(before)
    cache.append(0, layer.k[None, :, :before], layer.v[None, :, :before])
    backend = kernels("torch", "cpu")
    ring = Ring.create(1, HEADS, RING, DIM, torch.float64, "cpu")
    filled = slice(REACH - RING, REACH)
    entries = backend.causal(layer.q[None, :, filled], cache, 0, before - RING - BAND, layer.scale)
    ring.fill(0, layer.x[None, :, filled], entries, before - RING)
    params = MacParams(TAU * layer.unit, BAND)
    depth, error = chains.replay([chains.parts(layer, found, TAU, BAND)])
    for i in range(STEPS):
        t = before + i
        cache.extend(1)
        cache.append(0, layer.k[None, :, t : t + 1], layer.v[None, :, t : t + 1])
        at = REACH + i
        step = backend.mac_step(layer.x[None, :, at], layer.q[None, :, at], cache, 0, ring, params, layer.scale)
        assert depth[:, i].tolist() == step.chain[0].tolist()
        for h in range(HEADS):
            exact = exact_state(layer.q[h, at], layer.k[h // 3, : t + 1], layer.v[h // 3, : t + 1], layer.scale)[0]
            assert float(error[h, i]) == pytest.approx(float((step.out[0, h] - exact).norm() / exact.norm()), abs=1e-9)
    classes = chains.by_depth(depth, error).set_index("depth_low")
    assert classes["count"].sum() == HEADS * STEPS and depth.max() >= 4
    inside = error[(depth >= 2) & (depth <= 3)]
    assert classes.error_mean[2] == pytest.approx(float(inside.mean())) and classes.error_mean[0] < 1e-12


@dataclass
class Recorder(Full):
    """Full attention that keeps its queries."""

    kept: list = field(default_factory=list)

    def attend(self, layer, q_pre, q, cache):
        self.kept.append((layer, q_pre.clone(), q.clone()))
        return super().attend(layer, q_pre, q, cache)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny("llama", head_dim=32), kernels("torch", "cpu"), ctx=160, chunk=50)


def test_queries_are_those_of_the_decode_steps(engine):
    prompt = engine.prefill(list(range(60)))
    recorder = Recorder()
    tokens = engine.decode(prompt, recorder, 8).tokens
    prompt.free()
    with layers(engine, list(range(60)) + tokens[:-1], 7, 20) as each:
        for i, layer in enumerate(each):
            mine = [(x, q) for j, x, q in recorder.kept if j == i]
            assert (layer.first, layer.positions.tolist()) == (40, list(range(60, 67)))
            for step, (x, q) in enumerate(mine):
                torch.testing.assert_close(layer.x[:, 20 + step], x[0].float(), atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(layer.q[:, 20 + step], q[0].float(), atol=1e-5, rtol=1e-5)


def test_first_layer_hits_as_in_a_run_of_mac(engine, tmp_path):
    """The first layer's queries depend on tokens alone, so MAC finds there what the trace says, over the same tokens."""
    ids = [(7 * i * i) % 13 for i in range(90)]
    knobs = {"tau": 1.0, "window": 16, "band": 8, "sink": 0}
    prompt = engine.prefill(ids, 16)
    text = engine.decode(prompt, Full(), 41).tokens
    made = engine.decode(prompt, MAC(**knobs, min_context=0), 41, feed=text)
    prompt.free()
    task = {"windows": [16, 4], "taus": [1.0], "bands": [0, 8], "samples": 5}
    tables = command.measure(engine, ids + text[:-1], 40, 16, task, knobs)
    mine = tables["acceptance"]
    mine = mine[(mine.layer == 0) & (mine.window == 16)]
    assert mine.hits.sum() == made.counts["hits"][:, 0].sum() > 0 and mine.steps.sum() == made.counts["match_heads"][:, 0].sum()
    records.write(tmp_path / "trace", tables, {"device": "cpu"})
    back = pd.read_parquet(tmp_path / "trace" / "acceptance.parquet")
    assert back.hits.sum() == tables["acceptance"].hits.sum()
    assert pd.read_parquet(tmp_path / "trace" / "texts.parquet").empty
