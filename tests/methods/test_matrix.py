"""What must hold for every method: one row of ``CASES`` each.

A case is a way to make the method for small texts, the settings with which it keeps everything, what its ``gqa`` may be, the bytes that one
layer of one step should count, and how to spoil those parts of its state that it did not report as read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from macbench_kernels import Kernels, MacStep, State, kernels
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from macbench.errors import ConfigError
from macbench.methods.base import Method
from macbench.methods.full import Full
from macbench.methods.h2o import H2O
from macbench.methods.int8 import INT8
from macbench.methods.kivi import KIVI
from macbench.methods.mac import MAC
from macbench.methods.multipole import Multipole, layout
from macbench.methods.oracle_topk import OracleTopK
from macbench.methods.pyramidkv import PyramidKV
from macbench.methods.quest import Quest
from macbench.methods.rocketkv import RocketKV
from macbench.methods.snapkv import SnapKV
from macbench.methods.streaming_llm import StreamingLLM
from macbench.methods.tidaldecode import TidalDecode
from macbench.methods.tova import TOVA
from tests.conftest import DEVICE
from tests.methods.driver import Batch, Text

PROMPTS = (90, 41, 130)
SHORT = (47, 20)
STEPS = 6
NAN = float("nan")


def fast(backend: str) -> bool:
    """The interpreter takes its time: few and short texts."""
    return backend == "torch" or DEVICE == "cuda"


@dataclass
class Seen:
    """One layer of one request in one step, for closed forms: L visible tokens, the shape, and how many of them were the prompt."""

    layer: int
    length: int
    s: object
    prompt: int

    def tokens(self, n, union=None, **bytes_) -> dict:
        """n tokens for each query head; ``union`` rows for each KV head (n, if None)."""
        rows = n if union is None else union
        return {"tokens_log": self.s.q_heads * n, "tokens_phys": self.s.kv_heads * rows, **bytes_}

    def ids(self, n, per_head=None) -> int:
        """Bytes of n ids per KV head (or other number of sets), none if they name everything."""
        return 4 * (per_head or self.s.kv_heads) * n


@dataclass
class Case:
    make: Callable[..., Method]
    everything: dict | None = None
    gqa: tuple = (None,)
    expected: Callable[[Method, Seen], dict] | None = None
    # Returns (tensor, mask of what was not read) pairs; may note in the recorder which rows of the cache were read.
    spoil: Callable[[Method, "Recorder", Batch], list] | None = None
    ideal: bool = False  # counts less than it reads, on purpose: no poison
    scored: bool = False  # reads state even while it keeps everything
    prompts: tuple = PROMPTS
    short: tuple = SHORT  # these are for the interpreter
    short_layers: int = 2

    def texts(self, backend="torch", **sizes) -> list[Text]:
        prompts = self.prompts
        if not fast(backend):
            prompts, sizes = self.short, {"layers": self.short_layers} | sizes
        return [Text.random(n, STEPS, seed=n, device=DEVICE, **sizes) for n in prompts]


# -- what each method should count ------------------------------------------------------------------------------------


def full_counts(m, x):
    return x.tokens(x.length)


def streaming_counts(m, x):
    return x.tokens(min(x.length, m.sinks + m.recent + 1))


def quest_counts(m, x):
    pages = -(-x.length // m.page)
    if x.layer in m.dense_layers:
        return x.tokens(x.length)
    write = x.s.kv_heads * x.s.kv_row_bytes
    if pages <= m.pages:
        return x.tokens(x.length, bytes_write=write)
    if m.mode == "faithful" or m.gqa == "per_q_head":
        return {"bytes_meta": pages * write, "bytes_write": write, "bytes_idx": x.ids(m.pages, x.s.q_heads)}
    n = m.pages * m.page - (-x.length % m.page)  # the newest page is partly filled
    return x.tokens(n, bytes_meta=pages * write, bytes_write=write, bytes_idx=x.ids(m.pages))


def oracle_counts(m, x):
    n = min(m.budget, x.length)
    sets = x.s.q_heads if m.variant == "per_q_head" else x.s.kv_heads
    idx = 0 if n == x.length else 4 * sets * n
    if m.variant != "shared":
        return {"bytes_idx": idx} if m.variant == "per_q_head" else {}
    if m.count == "ideal":
        return x.tokens(n, bytes_idx=idx)
    rows = x.s.kv_heads * (x.length + n)
    return {"tokens_log": x.s.q_heads * (x.length + n) // 2, "bytes_kv": rows * x.s.kv_row_bytes // 2, "bytes_idx": idx}


def tidal_counts(m, x):
    if x.layer < 3 or x.layer == m.reselect or x.length <= m.budget:
        return x.tokens(x.length)
    if m.mode == "faithful" or m.gqa == "per_q_head":
        return {"tokens_log": x.s.q_heads * m.budget, "bytes_idx": x.ids(m.budget, x.s.q_heads)}
    return x.tokens(m.budget, bytes_idx=x.ids(m.budget))


def snap_counts(m, x):
    kept = m.prefix(x.layer, x.prompt) + m.window + x.length - x.prompt
    return {"tokens_log": x.s.q_heads * kept} if m._gqa == "per_q_head" else x.tokens(kept)


def tova_counts(m, x):
    return x.tokens(min(x.length, m.capacity + 1))


def h2o_counts(m, x):
    n = min(x.length, m.heavy + m.recent + 1)
    return x.tokens(n, bytes_state=8 * x.s.kv_heads * n)


def kivi_counts(m, x):
    k, v = (x.length - 1) // m.residual * m.residual, max(0, x.length - 1 - m.residual)
    code = m.bits * x.s.head_dim // 8 + 4 * x.s.head_dim // m.group
    exact = (2 * x.length - k - v) * 2 * x.s.head_dim
    flushed = x.length - 1 > x.prompt and (x.length - 1) % m.residual == 0
    write = {"bytes_write": x.s.kv_heads * code * (v > 0), "bytes_maint": x.s.kv_heads * code * m.residual * flushed}
    return x.tokens(x.length, bytes_kv=x.s.kv_heads * ((k + v) * code + exact), **write)


def int8_counts(m, x):
    row = 2 * x.s.head_dim + 8
    return x.tokens(x.length, bytes_kv=x.s.kv_heads * x.length * row, bytes_write=x.s.kv_heads * (row - x.s.kv_row_bytes))


def rocket_counts(m, x):
    prompt = x.prompt
    evicts = prompt > (max(m.size.keep, m.budget) if m.mode == "harness" else m.size.keep)
    left = x.length - (prompt - m.size.keep if evicts else 0)
    write = x.s.kv_heads * (2 if m.size.chunk > 1 else 1) * x.s.head_dim * 2
    if left <= m.size.topk or (m.mode == "harness" and x.length <= m.budget):
        return x.tokens(left, bytes_write=write, bytes_idx=x.ids(left) if evicts else 0)
    meta = x.s.kv_heads * -(-left // m.size.chunk) * m.size.channels * 2
    return x.tokens(m.size.topk, bytes_meta=meta, bytes_write=write, bytes_idx=x.ids(m.size.topk))


def multipole_counts(m, x):
    clustered, _ = layout(x.prompt)
    absorbed = clustered + (128 if x.length - 10 - clustered >= 256 else 0)
    if absorbed <= (m.budget if m.mode == "harness" else 0):
        return x.tokens(x.length)
    return {}  # how many tokens near clusters have is checked in test_multipole


# -- what each method's state did not read ----------------------------------------------------------------------------


def spoil_quest(m, recorder, batch):
    """Bounds of the pages that were not scored; that of the newest page is open for writing."""
    pairs = []
    for layer, bounds in m.bounds.items():
        per_page = m.shape.kv_heads * m.shape.kv_row_bytes
        scored = torch.tensor(recorder.bytes[layer, "meta"]) // per_page
        index = torch.arange(bounds.shape[-1])
        newest = (torch.tensor(batch.lengths) - 1) // m.page
        pairs.append((bounds, ((index >= scored[:, None]) & (index != newest[:, None]))[:, None, None].to(bounds.device)))
    return pairs


def spoil_survivors(m, recorder, batch):
    """Ids of places that hold no token."""
    left = m.survivors
    return [(left.ids, torch.arange(left.ids.shape[-1], device=left.ids.device) >= left.counts[..., None])]


def spoil_codes(m, recorder, batch):
    """Parameters of groups that hold no token yet. Of the cache, only what is not stored as codes is read, and what this step turns into codes."""
    pairs = []
    for b, length in enumerate(batch.lengths):
        stops = [x.item() for x in m._stops(torch.tensor(length))] if isinstance(m, KIVI) else (length - 1, length - 1)
        recorder.k[:, b, :, stops[0] : length] = True
        recorder.v[:, b, :, max(0, stops[1] - 1) : length] = True
        for codes in (side for layer in m.codes for side in layer):
            unused = torch.arange(codes.scale.shape[2], device=codes.scale.device)[:, None] * codes.scheme.tokens >= length
            pairs += [(x[b], unused) for x in (codes.scale, codes.zero) if x is not None]
    return pairs


def spoil_multipole(m, recorder, batch):
    """Centroids that do not exist or whose request is dense; value centroids of near clusters as well, known by their tokens."""
    pairs = []
    index = torch.arange(m.counts[0].shape[-1])
    for layer, (ids, counts) in enumerate(recorder.sets):
        unread = ~((index < m._scored.cpu()[:, None])[:, None].expand(m.counts[0].shape))
        near = unread.clone()
        for b, g in [(b, g) for b in range(ids.shape[0]) for g in range(ids.shape[1])]:
            tokens = set(ids[b, g, : counts[b, g]].tolist())
            for i in range(int(m.clusters[b])):
                near[b, g, i] |= int(m.members[layer][b, g, m.starts[layer][b, g, i]]) in tokens
        pairs += [(m.centroids[layer], unread[:, :, None].to(ids.device)), (m.values[layer], near[..., None].to(ids.device))]
    return pairs


def spoil_rocket(m, recorder, batch):
    """Bounds of chunks that were not estimated, and of channels that were not chosen; those of the newest chunk are open for writing."""
    pairs = []
    for layer, bounds in enumerate(m.bounds):
        per_chunk = m.shape.kv_heads * m.size.channels * 2
        scored = torch.tensor(recorder.bytes[layer, "meta"]) // per_chunk
        chunk = torch.arange(bounds.shape[-1])
        newest = (chunk == (torch.tensor(batch.lengths) - m.removed.cpu() - 1)[:, None] // m.size.chunk)[:, None, None]
        grouped = batch.queries(layer)[1].unflatten(1, (m.shape.kv_heads, -1)).cpu()
        chosen = torch.zeros(grouped.shape[0], grouped.shape[1], m.shape.head_dim, dtype=torch.bool)
        chosen.scatter_(-1, grouped.abs().mean(2).topk(m.size.channels).indices, True)
        if bounds.shape[2] > m.shape.head_dim:
            up = grouped.sum(2) > 0
            chosen = torch.cat([chosen & up, chosen & ~up], -1)
        read = (chunk < scored[:, None])[:, None, None] & chosen[..., None]
        pairs.append((bounds, (~read & ~newest).to(bounds.device)))
    return pairs


def maker(kind, **settings):
    return lambda **more: kind(**(settings | more))


CASES = {
    "full": Case(Full, {}, expected=full_counts),
    "streaming_llm": Case(maker(StreamingLLM, sinks=3, recent=20), {"recent": 500}, expected=streaming_counts),
    "streaming_llm cache": Case(maker(StreamingLLM, sinks=3, recent=20, mode="faithful"), {"recent": 500}, expected=streaming_counts),
    "quest": Case(
        maker(Quest, budget=40, page=8, dense_layers=(1,)),
        {"budget": 500},
        ("sum", "max", "mean_query", "per_q_head"),
        quest_counts,
        spoil_quest,
    ),
    "quest faithful": Case(maker(Quest, budget=24, page=8, dense_layers=(), mode="faithful"), {"budget": 500}, (None,), quest_counts, spoil_quest),
    "oracle_topk": Case(maker(OracleTopK, budget=25), {"budget": 500}, expected=oracle_counts),
    "oracle_topk per_q_head": Case(maker(OracleTopK, budget=25, variant="per_q_head"), {"budget": 500}, expected=oracle_counts),
    "oracle_topk page": Case(maker(OracleTopK, budget=32, variant="page", page=8), {"budget": 500}, expected=oracle_counts),
    "oracle_topk ideal": Case(maker(OracleTopK, budget=25, count="ideal"), {"budget": 500}, expected=oracle_counts, ideal=True),
    "multipole": Case(
        maker(Multipole, budget=40), {"budget": 500}, (None,), multipole_counts, spoil_multipole, prompts=(400, 393, 41, 262), short=(300, 20)
    ),
    "multipole faithful": Case(
        *(maker(Multipole, budget=70, mode="faithful"), None, (None,), multipole_counts, spoil_multipole),
        **{"prompts": (393, 262), "short": (300, 20)},
    ),
    "multipole near only": Case(
        maker(Multipole, budget=40, replacement=False), {"budget": 500}, (None,), multipole_counts, spoil_multipole, prompts=(393, 262)
    ),
    "rocketkv": Case(maker(RocketKV, budget=30, window=8, max_new=10), {"budget": 500}, (None,), rocket_counts, spoil_rocket),
    "rocketkv large": Case(maker(RocketKV, budget=60, window=8, max_new=10), {"budget": 500}, (None,), rocket_counts, spoil_rocket),
    "rocketkv faithful": Case(
        maker(RocketKV, budget=24, window=8, max_new=10, mode="faithful"), {"budget": 1000, "max_new": 5}, (None,), rocket_counts, spoil_rocket
    ),
    "tidaldecode": Case(maker(TidalDecode, budget=25, reselect=9), {"budget": 500}, ("mean", "per_q_head"), tidal_counts, short_layers=4),
    "tidaldecode faithful": Case(maker(TidalDecode, budget=25, reselect=9, mode="faithful"), {"budget": 500}, (None,), tidal_counts, short_layers=4),
    "snapkv": Case(maker(SnapKV, capacity=25, window=8), {"capacity": 500}, ("sum", "max", "per_q_head"), snap_counts, spoil_survivors),
    "snapkv faithful": Case(maker(SnapKV, capacity=25, window=8, mode="faithful"), {"capacity": 500}, (None,), snap_counts, spoil_survivors),
    "pyramidkv": Case(maker(PyramidKV, capacity=25, beta=4), {"capacity": 500}, ("sum", "max", "per_q_head"), snap_counts, spoil_survivors),
    "tova": Case(maker(TOVA, capacity=25), {"capacity": 500}, ("mean",), tova_counts, spoil_survivors),
    "tova faithful": Case(maker(TOVA, capacity=25, mode="faithful"), {"capacity": 500}, (None,), tova_counts, spoil_survivors),
    "h2o": Case(maker(H2O, heavy=15, recent=10), {"heavy": 300, "recent": 300}, (None,), h2o_counts, spoil_survivors, scored=True),
    "kivi": Case(maker(KIVI, bits=2, group=16, residual=32), expected=kivi_counts, spoil=spoil_codes),
    "kivi 4": Case(maker(KIVI, group=32, residual=32), expected=kivi_counts, spoil=spoil_codes),
    "int8": Case(INT8, expected=int8_counts, spoil=spoil_codes),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


class Recorder:
    """Stands in for the ledger: remembers which K and V rows and how many bytes a step reports; ``muted``, it forgets a repeated step."""

    def __init__(self, batch: Batch):
        self.ledger, self.batch, self.muted = batch.ledger, batch, False
        self.clear()

    def clear(self):
        s, self.bytes, self.sets = self.batch.shape, {}, []
        longest = max(self.batch.lengths) + 1
        self.k, self.v = (torch.zeros(s.layers, s.batch, s.kv_heads, longest, dtype=torch.bool) for _ in range(2))

    def read(self, layer, spans):
        if self.muted:
            return
        group = self.batch.shape.group
        for start, stop in spans.tolist():
            for b in range(len(start)):
                for h, (first, end) in enumerate(zip(start[b], stop[b], strict=True)):
                    for rows in (self.k, self.v):
                        rows[layer, b, h // group, max(first, 0) : max(end, 0)] = True
        self.ledger.read(layer, spans)

    def selected(self, layer, ids, counts, unit, lengths, indexed=True, all_keys=False, rows=None):
        if self.muted:
            return
        sets = ids.shape[1]
        self.sets.append((ids, counts))
        for b, length in enumerate(lengths.tolist()):
            for r in range(sets):
                for i in ids[b, r, : counts[b, r]].tolist():
                    for found in (self.k, self.v):
                        found[layer, b, r * self.k.shape[2] // sets, i * unit : min((i + 1) * unit, length)] = True
            if all_keys:
                self.k[layer, b, :, :length] = True
        self.ledger.selected(layer, ids, counts, unit, lengths, indexed, all_keys, rows)

    def add(self, layer, category, per, units=1):
        if self.muted:
            return
        n = self.batch.shape.batch
        amounts = units.reshape(n, -1).sum(1).tolist() if isinstance(units, torch.Tensor) else [units] * n
        before = self.bytes.get((layer, category), [0] * n)
        self.bytes[layer, category] = [a + per * u for a, u in zip(before, amounts, strict=True)]
        self.ledger.add(layer, category, per, units)

    def __getattr__(self, name):
        return lambda *args, **options: None if self.muted else getattr(self.ledger, name)(*args, **options)


def test_poison_outside_the_reported_reads(case, backend):
    """Run a step, spoil all K and V rows and all state that were not reported, run it again: not a bit changes.

    A newest token's own rows stay: it wrote them a moment ago. Before that, both backends must agree.
    """
    batch, reference = Batch(case.make(), case.texts(backend), backend), Batch(case.make(), case.texts(backend))
    recorder = batch.method.ledger = Recorder(batch)
    spoiled = 0
    for _ in range(4 if fast(backend) else 1):
        batch.grow()
        recorder.clear()
        earlier = {name: state.clone() for name, state in batch.method._buffers.items()}
        want = batch.attend()
        batch.ledger.end_step()
        torch.testing.assert_close(want, reference.step(), atol=2e-5, rtol=2e-5)
        if case.ideal:
            continue
        spoils = case.spoil(batch.method, recorder, batch) if case.spoil else []
        for name, state in earlier.items():  # a step may change its state
            batch.method._buffers[name].copy_(state)
        pool, cache = batch.cache.pool, batch.cache
        clean = [(rows, rows.clone(), True) for rows in (pool.k, pool.v)]
        for rows, reported in ((pool.k, recorder.k), (pool.v, recorder.v)):
            kept = torch.zeros(*rows.shape[:2], pool.pages * pool.page_size, dtype=torch.bool)
            for b, length in enumerate(batch.lengths):
                slots = [cache.tables[b][t // pool.page_size] * pool.page_size + t % pool.page_size for t in range(length)]
                kept[:, :, slots] = reported[:, b, :, :length]
                kept[:, :, slots[-1]] = True
                spoiled += int((~reported[:, b, :, :length]).sum())
            rows.masked_fill_(~kept.view(*rows.shape[:-1], 1).to(rows.device), NAN)
        for state, mask in spoils:
            clean.append((state, state.clone(), mask))
            state.masked_fill_(mask, NAN if state.is_floating_point() else 10**6)
        recorder.muted = True
        torch.testing.assert_close(batch.attend(), want, atol=0, rtol=0)
        recorder.muted = False
        for rows, before, mask in clean:  # what the step wrote stays
            rows.copy_(torch.where(torch.as_tensor(mask, device=rows.device), before, rows))
    assert all((a == b).all() for a, b in zip(batch.counts().values(), reference.counts().values(), strict=True))
    assert case.ideal or (spoiled > 0) == (not isinstance(batch.method, Full)) or not fast(backend)


def test_closed_forms(case):
    """The counts of every layer, request and step are those of the method's formulas; the poison test holds the other backend to the same."""
    method = case.make()
    batch = Batch(method, case.texts())
    for _ in range(STEPS):
        batch.step()
    counts = batch.counts()
    s = batch.shape
    for step in range(STEPS):
        for layer in range(s.layers):
            for b, prompt in enumerate(case.prompts):
                length = prompt + 1 + step
                got = {name: int(values[step, layer, b]) for name, values in counts.items()}
                want = case.expected(method, Seen(layer, length, s, prompt))
                want["bytes_write"] = want.get("bytes_write", 0) + s.kv_heads * s.kv_row_bytes
                if "tokens_phys" in want:
                    want = {"bytes_meta": 0, "bytes_state": 0, "bytes_idx": 0, "bytes_kv": want["tokens_phys"] * s.kv_row_bytes, **want}
                assert {name: got[name] for name in want} == want, (step, layer, b)
                assert s.kv_heads * got["tokens_log"] <= s.q_heads * got["tokens_phys"] + s.q_heads  # a union is no smaller than one of it
                assert got["tokens_phys"] <= got["tokens_log"]
                assert got["tokens_phys"] <= s.kv_heads * length


