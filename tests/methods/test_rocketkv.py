"""RocketKV: golden sizes and step, and both stages against a plain simulation of their definition."""

import math

import pytest
import torch

from macbench.counting import Shape
from macbench.errors import ConfigError
from macbench.methods import rocketkv
from macbench.methods.rocketkv import RocketKV, Sizes, sizes
from tests.methods.driver import LLAMA, SMOL, Batch, Driver, Stream, Text, toy
from tests.methods.recorder import Recorder


@pytest.mark.parametrize(
    ("total", "max_new", "dim", "budget", "want"),
    [
        (131072, 128, 128, 256, (1296, 1168, 128, 5.0625, 3, 75)),
        (131072, 128, 128, 1024, (6472, 6344, 512, 6.3203, 3, 60)),
        (131072, 128, 128, 2048, (12765, 12637, 1024, 6.2329, 3, 61)),
        (131072, 128, 128, 4096, (23170, 23042, 2048, 5.6567, 3, 67)),
        (32768, 128, 128, 1024, (5792, 5664, 512, 5.6562, 3, 67)),
        (32768, 128, 128, 4096, (14868, 14740, 2048, 3.6299, 2, 70)),
        (8192, 128, 64, 512, (2418, 2290, 256, 4.7227, 3, 40)),
        (8192, 128, 64, 4096, (6841, 6713, 2048, 1.6702, 1, 38)),
        (2048, 64, 64, 512, (1314, 1250, 256, 2.5664, 2, 49)),
    ],
)
def test_golden_sizes(total, max_new, dim, budget, want):
    got = sizes(total, max_new, dim, budget)
    assert got._replace(ratio=round(got.ratio, 4)) == want


def test_golden_compression_of_64_times():
    got = sizes(131072, 1, 128, 2048)
    assert (131072 / got.cap, got.cap / 2048) == (pytest.approx(10.27, abs=0.01), pytest.approx(6.23, abs=0.01))


KEYS = [(3, 0, -1, 1), (2, -1, 0, -2), (-3, -3, 0, 2), (-3, 3, -3, 2), (-1, 1, -1, 1), (-3, -3, -3, 3), (-3, 0, 0, 1), (-2, -3, -3, 2)]


@pytest.mark.parametrize(
    ("shape", "tokens", "budget", "kv", "rho"),
    [(LLAMA, 131072, 4096, 0.0156, 0.0312), (LLAMA, 131072, 16384, 0.0625, 0.1250), (SMOL, 8192, 512, 0.0313, 0.0625)],
)
def test_golden_bytes(shape, tokens, budget, kv, rho):
    """A counted step of one layer with as many tokens left as the sizes plan for, cap: all of the prompt that is kept, and one that is generated."""
    group, d = shape["q_heads"] // shape["kv_heads"], shape["head_dim"]
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, tokens, d, generator=generator)
    window = torch.randn(group, 33, d, generator=generator)  # queries of the window and of the step; nobody asks for the others
    q = torch.cat([window[:, :1].expand(-1, tokens - 33, -1), window], 1)
    driver = Driver(RocketKV(budget=budget, max_new=1), Stream(q, q, k, v), tokens - 1)
    driver.step()
    counts = {name: int(values.sum()) for name, values in driver.ledger.counts().items()}
    assert counts["bytes_kv"] / counts["bytes_full"] == pytest.approx(kv, abs=6e-5)
    assert sum(counts[f"bytes_{c}"] for c in ("kv", "meta", "state", "idx")) / counts["bytes_full"] == pytest.approx(rho, abs=1e-4)
    # fit is the way back, where all of the prompt that is to be kept and max_new tokens are there.
    assert RocketKV().fit(rho, tokens, Shape(**shape), 128).budget == pytest.approx(budget, rel=0.03)


def test_golden_step(monkeypatch):
    monkeypatch.setattr(rocketkv, "sizes", lambda *args: Sizes(8, 7, 3, 4.0, 2, 2))
    batch = Batch(RocketKV(budget=16, window=1, max_new=1, mode="faithful"), [toy(KEYS, [(3, 0, -2, 0), (1, 1, -3, -2)])])
    recorder = batch.method.ledger = Recorder(batch)
    out = batch.step()[0, 0, :, 0]
    assert out.tolist() == pytest.approx([0.084827, 0.884879], abs=1e-6)
    assert sorted(recorder.sets[0][0][0, 0].tolist()) == [0, 1, 4]
    scores = batch.method._chunk_scores(batch.queries(0)[1], batch.method.bounds[0])[0, 0, :4]
    assert scores.tolist() == pytest.approx([0.276806, 0.032725, 0.126495, 0.063974], abs=1e-6)
    assert batch.full()[0, 0, :, 0].tolist() == pytest.approx([0.117614, 1.842057], abs=1e-6)


