"""Golden examples of StreamingLLM, Quest, oracle top-k and TidalDecode, and their budgets, from the written specification."""

import re
from dataclasses import replace

import pytest
import torch
from macbench_kernels import State, kernels

from macbench.counting import Ledger, Shape
from macbench.errors import ConfigError
from macbench.methods.full import Full
from macbench.methods.kivi import KIVI
from macbench.methods.mac import MAC
from macbench.methods.multipole import Multipole
from macbench.methods.oracle_topk import OracleTopK
from macbench.methods.quest import Quest
from macbench.methods.streaming_llm import StreamingLLM
from macbench.methods.tidaldecode import TidalDecode
from tests.methods.driver import LLAMA, SMOL, Batch, Text, rotate, toy
from tests.methods.recorder import Recorder

LLAMA, SMOL = Shape(**LLAMA), Shape(**SMOL)
GOLD = {"atol": 1e-6, "rtol": 1e-6}


class Guesses:
    """Kernels that choose by random scores and attend to nothing, so that counts at any length cost little."""

    def token_scores(self, q, cache, layer, scale, tokens):
        return torch.rand(*q.shape[:2], tokens, generator=torch.Generator().manual_seed(layer))

    def row_scores(self, weights, bounds, scored):
        return torch.rand(*weights.shape[:3], bounds.shape[-1], generator=torch.Generator().manual_seed(0))

    def attend(self, q, cache, layer, spans, scale):
        return State(q.expand(len(spans), *q.shape), q[..., 0].expand(len(spans), *q.shape[:2]))

    def attend_selected(self, q, *args, **options):
        return State(q, q[..., 0])

    def full(self, q, *args):
        return q

    def extend_bounds(self, *args):
        pass

    def __getattr__(self, name):
        return getattr(kernels("torch"), name)


def counted(method, shape, length) -> tuple[float, float]:
    """rho_KV and rho_bytes of one step at any length, as the ledger counts them, with one KV head and its group."""
    few = isinstance(method, OracleTopK)  # all layers of which are the same
    shape = replace(shape, layers=1 if few else shape.layers, q_heads=shape.group, kv_heads=1, max_tokens=length)
    ledger = Ledger(shape)
    method.begin(shape, Guesses(), ledger)
    cache = type("Cache", (), {"lengths": torch.tensor([length], dtype=torch.int32)})()
    ledger.begin_step([length])
    for layer in range(shape.layers):
        method.attend(layer, *torch.zeros(2, 1, shape.q_heads, shape.head_dim), cache)
    ledger.end_step()
    counts = {name: int(values.sum()) for name, values in ledger.counts().items()}
    return counts["bytes_kv"] / counts["bytes_full"], sum(counts[f"bytes_{c}"] for c in ("kv", "meta", "state", "idx")) / counts["bytes_full"]


def values(batch) -> list[float]:
    """First channel of the newest token's output, per query head."""
    return batch.step()[0, 0, :, 0].tolist()


def read_by(batch) -> list[int]:
    """Tokens whose V the newest token reads (KV head 0, layer 0)."""
    batch.method.ledger = Recorder(batch)
    batch.grow()
    batch.method.ledger.clear()
    batch.attend()
    batch.ledger.end_step()
    return batch.method.ledger.v[0, 0, 0].nonzero().flatten().tolist()


# -- StreamingLLM -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["harness", "faithful"])
def test_streaming_golden(mode):
    """Steps 5 to 8 of the document; what is left after them, {0, 1, 6, 7, 8}, shows in step 9."""
    text = Text.random(5, 5, layers=1, group=1, kv_heads=1)
    batch = Batch(StreamingLLM(sinks=2, recent=3, mode=mode), [text])
    want = [[0, 1, 2, 3, 4, 5], [0, 1, 3, 4, 5, 6], [0, 1, 4, 5, 6, 7], [0, 1, 5, 6, 7, 8], [0, 1, 6, 7, 8, 9]]
    assert [read_by(batch) for _ in range(5)] == want


def test_streaming_numbers_tokens_by_their_place_in_the_cache():
    """The published way, done literally: un-rotate the keys, number what is kept 0, 1, ..., rotate again."""
    text = Text.random(30, 5, layers=1, group=2, kv_heads=1, dtype=torch.float64)
    batch = Batch(StreamingLLM(sinks=2, recent=6, positions="cache"), [text])
    for t in range(30, 35):
        kept = [0, 1, *range(t - 6, t + 1)]
        place = torch.arange(len(kept))
        k = rotate(rotate(text.k[0, 0], -torch.arange(35))[kept], place)
        q = torch.stack([rotate(text.q_pre[0, h, t : t + 1], place[-1:])[0] for h in range(2)])
        want = torch.softmax(q @ k.mT * 32**-0.5, -1) @ text.v[0, 0, kept]
        torch.testing.assert_close(batch.step()[0, 0], want, atol=1e-12, rtol=1e-12)