@pytest.mark.parametrize("group", [1, 3])
def test_a_budget_for_everything_is_full_attention_and_counts_as_it(case, group):
    if case.everything is None:
        return
    batch = Batch(case.make(**case.everything), case.texts(group=group))
    for _ in range(3):
        torch.testing.assert_close(batch.step().double(), batch.full(), atol=2e-5, rtol=2e-5)
    counts = batch.counts()
    assert (counts["tokens_log"] == counts["tokens_log_full"]).all()
    assert (counts["bytes_kv"] == counts["bytes_full"]).all()
    assert not any(counts[f"bytes_{c}"].any() for c in ("meta", "state", "idx") if c != "state" or not case.scored)


def test_where_pages_lie_makes_no_difference(case):
    plain, moved = Batch(case.make(), case.texts()), Batch(case.make(), case.texts(), permute=True)
    for _ in range(4):
        torch.testing.assert_close(plain.step(), moved.step(), atol=1e-6, rtol=1e-6)
    assert all((a == b).all() for a, b in zip(plain.counts().values(), moved.counts().values(), strict=True))


def test_a_batch_is_what_its_requests_are_alone(case):
    together = Batch(case.make(), case.texts())
    alone = [Batch(case.make(), [text], max_tokens=together.shape.max_tokens) for text in case.texts()]
    for _ in range(6):
        out = together.step()
        for b, one in enumerate(alone):
            torch.testing.assert_close(out[:, b], one.step()[:, 0], atol=1e-6, rtol=1e-6)
    for b, one in enumerate(alone):
        assert all((together.counts()[name][..., b] == values[..., 0]).all() for name, values in one.counts().items())


