"""How long the last queries of prompts stay in device memory: those of one layer of one prompt at a time, however many prompts wait.

On a CPU torch's meta device plays the accelerator: it has tensors and no bytes, so that only what lies where is looked at.
"""

import weakref

import pytest
import torch
from macbench_kernels import PagePool, kernels

from macbench import engine
from macbench.counting import Shape
from macbench.decoder import Decoder
from macbench.engine import Engine, Prompt
from macbench.methods.base import Method, PromptQueries
from tests.conftest import DEVICE
from tests.models.tiny import tiny

LAYERS, HEADS, DIM, KEEP, PROMPT = 3, 4, 16, 40, 100
SHAPE = Shape(LAYERS, HEADS, 2, DIM, 1.0, device="meta", batch=5, max_tokens=PROMPT)


def queries(n: int) -> torch.Tensor:
    return torch.empty(1, HEADS, n, DIM, device="meta")


@pytest.mark.parametrize("chunk", [100, 64, 30])
def test_a_prefill_leaves_none_on_the_device(chunk, monkeypatch):
    """Chunks of any size, the last queries spread over one to three of them."""
    monkeypatch.setattr(engine, "_parked", lambda x: torch.zeros(x.shape))
    tails = engine._Tails(SHAPE, PROMPT, KEEP, column_sums=True, park=True)
    for position in range(0, PROMPT, chunk):
        for layer in range(LAYERS):
            tails.take(layer, position, *(queries(min(chunk, PROMPT - position)) for _ in range(2)))
            kept = [x for parts in tails.parts for pair in parts for x in pair]
            assert all(x.device.type == "cpu" for x in kept)
    made = tails.done()
    assert [(q.first, *q.q.shape) for q in made] == [(PROMPT - KEEP, 1, HEADS, KEEP, DIM)] * LAYERS
    assert all(x.device.type == "cpu" for q in made for x in (q.q_pre, q.q, q.column_sums))


class Watching(Method):
    """Adds up the bytes of the queries that it has been given and that somebody still holds."""

    def begin(self, shape, kernels, ledger):
        super().begin(shape, kernels, ledger)
        self.given, self.most = [], 0

    def after_prefill(self, layer, request, queries, cache):
        assert queries.q.device.type == "meta"
        self.given += [weakref.ref(x) for x in (queries.q_pre, queries.q)]
        alive = [x for x in (ref() for ref in self.given) if x is not None]
        self.most = max(self.most, sum(x.nbytes for x in alive))


class NoForward:
    def attending(self, attend):
        return torch.no_grad()


def test_a_batch_prepares_one_prompt_at_a_time():
    pool = PagePool(LAYERS, 2, DIM, 100, device="meta")
    host = torch.zeros(1, HEADS, KEEP, DIM)
    prompts = []
    for _ in range(SHAPE.batch):
        cache = engine.PagedKVCache(pool)
        cache.extend(PROMPT)
        prompts.append(Prompt(cache, [PromptQueries(host.clone(), host.clone(), PROMPT - KEEP) for _ in range(LAYERS)], 0, host, 0.0, PROMPT))
    method = Watching()
    decoder = Decoder(NoForward(), kernels("torch"), SHAPE, pool, method, graph=False)
    decoder.start(prompts)
    assert len(method.given) == 2 * LAYERS * SHAPE.batch
    assert method.most == LAYERS * 2 * host.nbytes


def test_parked_queries_are_the_same_queries():
    """An engine for several requests keeps elsewhere what an engine for one keeps in place."""
    network = tiny("llama", torch.float32)
    ids = [int(x) for x in torch.randint(0, 97, (PROMPT,), generator=torch.Generator().manual_seed(1))]
    one, several = (Engine(network, kernels("auto", DEVICE), 128, chunk=64, batch=batch).prefill(ids, KEEP, column_sums=True) for batch in (1, 2))
    assert several.queries[0].q.device.type == "cpu" and one.queries[0].q.device.type == DEVICE
    for a, b in zip(one.queries, several.queries, strict=True):
        assert a.first == b.first
        for name in ("q_pre", "q", "column_sums"):
            assert torch.equal(getattr(a, name).cpu(), getattr(b, name))