# -- Quest ------------------------------------------------------------------------------------------------------------

KEYS = [(1, 0), (0, 1), (2, -1), (-1, 2), (1, 1), (1.5, 0.75), (-2, -2), (0, 0)]


def quest(**settings) -> Quest:
    return Quest(**({"budget": 4, "page": 2, "dense_layers": ()} | settings))


@pytest.mark.parametrize(
    ("q", "settings", "tokens", "out"),
    [
        ((1, 1), dict(mode="faithful"), [0, 1, 2, 3, 4, 5], 3.102821),
        ((1, 1), dict(min_pages=1), [2, 3, 6, 7], 3.420149),
        ((1, 1), {}, [2, 3, 4, 5, 6, 7], 4.137402),
        ((1, -1), dict(mode="faithful"), [0, 1, 2, 3, 6, 7], 2.352038),
        ((1, -1), dict(min_pages=1), [2, 3, 6, 7], 2.871713),
        ((1, -1), {}, [0, 1, 2, 3, 6, 7], 2.352038),
        ((1, 1), dict(budget=8), list(range(8)), 3.326442),
        ((1, -1), dict(budget=8), list(range(8)), 2.744072),
    ],
)
def test_quest_golden_pages_and_outputs(q, settings, tokens, out):
    assert read_by(Batch(quest(**settings), [toy(KEYS, [q])], page_size=4)) == tokens
    assert values(Batch(quest(**settings), [toy(KEYS, [q])], page_size=4)) == pytest.approx([out], abs=1e-6)


@pytest.mark.parametrize(("q", "bounds", "partial"), [((1, 1), [2, 4, 2.5, 0], -4), ((1, -1), [1, 3, 0.75, 2], 0)])
def test_quest_golden_bounds(q, bounds, partial):
    for keys, want in ((KEYS, bounds), (KEYS[:7], [*bounds[:3], partial])):
        batch = Batch(quest(budget=2, min_pages=1), [toy(keys, [q])])
        batch.step()
        scores = batch.method._scores(torch.tensor([[q]], dtype=torch.float64), batch.method.bounds[0])
        assert scores[0, 0, :4].tolist() == want


PAGES = [(-2, 1), (3, 2), (2, 2), (-2, 3), (2, -3), (-2, -2), (-3, -3), (-2, -1), (-2, 1), (-1, -1)]


@pytest.mark.parametrize(
    ("gqa", "want"),
    [
        ("sum", [[10, 9, 9, 9, 7]]),
        ("max", [[8, 9, 5, 8, 7]]),
        ("mean_query", [[2, 2, 2, 3, 2]]),
        ("per_q_head", [[8, 9, 4, 8, 7], [2, 0, 5, 1, 0]]),
    ],
)
def test_quest_golden_groups(gqa, want):
    queries = [(-3, 1), (1, -1)]
    batch = Batch(quest(budget=2, min_pages=1, gqa=gqa), [toy(PAGES, queries)])
    batch.step()
    scores = batch.method._scores(torch.tensor([queries], dtype=torch.float64), batch.method.bounds[0])
    assert scores[0, :, :5].tolist() == want