def test_idle_requests_disturb_nobody(case):
    """A batch that is not full: rows that hold no token take part in every call."""
    plain, padded = Batch(case.make(), case.texts()), Batch(case.make(), case.texts(), idle=2)
    for _ in range(3):
        torch.testing.assert_close(plain.step(), padded.step()[:, : len(case.prompts)], atol=1e-6, rtol=1e-6)
    for name, values in plain.counts().items():
        assert (values == padded.counts()[name][..., : len(case.prompts)]).all(), name


def test_without_groups_all_ways_to_share_are_one(case):
    batches = [Batch(case.make(gqa=gqa) if gqa else case.make(), case.texts(group=1)) for gqa in case.gqa]
    for _ in range(3):
        first, *others = [batch.step() for batch in batches]
        for other in others:
            torch.testing.assert_close(first, other, atol=1e-6, rtol=1e-6)


def test_a_request_can_be_replaced_by_another(case):
    """State of an earlier request of the same row, or of an earlier generation, leaves no trace (but sums made in any order, on a GPU)."""
    method = case.make()
    Batch(method, case.texts()[::-1])
    used, fresh = Batch(method, case.texts()), Batch(case.make(), case.texts())
    for _ in range(3):
        torch.testing.assert_close(used.step(), fresh.step(), atol=0 if DEVICE == "cpu" else 1e-6, rtol=0)


