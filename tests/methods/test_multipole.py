"""Multipole Attention: golden layouts and step, selection and output against a plain definition, and the clusters over a long text."""

import math

import pytest
import torch
from macbench_kernels import PagedKVCache, PagePool, kernels

from macbench.counting import Ledger, Shape
from macbench.errors import ConfigError
from macbench.methods import multipole
from macbench.methods.multipole import Multipole, layout, windows
from tests.methods.driver import LLAMA, SMOL, Batch, Text, rotate
from tests.methods.expected import near_clusters
from tests.methods.recorder import Recorder


@pytest.mark.parametrize(("prompt", "clustered", "clusters", "recent"), [(266, 128, 8, 128), (1000, 768, 48, 222), (8192, 7936, 496, 246)])
def test_golden_layout(prompt, clustered, clusters, recent):
    assert layout(prompt) == (clustered, recent)
    assert clustered // multipole.PER_CLUSTER == clusters


def test_golden_layout_of_a_long_prompt_and_of_short_ones():
    assert layout(131072) == (130816, 246)
    assert [layout(n)[0] for n in (3, 10, 265, 266)] == [0, 0, 0, 128]


def test_golden_windows():
    assert windows(12160) == [12160]
    assert windows(12288) == [8192, 4096]
    assert windows(20352) == [8192, 12160]
    assert windows(130816) == [8192] * 15 + [7936]
    assert windows(0) == []


KEYS = [(2, 0), (2.2, 0.2), (0, 2), (0.2, 2.2), (-0.2, 1.8), (-1, -1), (-1.2, -0.8), (-0.8, -1.2)]
QUERIES = [(1, 0.5), (0.5, 1.2)]


def golden(monkeypatch, **settings):
    """The method on the three clusters of the example, no sinks, no rotation; returns it with its cache and query."""
    monkeypatch.setattr(multipole, "SINKS", 0)
    shape = Shape(1, 2, 1, 2, 2**-0.5, torch.float64, "cpu", 1, 64, lambda x, positions: x)
    cache = PagedKVCache(PagePool(1, 1, 2, 4, 16, torch.float64))
    cache.extend(8)
    k = torch.tensor(KEYS, dtype=torch.float64)
    cache.append(0, k[None, None], torch.arange(8.0, dtype=torch.float64)[None, None, :, None].expand(1, 1, 8, 2))
    method = Multipole(**settings)
    method.begin(shape, kernels("torch"), Ledger(shape))
    labels = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2]])
    method._store(slice(0, 1), 0, cache, 0, torch.stack([k[labels[0] == i].mean(0) for i in range(3)])[None], labels)
    method.clustered[0], method.clusters[0] = 8, 3
    return method, cache, torch.tensor([QUERIES], dtype=torch.float64)


@pytest.mark.parametrize("mode", ["harness", "faithful"])
@pytest.mark.parametrize(("budget", "near"), [(1, []), (2, [0]), (3, [0]), (4, [0]), (5, [0, 1]), (6, [0, 1]), (7, [0, 1]), (8, [0, 1]), (9, [0, 1])])
def test_golden_choice(monkeypatch, mode, budget, near):
    if mode == "harness" and budget >= 8:
        return  # all clustered tokens fit: dense
    method, cache, q = golden(monkeypatch, budget=budget, mode=mode)
    assert method.values[0][0, 0, :3, 0].tolist() == [0.5, 3, 6]
    torch.testing.assert_close(method.centroids[0][0, 0, :, :3].T, torch.tensor([[2.1, 0.1], [0, 2], [-1, -1]], dtype=torch.float64))
    seen = []
    choose = method._choose
    monkeypatch.setattr(method, "_choose", lambda layer, score, filled: seen.append(score) or choose(layer, score, filled))
    recorder = method.ledger
    sets = []
    monkeypatch.setattr(recorder, "selected", lambda layer, ids, counts, *rest, **more: sets.append(ids[0, 0, : counts[0, 0]].tolist()))
    method.attend(0, q, q, cache)
    assert seen[0][0, 0, :3].tolist() == pytest.approx([0.385778, 0.374445, 0.035036], abs=1e-6)
    tokens = {0: [0, 1], 1: [2, 3, 4], 2: [5, 6, 7]}
    assert sets == [[t for i in near for t in tokens[i]]]


