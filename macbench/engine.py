"""Prefill once, decode with one or many methods, count and time.

The prompt's KV is computed exactly and once; every method decodes on a fork of it that shares its pages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from macbench_kernels import Kernels, PagedKVCache, PagePool

from macbench.counting import Ledger, Shape
from macbench.methods.base import Method, PromptQueries
from macbench.models.adapter import attention_shape, intercept
from macbench.sampling import greedy

# Pages beyond ctx: the copy of a shared last page, and room for rounding.
_SPARE_PAGES = 4


@dataclass
class Prompt:
    """A prefilled prompt. ``queries``: per layer, the last ones. ``first_token``: the greedy choice after the prompt. ``logits``: [vocab]."""

    cache: PagedKVCache
    queries: list[PromptQueries]
    first_token: int
    logits: torch.Tensor
    seconds: float

    def free(self) -> None:
        self.cache.free()
        self.queries = []


@dataclass
class Generation:
    """What a method made of a prompt.

    ``tokens``: generated ids, a stop token included. ``step_seconds``: float [steps], the first token comes from prefill and is no step.
    ``counts``: int64 [steps, layers, 1] by name of ``counting.COUNTS``. ``setup_seconds``: the method's own work after prefill.
    ``positions``: int64 [steps], the 0-based position of the token that each step processed. ``finish_reason``: stop, length, or
    unfinished while it is still being made.
    """

    tokens: list[int]
    finish_reason: str
    step_seconds: np.ndarray
    setup_seconds: float
    counts: dict[str, np.ndarray]
    positions: np.ndarray

    def then(self, later: "Generation") -> "Generation":
        """Both as one: tokens and steps one after the other, times and counts add up."""
        return Generation(
            self.tokens + later.tokens,
            later.finish_reason,
            np.concatenate([self.step_seconds, later.step_seconds]),
            self.setup_seconds + later.setup_seconds,
            {name: np.concatenate([counts, later.counts[name]]) for name, counts in self.counts.items()},
            np.concatenate([self.positions, later.positions]),
        )


class Keeper(Protocol):
    """Gets what has been generated so far, every ``every`` decode steps."""

    every: int

    def save(self, generation: Generation) -> None: ...


class Engine:
    """Runs one model. ``ctx`` bounds prompt plus generated tokens; ``chunk`` is the number of prompt tokens per forward pass."""

    def __init__(self, network: torch.nn.Module, kernels: Kernels, ctx: int, page_size: int = 16, chunk: int = 4096):
        self.network, self.kernels, self.ctx, self.chunk = network, kernels, ctx, chunk
        self.shape = replace(attention_shape(network), max_tokens=ctx)
        s = self.shape
        pages = -(-ctx // page_size) + _SPARE_PAGES
        self.pool = PagePool(s.layers, s.kv_heads, s.head_dim, pages, page_size, s.dtype, s.device)

    @torch.inference_mode()
    def prefill(
        self, ids: list[int], keep_queries: int = 0, progress: Callable[[int], None] = lambda tokens: None, column_sums: bool = False
    ) -> Prompt:
        """Exact prefill of a prompt in chunks; keeps the last ``keep_queries`` queries of every layer for methods that need them.

        ``column_sums``: also how much attention every prompt token gets from all prompt queries, about one more q.k pass per layer.
        """
        cache = PagedKVCache(self.pool)
        tails = _Tails(self.shape, len(ids), keep_queries, column_sums)
        position = 0

        def attend(layer, q_pre, q, k, v):
            cache.append(layer, k, v)
            tails.take(layer, position, q_pre, q)
            state = self.kernels.causal(q, cache, layer, position, self.shape.scale)
            if column_sums:
                tails.add(layer, self.kernels.column_sums(q, cache, layer, position, state.lse, self.shape.scale))
            return state.out.to(q.dtype)

        began = self._now()
        tokens = torch.tensor(ids, device=self.shape.device)[None]
        try:
            with intercept(self.network, attend):
                for position in range(0, len(ids), self.chunk):
                    piece = tokens[:, position : position + self.chunk]
                    cache.extend(piece.shape[1])
                    logits = self._forward(piece, torch.arange(position, position + piece.shape[1], device=piece.device)[None])
                    progress(piece.shape[1])
        except BaseException:
            cache.free()
            raise
        first = int(logits.argmax())
        return Prompt(cache, tails.done(), first, logits, self._now() - began)

    @torch.inference_mode()
    def decode(
        self,
        prompt: Prompt,
        method: Method,
        max_new_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
        progress: Callable[[int], None] = lambda tokens: None,
        sampler: Callable[[torch.Tensor], int] = greedy,
        ended: Callable[[list[int]], bool] = lambda tokens: False,
        start: Sequence[int] = (),
        keeper: Keeper | None = None,
    ) -> Generation:
        """Decoding on a fork of the prompt, until a stop token, until ``ended(tokens)``, or until there are ``max_new_tokens``.

        ``start``: tokens that were generated earlier, all but the last of them part of ``prompt``; they count as generated, and the
        result begins with them, but its steps are those made here.
        """
        ledger = Ledger(self.shape)
        cache = prompt.cache.fork()
        first = cache.host_lengths[0]
        try:
            cache.reserve(max_new_tokens - len(start) + bool(start))
            began = self._now()
            method.begin(self.shape, self.kernels, ledger)
            for layer, queries in enumerate(prompt.queries):
                method.after_prefill(layer, 0, queries, cache)
            setup = self._now() - began

            def attend(layer, q_pre, q, k, v):
                cache.append(layer, k, v)
                return method.attend(layer, q_pre[:, :, 0], q[:, :, 0], cache)[:, :, None]

            tokens, seconds = list(start) or [sampler(prompt.logits)], []

            def so_far(reason: str) -> Generation:
                return Generation(list(tokens), reason, np.array(seconds), setup, ledger.counts(), first + np.arange(len(seconds)))

            with intercept(self.network, attend):
                while len(tokens) < max_new_tokens and tokens[-1] not in stop_ids and not ended(tokens):
                    ledger.begin_step([n + 1 for n in cache.host_lengths])  # its own work is not part of a step's time
                    method.between_steps(cache)
                    began = perf_counter()
                    cache.extend(1)
                    last = torch.tensor([[tokens[-1]]], device=self.shape.device)
                    logits = self._forward(last, cache.lengths[:, None].long() - 1)
                    ledger.end_step()
                    tokens.append(sampler(logits))
                    seconds.append(perf_counter() - began)
                    progress(1)
                    if keeper is not None and len(seconds) % keeper.every == 0:
                        keeper.save(so_far("unfinished"))
        finally:
            cache.free()
        return so_far("stop" if tokens[-1] in stop_ids or ended(tokens) else "length")

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [vocab] of the last token in float32."""
        hidden = self.network.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return self.network.get_output_embeddings()(hidden[:, -1:])[0, -1].float()

    def _now(self) -> float:
        if torch.device(self.shape.device).type == "cuda":
            torch.cuda.synchronize(self.shape.device)
        return perf_counter()