def test_quest_bounds_hold_for_random_keys():
    text = Text.random(100, 3, layers=1, dtype=torch.float64)
    batch = Batch(Quest(budget=16, page=8, dense_layers=(), min_pages=1, gqa="per_q_head"), [text])
    for _ in range(3):
        batch.step()
        n = batch.lengths[0]
        bound = batch.method._scores(batch.queries(0)[1], batch.method.bounds[0])[0]
        exact = (text.q[0, :, n - 1].unflatten(0, (2, 3)) @ text.k[0, :, :n].mT).flatten(0, 1)
        for j in range(-(-n // 8)):
            assert (bound[:, j] >= exact[:, 8 * j : 8 * j + 8].amax(1) - 1e-9).all()


# -- oracle -----------------------------------------------------------------------------------------------------------

ORACLE = toy([(1, 0), (0, 1), (1, 1), (-1, 0), (0, -1), (2, 0), (0, 2), (0.5, 0.5)], [(1, 0.2), (0.1, 1)])


@pytest.mark.parametrize(
    ("variant", "sets", "mass", "out"),
    [
        ("per_q_head", [{0, 2, 5}, {1, 2, 6}], [0.612274, 0.618747], [2.977110, 3.734160]),
        ("shared", [{2, 5, 6}], [0.561630, 0.553570], [4.269359, 4.675230]),
    ],
)
def test_oracle_golden(variant, sets, mass, out):
    batch = Batch(OracleTopK(budget=3, variant=variant), [ORACLE])
    recorder = batch.method.ledger = Recorder(batch)
    assert values(batch) == pytest.approx(out, abs=1e-6)
    assert [set(x.tolist()) for x in recorder.sets[0][0][0]] == sets
    for h in range(2):
        kept = sorted(sets[min(h, len(sets) - 1)])
        assert float(batch.weights(0, 0, h)[kept].sum()) == pytest.approx(mass[h], abs=1e-6)


def test_oracle_golden_full():
    assert values(Batch(Full(), [ORACLE])) == pytest.approx([3.611352, 3.861786], abs=1e-6)


# -- TidalDecode ------------------------------------------------------------------------------------------------------


def test_tidal_golden_layers_and_fraction():
    """N = 32, c = 13: full {0, 1, 2, 13}; KV fraction .128418 at 131072 tokens with k = 512."""
    text = Text.random(40, 1, layers=32, group=1, kv_heads=1, dim=8)
    batch = Batch(TidalDecode(budget=5), [text])
    batch.step()
    full = batch.counts()["tokens_log"][0, :, 0] == 41
    assert full.nonzero()[0].tolist() == [0, 1, 2, 13]
    assert counted(TidalDecode(budget=512), LLAMA, 131072)[0] == pytest.approx(0.128418, abs=1e-6)


@pytest.mark.parametrize(("mode", "want"), [("faithful", {0, 2, 4}), ("harness", {2, 4, 7})])
def test_tidal_golden_choice(mode, want):
    """Scores 3 1 4 1.5 5 0 2 .5, k = 3; with the newest token (7) forced another one goes."""
    one = toy([(x, 0) for x in (3, 1, 4, 1.5, 5, 0, 2, 0.5)], [(1, 0)])
    text = Text(*(x.expand(5, -1, -1, -1) for x in (one.q_pre, one.q, one.k, one.v)), one.prompt)
    batch = Batch(TidalDecode(budget=3, mode=mode), [text])
    recorder = batch.method.ledger = Recorder(batch)
    out = batch.step()
    assert [set(ids[0, 0].tolist()) for ids, _ in recorder.sets] == [want, want]
    torch.testing.assert_close(out[3, 0, 0], batch.over(3, 0, 0, want), **GOLD)


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "tokens", "budgets"),
    [
        (LLAMA, 131072, {0.125: 546, 0.15: 4041, 0.2: 11032, 0.25: 18022, 0.5: 52975}),
        (LLAMA, 32768, {0.125: 137, 0.15: 1010, 0.2: 2758, 0.25: 4506, 0.5: 13244}),
        (SMOL, 8192, {0.15: 219, 0.2: 658, 0.25: 1097, 0.5: 3291}),
    ],
)
def test_quest_golden_budgets(shape, tokens, budgets):
    for rho, budget in budgets.items():
        assert Quest().fit(rho, tokens, shape).budget == budget // 16 * 16


def test_quest_names_its_floor():
    with pytest.raises(ConfigError, match=r"budget=0.125: must be at least"):  # 0 in the document
        Quest().fit(0.125, 8192, SMOL)
    with pytest.raises(ConfigError, match=r"budget=0.1: must be at least 0\.13\d for quest at 8192 tokens"):
        Quest().fit(0.1, 8192, SMOL)
    assert Quest(dense_layers=()).fit(0.1, 8192, SMOL).budget == int(0.1 * 8192 - 512) // 16 * 16


@pytest.mark.parametrize(
    ("method", "rho", "knob", "value"),
    [
        (StreamingLLM(), 0.1, "recent", 819 - 5),
        (OracleTopK(), 0.6, "budget", 1638),
        (OracleTopK(count="ideal"), 0.1, "budget", 819),
        (TidalDecode(), 0.25, "budget", 1103),
    ],
)
def test_budgets_by_closed_form(method, rho, knob, value):
    assert getattr(method.fit(rho, 8192, SMOL), knob) == value


