"""One decode step of a batch with one method, in memory that stays in place: eager, or captured once as a CUDA graph and replayed."""

import operator
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import torch
from macbench_kernels import Kernels, PagePool

from macbench.counting import Shape
from macbench.methods.base import Method
from macbench.spread import SpreadPool, make_cache, make_ledger, make_method

# Eager steps before a capture: the first compiles kernels, the second finds every buffer in place.
_WARM_UP = 2


class Preparation:
    """What a method made of some prompts between prefill and the first step, so that it is made once: the first ``start`` that gets this
    object fills it, later ones with the same prompts start from it. It costs a copy of the method's state."""

    def __init__(self):
        self.state: dict | None = None

    def of(self, prompts: list, shape: Shape) -> bool:
        return self.state is not None and self.shape == shape and len(prompts) == len(self.prompts) and all(map(operator.is_, prompts, self.prompts))

    def keep(self, prompts: list, shape: Shape, method: Method) -> None:
        """Where there is no memory for it, nothing is kept, and it is made anew."""
        try:
            self.prompts, self.shape, self.state = list(prompts), shape, method.save()
        except (torch.OutOfMemoryError, MemoryError):
            self.state = None


class Decoder:
    """Decodes up to ``shape.batch`` requests in step; ``start`` again for the next ones.

    ``forward``: see models/forward.py. After ``step``: ``logits`` float32 [B, vocab] and ``chosen`` int64 [B], the greedy choice, which is
    also what the next step will process unless ``tokens`` int64 [B] is written to. ``graph``: capture the step (CUDA only, and on one device:
    a graph does not span several).
    """

    def __init__(self, forward, kernels: Kernels, shape: Shape, pool: PagePool | SpreadPool, method: Method, graph: bool):
        self.forward, self.kernels, self.shape, self.method = forward, kernels, shape, make_method(method, shape)
        self.cache = make_cache(pool, shape.batch, -(-shape.max_tokens // pool.page_size))
        self.ledger = make_ledger(shape, method.counted_page)
        self.tokens = torch.zeros(shape.batch, dtype=torch.int64, device=shape.device)
        self.logits = self.chosen = None
        self._wants_graph = graph and kernels.captures and torch.device(shape.device).type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._session = nullcontext()

    def start(self, prompts: list, preparation: Preparation | None = None) -> None:
        """Become a fork of the prompts (see engine.Prompt), at most ``shape.batch`` of them, and let the method prepare for them."""
        if self._wants_graph and self._graph is None:
            self._capture()
        try:
            self.cache.share([(prompt.cache, 0) for prompt in prompts])
            self.cache.activate([i < len(prompts) for i in range(self.shape.batch)])
            self._begin()
            if preparation is not None and preparation.of(prompts, self.shape):
                self.method.restore(preparation.state)
            else:
                for request, prompt in enumerate(prompts):
                    self.method.after_prompt(request, [own.to(self.shape.device_of(i)) for i, own in enumerate(prompt.queries)], self.cache)
                if preparation is not None:
                    preparation.keep(prompts, self.shape, self.method)
        except BaseException:
            self.cache.free()
            raise
        self._open()

    def start_at(self, tokens: int, steps: int) -> None:
        """Every request holds ``tokens`` tokens, whose K and V are whatever lies in the pool, with room for ``steps``: for latency alone."""
        if self._wants_graph and self._graph is None:
            self._capture()
        self.cache.extend(tokens)
        self.cache.reserve(steps)
        self._begin()
        self._open()

    def stop(self) -> None:
        """Give the pages back; counts stay."""
        self._session.__exit__(None, None, None)
        self._session = nullcontext()
        self.cache.free()

    def before(self) -> None:
        """The host's part of a step: bookkeeping, pages, and whatever the method does between steps."""
        lengths = [n + active for n, active in zip(self.cache.host_lengths, self.cache.active, strict=True)]
        self.ledger.begin_step(lengths)
        self.method.between_steps(self.cache)
        self.cache.count(1)

    def step(self) -> None:
        """The device's part of a step, after ``before``."""
        if self._graph is None:
            self._body()
        else:
            self._graph.replay()

    def launch(self, attend: Callable) -> None:
        """``step``, launched anew even if it is captured, with ``attend(layer, q_pre, q) -> out``, all [B, Hq, d]."""
        captured = self.logits, self.chosen
        with self.forward.attending(attend):
            self._body()
        if self._graph is not None:  # whose replays write to the captured tensors
            for kept, new in zip(captured, (self.logits, self.chosen), strict=True):
                kept.copy_(new)
            self.logits, self.chosen = captured

    def attend(self, layer: int, q_pre: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """The method's attention on this decoder's cache."""
        return self.method.attend(layer, q_pre, q, self.cache)

    def _begin(self) -> None:
        self.ledger.reset()
        self.method.begin(self.shape, self.kernels, self.ledger)

    def _open(self) -> None:
        """A captured step knows whom it calls; an eager one is told."""
        if self._graph is None:
            self._session = self.forward.attending(self.attend)
        self._session.__enter__()

    def _body(self) -> None:
        self.cache.advance(1)
        self.logits = self.forward.step(self.tokens, self.cache)
        self.chosen = self.logits.argmax(-1)
        self.tokens.copy_(self.chosen)
        self.ledger.end_step()

    def _capture(self) -> None:
        """On empty requests: nothing grows, and what is written goes to the spare page. The method then begins anew in the same memory."""
        self.cache.activate([False] * self.shape.batch)
        try:
            self._begin()
            graph = torch.cuda.CUDAGraph()
            with self.forward.attending(self.attend):
                for _ in range(_WARM_UP):
                    self.ledger.begin_step(self.cache.host_lengths)
                    self.method.between_steps(self.cache)
                    self._body()
                torch.cuda.synchronize(self.shape.device)
                with torch.cuda.graph(graph, pool=_memory(self.shape.device), capture_error_mode="thread_local"):  # others write records
                    self._body()
            _live[graph] = str(self.shape.device)
            self._graph = graph
        finally:
            self.cache.free()


_live: weakref.WeakKeyDictionary[torch.cuda.CUDAGraph, str] = weakref.WeakKeyDictionary()


def _memory(device) -> object | None:
    """Graphs of one device share their scratch memory, as only one of them runs at a time; it goes with the last of them."""
    return next((graph.pool() for graph, where in _live.items() if where == str(device)), None)
