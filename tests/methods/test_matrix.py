"""What must hold for every method: one row of ``CASES`` each."""

from dataclasses import replace

import pytest
import torch
from macbench_kernels import kernels

from macbench.methods.full import Full
from tests.conftest import DEVICE
from tests.methods.cases import STEPS, fast
from tests.methods.driver import Batch
from tests.methods.expected import Seen
from tests.methods.recorder import Recorder

NAN = float("nan")


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
    assert (spoiled > 0) == (not case.ideal and not isinstance(batch.method, Full))


def test_closed_forms(case):
    """The counts of every layer, request and step are those of the method's formulas; the poison test holds the other backend to the same."""
    method = case.make()
    batch = Batch(method, case.texts())
    s = batch.shape
    for step in range(STEPS):
        batch.step()
        counts = batch.counts()
        for layer in range(s.layers):
            for b, text in enumerate(batch.texts):
                got = {name: int(values[step, layer, b]) for name, values in counts.items()}
                length = batch.lengths[b]
                want = case.expected(method, Seen(layer, length, s, text.prompt, text, b))
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
        torch.testing.assert_close(plain.step(), moved.step(), atol=1e-5, rtol=1e-5)  # products in float32, added in another order
    assert all((a == b).all() for a, b in zip(plain.counts().values(), moved.counts().values(), strict=True))


def test_a_batch_is_what_its_requests_are_alone(case):
    together = Batch(case.make(), case.texts())
    alone = [Batch(case.make(), [text], max_tokens=together.shape.max_tokens) for text in case.texts()]
    for _ in range(6):
        out = together.step()
        for b, one in enumerate(alone):
            torch.testing.assert_close(out[:, b], one.step()[:, 0], atol=1e-5, rtol=1e-5)
    for b, one in enumerate(alone):
        assert all((together.counts()[name][..., b] == values[..., 0]).all() for name, values in one.counts().items())


def test_idle_requests_disturb_nobody(case):
    """A batch that is not full: rows that hold no token take part in every call."""
    plain, padded = Batch(case.make(), case.texts()), Batch(case.make(), case.texts(), idle=2)
    for _ in range(3):
        torch.testing.assert_close(plain.step(), padded.step()[:, : len(case.prompts)], atol=1e-5, rtol=1e-5)
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