def test_a_prepared_method_can_start_again(case):
    """What was saved behind the prompts and restored after some steps decodes as it did the first time, in the same memory."""
    batch, prompts = Batch(case.make(), case.texts()), Batch(case.make(), case.texts()).cache
    saved, where = batch.method.save(), [t.data_ptr() for t in tensors(vars(batch.method))]
    first = [batch.step() for _ in range(6)]
    batch.cache = prompts
    batch.ledger.reset()
    batch.method.restore(saved)
    for out in first[:4]:
        torch.testing.assert_close(batch.step(), out, atol=0 if DEVICE == "cpu" else 1e-6, rtol=0)
    assert [t.data_ptr() for t in tensors(vars(batch.method))][: len(where)] == where


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    if isinstance(value, dict):
        value = [v for k, v in value.items() if not str(k).startswith("_")]
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def test_state_keeps_its_memory(case):
    """A graph captured for one generation is replayed for the next: begin gives every buffer the same memory again."""
    method = case.make()
    first = Batch(method, case.texts())
    where = [t.data_ptr() for t in tensors(vars(method))]
    first.step()
    Batch(method, case.texts()[::-1])
    assert [t.data_ptr() for t in tensors(vars(method))] == where


def test_the_kernels_get_the_sets_that_are_reported(case):
    got = []
    layer = kernels("torch", DEVICE)

    def spy(q, cache, i, ids, counts, *rest, **options):
        got.append((ids, counts))
        return layer.attend_selected(q, cache, i, ids, counts, *rest, **options)

    batch = Batch(case.make(), case.texts(), layer_kernels=replace(layer, attend_selected=spy))
    recorder = batch.method.ledger = Recorder(batch)
    for _ in range(2):
        batch.grow()
        recorder.clear()
        got.clear()
        batch.attend()
        assert len(got) == len(recorder.sets)
        assert all(a is c and b is d for (a, b), (c, d) in zip(got, recorder.sets, strict=True))
        batch.ledger.end_step()


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