@pytest.mark.parametrize(
    ("method", "rho", "message"),
    [
        (StreamingLLM(), 0.0005, "must be at least 0.001 for streaming_llm at 8192 tokens, its floor"),
        (OracleTopK(), 0.1, "must be at least 0.501 for oracle_topk .* count=ideal"),
        (TidalDecode(), 0.1, "must be at least 0.134 for tidaldecode .* full layers"),
        (Full(), 0.1, "does not apply to full"),
        (MAC(), 0.1, "does not apply to mac"),
    ],
)
def test_budgets_below_the_floor_name_it(method, rho, message):
    with pytest.raises(ConfigError, match=f"^budget={rho}: {message}") as error:
        method.fit(rho, 8192, SMOL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "rho"),
    [(StreamingLLM(), 0.1), (Quest(dense_layers=(0,)), 0.45), (OracleTopK(), 0.7), (OracleTopK(count="ideal"), 0.2), (TidalDecode(), 0.85)],
)
def test_a_fitted_budget_is_what_a_run_measures(method, rho):
    text = Text.random(1000, 4, layers=4, group=2, kv_heads=2, dim=32)
    batch = Batch(method.fit(rho, 1002, Batch(Full(), [text]).shape), [text])
    for _ in range(4):
        batch.step()
    counts = batch.counts()
    measured = sum(counts[f"bytes_{c}"].sum() for c in ("kv", "meta", "state", "idx")) / counts["bytes_full"].sum()
    assert measured == pytest.approx(rho, rel=0.1)


@pytest.mark.parametrize(
    ("shape", "length", "k", "kv", "rho"),
    [(LLAMA, 131072, 4096, 0.2344, 0.2352), (LLAMA, 131072, 16384, 0.5625, 0.5659), (SMOL, 8192, 512, 0.2958, 0.2984)],
)
def test_golden_bytes_of_a_set_for_each_head(shape, length, k, kv, rho):
    """TidalDecode per query head at its worst: the sets of a group have nothing in common."""
    ledger = Ledger(shape)
    ledger.begin_step([length])
    ids = (torch.arange(shape.q_heads)[:, None] % shape.group * k + torch.arange(k)).int()[None]
    ledger.selected(3, ids, torch.full((1, shape.q_heads), k, dtype=torch.int32), 1, torch.tensor([length], dtype=torch.int32))
    ledger.end_step()
    counts = {name: int(values[0, 3, 0]) for name, values in ledger.counts().items()}
    dense = 4 / shape.layers
    assert dense + (1 - dense) * counts["bytes_kv"] / counts["bytes_full"] == pytest.approx(kv, abs=1e-4)
    assert dense + (1 - dense) * (counts["bytes_kv"] + counts["bytes_idx"]) / counts["bytes_full"] == pytest.approx(rho, abs=1e-4)


@pytest.mark.parametrize(
    ("method", "table"),
    [
        (Quest, ((0.0918, 0.1504), (0.1797, 0.2383), (0.1250, 0.1834))),
        (lambda t: StreamingLLM(recent=t - 4), ((0.0313, 0.0313), (0.1250, 0.1250), (0.0626, 0.0626))),
        (TidalDecode, ((0.1523, 0.1526), (0.2344, 0.2352), (0.1875, 0.1884))),
        (OracleTopK, ((0.5156, 0.5159), (0.5625, 0.5635), (0.5313, None))),
        (lambda t: OracleTopK(t, count="ideal"), ((0.0313, None), (0.125, None), (0.0625, None))),
    ],
)
def test_golden_table_of_bytes(method, table):
    """rho_KV and rho_bytes of the document: what the ledger counts of a step of all layers."""
    for (shape, length, budget), want in zip(((LLAMA, 131072, 4096), (LLAMA, 131072, 16384), (SMOL, 8192, 512)), table, strict=True):
        for got, golden in zip(counted(method(budget), shape, length), want, strict=True):
            assert golden is None or got == pytest.approx(golden, abs=6e-5)


def test_golden_bytes_of_full_attention_and_new_rows():
    for shape, length, full, write in ((LLAMA, 131072, 17_179_869_184, 131_072), (SMOL, 8192, 188_743_680, 23_040)):
        ledger = Ledger(shape)
        ledger.begin_step([length])
        ledger.end_step()
        counts = ledger.counts()
        assert (counts["bytes_full"].sum(), counts["bytes_write"].sum()) == (full, write)


@pytest.mark.parametrize(
    ("method", "shape", "floor"),
    [
        (Quest(), LLAMA, 0.121),
        (Quest(), SMOL, 0.125),
        (Quest(dense_layers=()), LLAMA, 0.0625),
        (Multipole(), LLAMA, 0.0625),
        (TidalDecode(), LLAMA, 0.125),
        (TidalDecode(), SMOL, 4 / 30),
        (OracleTopK(), LLAMA, 0.5),
        (KIVI(bits=2), LLAMA, 0.1875),
    ],
)
def test_golden_floors(method, shape, floor):
    """Of rho_bytes in a context so long that a page, a window or a token is nothing."""
    with pytest.raises(ConfigError) as error:
        method.fit(1e-6, 10**8, shape)
    (named,) = re.findall(r"at least ([\d.]+) for|([\d.]+) is its floor", str(error.value))
    assert float("".join(named)) == pytest.approx(floor, abs=1.1e-3)