def test_golden_step_with_the_newest_token(monkeypatch):
    monkeypatch.setattr(rocketkv, "sizes", lambda *args: Sizes(8, 7, 3, 4.0, 2, 2))
    monkeypatch.setattr(rocketkv, "LEAST_BUDGET", 1)
    batch = Batch(RocketKV(budget=6, window=1, max_new=1), [toy(KEYS, [(3, 0, -2, 0), (1, 1, -3, -2)])])
    recorder = batch.method.ledger = Recorder(batch)
    batch.step()
    ids, counts = recorder.sets[0]
    assert ids[0, 0, : counts[0, 0]].tolist() == [7, 0, 1]


def simulate(method, batch, layer, b):
    """Tokens that every KV head attends, from the definition, token by token."""
    text, s, size, n = batch.texts[b], batch.shape, method.size, batch.lengths[b]
    sets = []
    for g in range(s.kv_heads):
        heads = range(g * s.group, (g + 1) * s.group)
        k = text.k[layer, g].double()
        left = list(range(n))
        if text.prompt > (max(size.keep, method.budget) if method.mode == "harness" else size.keep):
            p, w = text.prompt, method.window
            votes = torch.zeros(p - w, dtype=torch.float64)
            for h in heads:
                for i in range(p - w, p):
                    votes += torch.softmax(k[: i + 1] @ text.q[layer, h, i].double() * s.scale, 0)[: p - w]
            pooled = [float(votes[max(0, i - 31) : i + 32].max()) for i in range(p - w)]
            best = sorted(sorted(range(p - w), key=lambda i: (-pooled[i], i))[: size.keep - w])
            left = best + list(range(p - w, n))
        m = len(left)
        if m <= size.topk or (method.mode == "harness" and n <= method.budget):
            sets.append(set(left))
            continue
        q = text.q[layer, list(heads), n - 1].double()
        channels = sorted(range(s.head_dim), key=lambda d: (-float(q[:, d].abs().mean()), d))[: size.channels]
        mean = torch.zeros(m, dtype=torch.float64)
        for row in q:
            u = []
            for j in range(m):
                chunk = k[left[j // size.chunk * size.chunk : (j // size.chunk + 1) * size.chunk]]
                bound = [chunk[:, d].max() if q[:, d].sum() > 0 else chunk[:, d].min() for d in channels]
                u.append(sum(float(row[d] * x) for d, x in zip(channels, bound, strict=True)))
            tau = math.sqrt(s.head_dim * float(row[channels].abs().sum()) / float(row.abs().sum()))
            mean += torch.softmax(torch.tensor(u, dtype=torch.float64) / tau, 0) / len(q)
        order = sorted(range(m), key=lambda j: (-round(float(mean[j]), 12), j))
        if method.mode == "harness":
            order = [m - 1] + [j for j in order if j != m - 1]
        sets.append({left[j] for j in order[: size.topk]})
    return sets


@pytest.mark.parametrize("mode", ["harness", "faithful"])
@pytest.mark.parametrize("budget", [24, 60, 100])
def test_both_stages_equal_the_simulation(mode, budget):
    texts = [Text.random(n, 3, layers=2, dim=16, dtype=torch.float64, seed=n) for n in (120, 33, 75)]
    method = RocketKV(budget=budget, window=6, max_new=8, mode=mode)
    batch = Batch(method, texts)
    recorder = method.ledger = Recorder(batch)
    for _ in range(3):
        batch.grow()
        recorder.clear()
        out = batch.attend()
        batch.ledger.end_step()
        for layer in range(2):
            for b in range(3):
                for g, want in enumerate(simulate(method, batch, layer, b)):
                    assert set(recorder.v[layer, b, g].nonzero().flatten().tolist()) == want
                    for h in range(3 * g, 3 * g + 3):
                        torch.testing.assert_close(out[layer, b, h], batch.over(layer, b, h, sorted(want)), atol=1e-9, rtol=1e-9)


def test_too_small_a_budget_for_the_window_is_one_line():
    with pytest.raises(ConfigError, match=r"method.budget=16: leaves \d+ prompt tokens at ctx=60 .*; must be at least method.window=50") as error:
        Batch(RocketKV(budget=16, window=50, max_new=20), [Text.random(55, 5, layers=1)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rho", [0.05, 0.1, 0.25])
def test_a_fitted_budget_is_what_a_run_measures(rho):
    text = Text.random(3968, 2, layers=1, dim=64)
    shape = Shape(1, 6, 2, 64, 0.125)
    batch = Batch(RocketKV().fit(rho, 4096, shape), [text], max_tokens=4096)
    for _ in range(2):
        batch.step()
    counts = batch.counts()
    measured = sum(counts[f"bytes_{c}"].sum() for c in ("kv", "meta", "state", "idx")) / counts["bytes_full"].sum()
    assert measured == pytest.approx(rho, rel=0.1)


def test_the_smallest_budget_is_named():
    with pytest.raises(ConfigError, match=r"budget=0\.001: must be at least 0\.002 for rocketkv at 8192 tokens, its floor: 16 tokens"):
        RocketKV().fit(0.001, 8192, Shape(**SMOL))