def stub(s) -> Kernels:
    """Kernels that compute nothing: torch's own ones look at bounds on the host, which a method may not."""

    def state(*lead):
        return State(torch.zeros(*lead, s.batch, s.q_heads, s.head_dim), torch.zeros(*lead, s.batch, s.q_heads))

    flags, bounds = torch.zeros(s.batch, s.q_heads, dtype=torch.bool), torch.zeros(2, 2, s.batch, s.q_heads, dtype=torch.int32)
    return replace(
        kernels("torch"),
        attend=lambda q, cache, layer, spans, scale: state(spans.shape[0]),
        attend_selected=lambda *args, **options: state(),
        full=lambda q, cache, layer, scale: torch.zeros_like(q),
        token_scores=lambda q, cache, layer, scale, width: torch.zeros(s.batch, s.q_heads, width),
        row_scores=lambda weights, table, units, rows=None: torch.zeros(*weights.shape[:3], table.shape[-1]),
        extend_bounds=lambda *args: None,
        attend_quantised=lambda *args: state(),
        quantise_rows=lambda *args: None,
        weigh_rows=lambda weights, table: torch.zeros(*weights.shape[:3], table.shape[-1]),
        mac_step=lambda q_pre, q, *args: MacStep(torch.zeros_like(q), bounds.clone(), flags.clone(), flags.clone(), flags.int()),
    )