class _Tails:
    """Keeps the last n queries of every layer while chunks go by, and perhaps sums of the prompt's attention, [Hkv, prompt] per layer."""

    def __init__(self, shape: Shape, prompt: int, keep: int, column_sums: bool = False):
        self.first = max(0, prompt - keep)
        self.sums: list[torch.Tensor | None] = [None] * shape.layers
        if column_sums:
            self.sums = [torch.zeros(shape.kv_heads, prompt, device=shape.device) for _ in range(shape.layers)]
        none = torch.empty(1, shape.q_heads, 0, shape.head_dim, dtype=shape.dtype, device=shape.device)
        self.parts = [[(none, none)] for _ in range(shape.layers)]

    def take(self, layer: int, position: int, q_pre: torch.Tensor, q: torch.Tensor) -> None:
        skip = max(0, self.first - position)
        if skip < q.shape[2]:
            # Copies, so that a chunk's activations can go.
            self.parts[layer].append((q_pre[:, :, skip:].clone(), q[:, :, skip:].clone()))

    def add(self, layer: int, sums: torch.Tensor) -> None:
        """``sums`` [Hq, tokens so far] of a chunk."""
        total = self.sums[layer]
        total[:, : sums.shape[1]] += sums.view(len(total), -1, sums.shape[1]).sum(1)

    def done(self) -> list[PromptQueries]:
        queries = [[torch.cat(x, 2) for x in zip(*parts, strict=True)] for parts in self.parts]
        return [PromptQueries(*pair, self.first, sums) for pair, sums in zip(queries, self.sums, strict=True)]
