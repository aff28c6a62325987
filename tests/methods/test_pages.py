"""rho_page and the bytes before the first step: whole pages of a method's own store, against sets of rows; golden sizes by hand."""

import numpy as np
import pytest
import torch

from macbench.counting import Ledger, Shape, span_pages
from macbench.methods.h2o import H2O
from macbench.methods.int8 import INT8
from macbench.methods.kivi import KIVI
from macbench.methods.mac import MAC
from macbench.methods.multipole import Multipole
from macbench.methods.quest import Quest
from macbench.methods.rocketkv import RocketKV
from macbench.methods.snapkv import SnapKV
from macbench.methods.streaming_llm import StreamingLLM
from macbench.methods.tova import TOVA
from tests.methods.driver import Batch, Text
from tests.methods.expected import Seen, quest_counts
from tests.methods.recorder import Recorder

COMPACT = (SnapKV, TOVA, H2O, KIVI, INT8)  # rows lie together


def test_golden_pages():
    """Two heads of a group read {0,1,7} and {1,2,7} of 8 tokens in pages of 2: 6 of 8 (logical 6/16, physical 4/8), 64 of 128 bytes; the new
    row is 16 bytes, and so are the bounds of each page."""
    shape = Shape(1, 2, 1, 4, 0.5, max_tokens=8)
    ledger = Ledger(shape, page=2)
    ledger.begin_step([8])
    ids, lengths = torch.tensor([[[0, 1, 7], [1, 2, 7]]], dtype=torch.int32), torch.tensor([8], dtype=torch.int32)
    ledger.selected(0, ids, torch.full((1, 2), 3, dtype=torch.int32), 1, lengths)
    ledger.end_step()
    found = {name: int(values.sum()) for name, values in ledger.counts().items()}
    assert (found["tokens_log"], found["tokens_phys"], found["tokens_page"]) == (6, 4, 6)
    assert (found["bytes_kv"], found["bytes_full"], found["bytes_write"], found["bytes_idx"]) == (64, 128, 16, 24)
    assert quest_counts(Quest(budget=2, page=2, min_pages=1, dense_layers=()), Seen(0, 8, shape, 7))["bytes_meta"] == 64


def test_pages_of_spans_end_where_the_text_ends():
    """Sets of tokens, rounded out one by one."""
    rng = np.random.default_rng(0)
    spans = rng.integers(0, 50, (3, 2, 4, 6))  # [S, 2, B, Hq]
    lengths = np.array([50, 47, 64, 49])
    found = span_pages(spans, lengths, 2, 16)
    for b, length in enumerate(lengths):
        want = 0
        for g in range(2):
            read = {t for s in range(3) for h in range(3 * g, 3 * g + 3) for t in range(*spans[s, :, b, h])}
            want += sum(min(16, length - 16 * page) for page in {t // 16 for t in read})
        assert found[b] == want


def test_pages_are_those_of_the_rows_that_were_read(case):
    batch = Batch(case.make(), case.texts())
    batch.ledger.page = 16
    recorder = batch.method.ledger = Recorder(batch)
    for step in range(3):
        batch.grow()
        recorder.clear()
        batch.attend()
        batch.ledger.end_step()
        counts = {name: values[step] for name, values in batch.counts().items()}
        assert (counts["tokens_page"] >= counts["tokens_phys"]).all() and (counts["tokens_page"] <= counts["tokens_phys_full"]).all()
        if isinstance(batch.method, COMPACT):
            assert (counts["tokens_page"] == counts["tokens_phys"]).all()
            continue
        for layer in range(batch.shape.layers):
            for b, length in enumerate(batch.lengths):
                want = sum(pages(rows[layer, b, g], batch.method, layer, b, g, length) for rows in (recorder.k, recorder.v) for g in range(2))
                want = want if not case.ideal else 2 * pages_of(recorder.v, layer, b, length)
                assert counts["tokens_page"][layer, b] == want // 2, (step, layer, b)


def pages_of(rows, layer, b, length):
    return sum(pages(rows[layer, b, g], None, layer, b, g, length) for g in range(2))


def pages(read: torch.Tensor, method, layer: int, b: int, g: int, length: int) -> int:
    """Rows of the pages of 16 that hold a row of ``read``; RocketKV's store has only what survived, in order."""
    read = read[:length]
    if isinstance(method, RocketKV) and method.removed[b]:
        kept = method.kept[layer][b, g].tolist()
        prompt = len(kept) + int(method.removed[b])
        read = read[[*kept, *range(prompt, length)]]
    return sum(len(page) for page in read.split(16) if page.any())


@pytest.mark.parametrize(
    ("method", "want"),
    [
        # Per layer, with 2 KV heads of dimension 32 (64 bytes a key), 6 query heads and 300 prompt tokens.
        (StreamingLLM(), 0),
        (Quest(dense_layers=(), page=16), 2 * (300 * 64 + 19 * 128)),
        (Quest(dense_layers=(0, 1)), 0),
        (SnapKV(capacity=50), 2 * 300 * 64),
        (SnapKV(capacity=300), 0),
        (TOVA(capacity=50), 2 * 300 * 64),
        (H2O(heavy=30, recent=20), 2 * (300 * 64 + 50 * 4)),
        (KIVI(bits=2, group=32, residual=64), 2 * (256 + 236) * (64 + 12)),  # 8 bytes of codes, 4 of scale and zero
        (INT8(), 2 * 300 * (128 + 72)),
        (Multipole(), 2 * (128 * (128 + 4) + 8 * (128 + 4))),
        (MAC(window=100, band=40), 2 * 260 * 128 + 100 * 6 * (32 * 6 + 8)),
        (RocketKV(budget=60, window=8, max_new=10), None),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, int | None) else "",
)
def test_bytes_before_the_first_step(method, want):
    batch = Batch(method, [Text.random(300, 1, layers=2), Text.random(40, 1, layers=2)])
    if want is None:  # sizes follow from the budget: keep rows are left, in chunks with two bounds (one, if a chunk is a token)
        size = method.size
        want = 2 * (300 * 64 + -(-size.keep // size.chunk) * (2 if size.chunk > 1 else 1) * 64)
    assert batch.ledger.prepared[0] == 2 * want
    batch.ledger.reset()
    assert batch.ledger.prepared == [0, 0]