class Watch(TorchDispatchMode):
    """Writes down every operation with the shapes of its tensors; raises at those that make the host wait or depend on data.

    ``tolist`` and ``numpy`` reach no dispatcher: the test replaces them.
    """

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "lift_fresh", "bincount")

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{function} synchronises with the host, or takes a tensor from it"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype is not torch.bool for i in args[1]), f"{function} with a mask"
        self.log.append((str(function), *(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))))
        return function(*args, **(kwargs or {}))


def refuse(*args):
    raise AssertionError("reads a tensor on the host")


def test_watch_sees_what_it_should():
    x = torch.arange(4)
    for use in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(), lambda: x[x > 1], lambda: torch.tensor([1]), lambda: int(x[0])):
        with pytest.raises(AssertionError), Watch():
            use()


def captured_operations(make: Callable[[], Method], prompts: tuple, monkeypatch) -> list[list]:
    """What three steps of each of two batches do, operation by operation."""
    logs = []
    longest = max(prompts) + 10
    for lengths in (prompts, (20, longest - 9, 3, 50)[: len(prompts)]):
        data = [Text.random(n, longest - n, seed=n) for n in lengths]
        shape = Batch(Full(), data).shape
        batch = Batch(make(), data, layer_kernels=stub(shape), max_tokens=longest)
        batch.step()  # the first step may allocate
        for _ in range(3):
            batch.grow()
            queries = [batch.queries(layer) for layer in range(shape.layers)]
            with monkeypatch.context() as patch, Watch() as watch:
                for name in ("tolist", "numpy", "cpu"):
                    patch.setattr(torch.Tensor, name, refuse)
                for layer, (q_pre, q) in enumerate(queries):
                    batch.method.attend(layer, q_pre, q, batch.cache)
                batch.ledger.end_step()
            logs.append(watch.log)
    return logs