@pytest.mark.parametrize(
    ("settings", "out"),
    [
        (dict(budget=8), [1.796743, 2.562048]),
        (dict(budget=3), [1.811740, 2.609835]),
        (dict(budget=3, replacement=False), [0.552835, 0.559816]),
        (dict(budget=5), [1.794754, 2.562868]),
        (dict(budget=5, mode="faithful"), [1.794754, 2.562868]),
    ],
)
def test_golden_outputs(monkeypatch, settings, out):
    method, cache, q = golden(monkeypatch, **settings)
    assert method.attend(0, q, q, cache)[0, :, 0].tolist() == pytest.approx(out, abs=1e-6)


def groups(method, layer, b, g) -> list[list[int]]:
    """Tokens of every cluster."""
    starts, counts, members = (x[layer][b, g].tolist() for x in (method.starts, method.counts, method.members))
    return [members[starts[i] : starts[i] + counts[i]] for i in range(int(method.clusters[b]))]


def check_clusters(method, batch):
    """Every clustered token is in exactly one cluster; counts and value centroids are those of the members."""
    s = batch.shape
    for layer in range(s.layers):
        for b, text in enumerate(batch.texts):
            for g in range(s.kv_heads):
                found = groups(method, layer, b, g)
                assert sorted(t for one in found for t in one) == list(range(10, 10 + int(method.clustered[b])))
                for i, one in enumerate(found):
                    if one:
                        torch.testing.assert_close(method.values[layer][b, g, i], text.v[layer, g, one].mean(0), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", ["harness", "faithful"])
@pytest.mark.parametrize("replacement", [True, False])
def test_a_step_equals_its_definition(mode, replacement):
    """Scores, choice, output and counts from the clusters that the method has built, in plain float64."""
    texts = [Text.random(n, 4, layers=1, dim=16, dtype=torch.float64, seed=n) for n in (700, 393, 60)]
    method = Multipole(budget=60, mode=mode, replacement=replacement)
    batch = Batch(method, texts)
    s, recorder = batch.shape, Recorder(batch)
    method.ledger = recorder
    for _ in range(4):
        batch.grow()
        recorder.clear()
        out = batch.attend()
        batch.ledger.end_step()
        check_clusters(method, batch)
        for b, text in enumerate(texts):
            n, near_tokens, meta = batch.lengths[b], 0, 0
            clustered = int(method.clustered[b])
            assert n - 10 - clustered < 256
            assert clustered == 0 or n - 10 - clustered >= 128
            for g in range(s.kv_heads):
                found = groups(method, 0, b, g)
                x = torch.stack([rotate(text.q_pre[0, h, n - 1 : n], torch.tensor([2048]))[0] for h in range(3 * g, 3 * g + 3)])
                z = x @ method.centroids[0][b, g, :, : len(found)] * s.scale
                z[:, [i for i, one in enumerate(found) if not one]] = -math.inf
                sizes = torch.tensor([float(len(one)) for one in found])
                score = (z.exp() / (sizes * z.exp()).sum(1, keepdim=True)).sum(0).tolist()
                near = near_clusters(score, [len(one) for one in found], method.budget, mode)
                exact = [*range(min(10, n)), *range(10 + clustered, n), *(t for i in near for t in found[i])]
                far = [i for i, one in enumerate(found) if one and i not in near] if replacement else []
                near_tokens += sum(len(found[i]) for i in near)
                meta += len(found) * (2 * 16 + 4) + (len(found) - len(near)) * 2 * 16 * replacement
                for j, h in enumerate(range(3 * g, 3 * g + 3)):
                    scores = text.k[0, g, exact] @ text.q[0, h, n - 1] * s.scale
                    every = torch.cat([scores, z[j, far] + sizes[far].log()])
                    values = torch.cat([text.v[0, g, exact], method.values[0][b, g, far]])
                    torch.testing.assert_close(out[0, b, h], torch.softmax(every, 0) @ values, atol=1e-9, rtol=1e-9)
                assert set(recorder.v[0, b, g].nonzero().flatten().tolist()) == set(exact)
            if clustered:
                assert (recorder.bytes[0, "idx"][b], recorder.bytes[0, "meta"][b]) == (4 * near_tokens, meta)
            else:
                assert (recorder.bytes[0, "idx"][b], recorder.bytes[0, "meta"][b]) == (0, 0)


def test_clusters_over_a_long_text(monkeypatch):
    """Windows of 512 instead of 8192 tokens: blocks are absorbed every 128 steps, windows close, closed ones stay as they are."""
    monkeypatch.setattr(multipole, "WINDOW", 512)
    text = Text.random(300, 900, layers=1, dim=8, kv_heads=1)
    method = Multipole(budget=30)
    batch = Batch(method, [text])
    expected = 0
    frozen = {}
    for step in range(900):
        before = int(method.clustered[0])
        batch.step()
        clustered = int(method.clustered[0])
        n = batch.lengths[0]
        assert 128 <= n - 10 - clustered < 256
        if clustered > before:
            assert clustered == before + 128
            check_clusters(method, batch)
            *closed, live = windows(clustered)
            assert method._frozen[0] == sum(closed)
            assert closed == [512] * len(closed)
            assert live >= 256 or not closed
            found = groups(method, 0, 0, 0)
            for w, size in enumerate(closed):
                content = [found[i] for i in range(32 * w, 32 * w + 32)]
                assert sorted(t for one in content for t in one) == list(range(10 + 512 * w, 10 + 512 * w + size))
                assert frozen.setdefault(w, content) == content
        counts = batch.counts()["bytes_maint"][step].sum()
        if clustered > before:
            window = clustered - sum(windows(before)[:-1])
            moved = window - windows(window)[-1]  # tokens of a window that closes: one pass over keys, one over values
            expected = 8 * 2 * (5 * (window - moved) + 2 * moved + 2 * (window // 16))
        assert counts == (expected if clustered > before else 0)
    assert len(frozen) >= 1


def test_a_bigger_budget_is_nearer_to_full_attention():
    text = Text.random(900, 1, layers=1, dim=32)
    gaps = []
    for budget in (10, 100, 300, 700):
        batch = Batch(Multipole(budget=budget), [text])
        gaps.append(float((batch.step().double() - batch.full()).norm()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < gaps[0] / 3


@pytest.mark.parametrize(
    ("sizes", "tokens", "budget", "kv", "rho"),
    [(LLAMA, 131072, 4096, 0.0332, 0.0953), (LLAMA, 131072, 16384, 0.1270, 0.1869), (SMOL, 8192, 512, 0.0938, 0.1543)],
)
def test_golden_bytes(sizes, tokens, budget, kv, rho):
    """A counted step of one layer of Llama-3.1-8B or SmolLM2 whose clusters have 16 tokens each, as the golden figures have it."""
    group, d = sizes["q_heads"] // sizes["kv_heads"], sizes["head_dim"]
    shape = Shape(1, group, 1, d, sizes["scale"], batch=1, max_tokens=tokens, rotate=lambda x, positions: x)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 1, tokens, d, generator=generator)
    cache, ledger = PagedKVCache(PagePool(1, 1, d, tokens // 16 + 2, 16, torch.float32)), Ledger(shape)
    cache.extend(tokens)
    cache.append(0, k, v)
    method = Multipole(budget=budget)
    method.begin(shape, kernels("torch"), ledger)
    clustered = 128 * ((tokens - 10) // 128 - 1)
    places = k[0, :, 10 : 10 + clustered]
    method._store(slice(0, 1), 0, cache, 0, places.unflatten(1, (-1, 16)).mean(2), torch.arange(clustered)[None] // 16)
    method._set(0, clustered)
    q = torch.randn(1, group, d, generator=generator)
    ledger.begin_step([tokens])
    method.attend(0, q, q, cache)
    ledger.end_step()
    counts = {name: int(values.sum()) for name, values in ledger.counts().items()}
    assert counts["bytes_kv"] / counts["bytes_full"] == pytest.approx(kv, abs=6e-5)
    assert sum(counts[f"bytes_{c}"] for c in ("kv", "meta", "state", "idx")) / counts["bytes_full"] == pytest.approx(rho, abs=6e-5)


def test_budgets_by_closed_form():
    shape = Shape(**LLAMA)
    assert Multipole().fit(0.1, 131072, shape).budget == round((0.0375 * 131072 - 201.5) * 32 / 31)
    with pytest.raises(ConfigError, match=r"^budget=0\.1: must be at least 0\.112 for multipole at 4096 tokens, its floor: centroids"):
        Multipole().fit(0.1, 4096, shape)


def test_a_fitted_budget_is_what_a_run_measures():
    text = Text.random(1914, 128, layers=1, dim=32, kv_heads=1)
    batch = Batch(Multipole().fit(0.3, 1978, Shape(1, 3, 1, 32, 1.0)), [text])
    for _ in range(128):
        batch.step()
    counts = batch.counts()
    measured = sum(counts[f"bytes_{c}"].sum() for c in ("kv", "meta", "state", "idx")) / counts["bytes_full"].sum()
    assert measured == pytest.approx(0.3, rel=0.1)


def test_it_needs_the_rotation_of_the_model():
    shape = Shape(1, 1, 1, 8, 1.0)
    with pytest.raises(ConfigError, match="rotary"):
        Multipole().begin(shape, kernels("torch"), Ledger(shape))