def test_a_step_can_be_captured(case, monkeypatch):
    """Nothing in attend or in the ledger synchronises, and steps of other lengths do exactly the same operations."""
    if DEVICE == "cuda":
        return
    logs = captured_operations(case.make, case.prompts, monkeypatch)
    assert all(log == logs[0] for log in logs)


@pytest.mark.parametrize("settings", [{}, {"sink": 4, "max_chain": 2, "min_context": 40}])
def test_a_mac_step_can_be_captured(settings, monkeypatch):
    """MAC's own tests are in test_mac and test_counting; here what surrounds its kernel."""
    if DEVICE == "cuda":
        return
    logs = captured_operations(lambda: MAC(**{"window": 16, "band": 8, "min_context": 0} | settings), PROMPTS, monkeypatch)
    assert logs[0] and all(log == logs[0] for log in logs)


# -- budgets and settings ---------------------------------------------------------------------------------------------

SMOL = dict(layers=30, q_heads=9, kv_heads=3, head_dim=64, scale=0.125)
LLAMA = dict(layers=32, q_heads=32, kv_heads=8, head_dim=128, scale=128**-0.5)


@pytest.mark.parametrize("file", sorted(Path("conf/method").glob("*.yaml")), ids=lambda f: f.stem)
def test_settings_files_build_their_method(file):
    from macbench.settings import build

    node = OmegaConf.load(file)
    method = build(node, "method", Method)
    settings = {k for k in node if k not in ("_target_", "name")}
    assert node.name == file.stem
    assert settings == set(method.__dataclass_fields__)
    lines = file.read_text().splitlines()
    assert all("#" in line for line in lines if not line.startswith(("_target_", "name")))


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (StreamingLLM, "sinks", -1),
        (StreamingLLM, "recent", 0),
        (StreamingLLM, "mode", "fast"),
        (StreamingLLM, "positions", "new"),
        (Quest, "budget", 15),
        (Quest, "budget", 100.5),
        (Quest, "page", 0),
        (Quest, "min_pages", 0),
        (Quest, "dense_layers", "0"),
        (Quest, "gqa", "mean"),
        (Quest, "mode", "kernel"),
        (Multipole, "budget", 0),
        (Multipole, "replacement", 1),
        (Multipole, "mode", "fast"),
        (Multipole, "seed", -1),
        (OracleTopK, "budget", 0),
        (OracleTopK, "variant", "head"),
        (OracleTopK, "count", "free"),
        (OracleTopK, "page", -4),
        (RocketKV, "budget", 15),
        (RocketKV, "window", 0),
        (RocketKV, "max_new", 1.5),
        (RocketKV, "mode", "mt"),
        (TidalDecode, "budget", True),
        (TidalDecode, "reselect", 2),
        (TidalDecode, "gqa", "sum"),
        (TidalDecode, "mode", None),
    ],
)
def test_wrong_settings_get_one_line(kind, key, value):
    with pytest.raises(ConfigError, match=f"method.{key}={value}: must be ") as error:
        kind(**{key: value})
    assert "\n" not in str(error.value)
