"""Prefill once, decode with one or many methods, count and time.

The prompt's KV is computed exactly and once; every method decodes on a fork of it that shares its pages.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from macbench_kernels import Kernels, PagedKVCache, UnsupportedError, one_by_one

from macbench.counting import Ledger, Shape
from macbench.decoder import Decoder, Preparation
from macbench.errors import ConfigError
from macbench.methods.base import Method, PromptQueries
from macbench.models.adapter import attention_shape, intercept
from macbench.models.forward import NOT_INVARIANT, make_forward, waits_for_device
from macbench.models.placement import compute_device, dispatched
from macbench.sampling import greedy
from macbench.spread import SpreadCache, make_cache, make_pool, place

# Pages beyond ctx: the copy of a shared last page, and room for rounding.
_SPARE_PAGES = 4


@dataclass
class Prompt:
    """A prefilled prompt. ``queries``: per layer, the last ones, in host memory if other prompts wait, too. ``first_token``: the greedy choice
    after the prompt. ``logits``: [vocab]. ``chunk``: prompt tokens per forward pass."""

    cache: PagedKVCache | SpreadCache
    queries: list[PromptQueries]
    first_token: int
    logits: torch.Tensor
    seconds: float
    chunk: int

    def free(self) -> None:
        self.cache.free()
        self.queries = []


@dataclass
class Generation:
    """What a method made of a prompt.

    ``tokens``: generated ids, a stop token included. ``step_seconds``: float [steps], the first token comes from prefill and is no step.
    ``counts``: int64 [steps, layers, 1] by name of ``counting.COUNTS``. ``setup_seconds``: the method's own work after prefill.
    ``positions``: int64 [steps], the 0-based position of the token that each step processed. ``finish_reason``: stop, length, or
    unfinished while it is still being made. ``question_steps``: how many of the first steps processed a question and not a generated token.
    ``prepared_bytes``: what the method moved between prefill and the first step.
    """

    tokens: list[int]
    finish_reason: str
    step_seconds: np.ndarray
    setup_seconds: float
    counts: dict[str, np.ndarray]
    positions: np.ndarray
    question_steps: int = 0
    prepared_bytes: int = 0

    def then(self, later: "Generation") -> "Generation":
        """Both as one: tokens and steps one after the other, times and counts add up."""
        return Generation(
            self.tokens + later.tokens,
            later.finish_reason,
            np.concatenate([self.step_seconds, later.step_seconds]),
            self.setup_seconds + later.setup_seconds,
            {name: np.concatenate([counts, later.counts[name]]) for name, counts in self.counts.items()},
            np.concatenate([self.positions, later.positions]),
            self.question_steps,
            self.prepared_bytes + later.prepared_bytes,
        )


class Keeper(Protocol):
    """Gets what has been generated so far, every ``every`` decode steps."""

    every: int

    def save(self, generation: Generation) -> None: ...


@dataclass
class Request:
    """What to make of a prompt: decode until a stop token, until ``ended(tokens)``, or until there are ``max_new_tokens``.

    ``start``: tokens that were generated earlier, all but the last of them part of ``prompt``; they count as generated, and the result
    begins with them, but its steps are those made here. ``feed``: tokens that are taken instead of sampled ones as long as there are any.
    ``question``: the prompt's own last tokens, which are not in ``prompt``: decode steps process them before anything is generated.
    """

    prompt: Prompt
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    sampler: Callable[[torch.Tensor], int] = greedy
    ended: Callable[[list[int]], bool] = lambda tokens: False
    start: Sequence[int] = ()
    feed: Sequence[int] = ()
    question: Sequence[int] = ()
    keeper: Keeper | None = None


class Engine:
    """Runs one model. ``ctx`` bounds prompt plus generated tokens; ``chunk`` is the number of prompt tokens per forward pass.

    ``batch``: how many requests may decode together. ``graph``: capture decode steps as CUDA graphs, where that
    is possible: on one GPU, and unless weights come and go or a mixture of experts waits for the device. ``captures`` says whether it is.
    ``batch_invariant``: a request's logits are, to the last bit, those that it gets alone; see ``one_by_one``, and ``invariant`` of the forwards.
    """

    def __init__(
        self, network: torch.nn.Module, kernels: Kernels, ctx: int, page_size: int = 16, chunk: int = 4096, batch: int = 1, graph: bool = True,
        batch_invariant: bool = False,
    ):  # fmt: skip
        self.network, self.kernels, self.ctx, self.chunk, self.batch = network, kernels, ctx, chunk, batch
        cuda = compute_device(network).type == "cuda"
        self.captures = graph and kernels.captures and cuda and not dispatched(network) and not waits_for_device(network)
        self.shape = attention_shape(network, ctx)
        if self.shape.devices and kernels.plan is not None:
            raise ConfigError("backend", kernels.name, "plans a step for one device; with layers on several GPUs take triton or torch")
        # A fork shares the pages of its prompt and adds those of what it generates; variants decode one after the other.
        pages = batch * (-(-ctx // page_size) + _SPARE_PAGES) + _SPARE_PAGES
        self.pool = make_pool(self.shape, pages, page_size)
        self.forward = make_forward(network, ctx, batch)
        if batch_invariant and batch > 1:
            if not self.forward.invariant(batch):
                raise UnsupportedError(NOT_INVARIANT)
            self.kernels = one_by_one(kernels)
        self._decoders: dict[tuple[int, int], Decoder] = {}

    @torch.inference_mode()
    def prefill(
        self, ids: list[int], keep_queries: int = 0, progress: Callable[[int], None] = lambda tokens: None, column_sums: bool = False,
        chunk: int | None = None,
    ) -> Prompt:  # fmt: skip
        """Exact prefill of a prompt in chunks; keeps the last ``keep_queries`` queries of every layer for methods that need them.

        ``column_sums``: also how much attention every prompt token gets from all prompt queries, about one more q.k pass per layer.
        ``chunk``: instead of the engine's own.
        """
        chunk = chunk or self.chunk
        cache = make_cache(self.pool)
        # Of a batch, all prompts are there before the first method prepares: what waits does so outside of the GPU's memory.
        tails = _Tails(self.shape, len(ids), keep_queries, column_sums, park=self.batch > 1)
        position = 0

        def attend(layer, q_pre, q, k, v):
            cache.append(layer, k, v)
            tails.take(layer, position, q_pre, q)
            held, own = place(cache, layer)
            state = self.kernels.causal(q, held, own, position, self.shape.scale)
            if column_sums:
                tails.add(layer, self.kernels.column_sums(q, held, own, position, state.lse, self.shape.scale))
            return state.out.to(q.dtype)

        began = self._now()
        tokens = torch.tensor(ids, device=self.shape.device)[None]
        try:
            with intercept(self.network, attend):
                for position in range(0, len(ids), chunk):
                    piece = tokens[:, position : position + chunk]
                    cache.extend(piece.shape[1])
                    logits = self._forward(piece, torch.arange(position, position + piece.shape[1], device=piece.device)[None])
                    progress(piece.shape[1])
        except BaseException:
            cache.free()
            raise
        first = int(logits.argmax())  # waits for the device
        queries = tails.done()
        return Prompt(cache, queries, first, logits, self._now() - began, chunk)

    def decode(
        self, prompt: Prompt, method: Method, max_new_tokens: int, stop_ids: frozenset[int] = frozenset(),
        progress: Callable[[int], None] = lambda tokens: None, **options,
    ) -> Generation:  # fmt: skip
        """Decoding of one prompt; ``options`` are further fields of ``Request``."""
        return self.decode_batch([Request(prompt, max_new_tokens, stop_ids, **options)], method, progress)[0]

    @torch.inference_mode()
    def decode_batch(
        self,
        requests: Sequence[Request],
        method: Method,
        progress: Callable[[int], None] = lambda tokens: None,
        watch: Callable[[int, torch.Tensor], None] | None = None,
        preparation: Preparation | None = None,
    ) -> list[Generation]:
        """Decoding of several prompts in step, on forks that share their pages: a generation for each request.

        ``watch(step, logits)`` sees the logits [B, vocab] of every step; they are only valid during the call. ``preparation``: see there.
        """
        decoder = self.decoder(method, 1 if len(requests) == 1 else max(self.batch, len(requests)))
        began = self._now()
        decoder.start([r.prompt for r in requests], preparation)
        setup = (self._now() - began) / len(requests)
        try:
            runs = [_Run(r, setup, decoder.cache.host_lengths[i]) for i, r in enumerate(requests)]
            padding = [0] * (decoder.shape.batch - len(runs))
            decoder.tokens.copy_(torch.tensor([run.input for run in runs] + padding))
            active = [not run.done for run in runs]
            step = 0
            room = [max(0, len(r.question) + r.max_new_tokens - len(run.tokens)) for r, run in zip(requests, runs, strict=True)]
            decoder.cache.reserve(room + padding)  # at once, so that a request's pages lie together
            while any(active):
                decoder.cache.activate([*active, *map(bool, padding)])
                decoder.before()
                began = perf_counter()
                decoder.step()
                chosen = decoder.chosen.tolist()
                taken = [run.take(decoder.logits[i], chosen[i]) if active[i] else chosen[i] for i, run in enumerate(runs)]
                if taken != chosen[: len(runs)]:
                    decoder.tokens.copy_(torch.tensor(taken + padding))
                seconds = perf_counter() - began
                if watch is not None:
                    watch(step, decoder.logits)
                step += 1
                for i, run in enumerate(runs):
                    if active[i]:
                        run.seconds.append(seconds)
                        run.save(decoder.ledger, i)
                progress(sum(active))
                active = [not run.done for run in runs]
        finally:
            decoder.stop()
        return [run.generation(decoder.ledger, i, run.reason) for i, run in enumerate(runs)]

    def decoder(self, method: Method, batch: int) -> Decoder:
        """The one decoder of a method for ``batch`` requests; its buffers, and on a GPU its graph, serve all later calls."""
        key = (id(method), batch)
        if key not in self._decoders:
            shape = replace(self.shape, batch=batch)
            # The method is part of the decoder, so its id is not used again.
            self._decoders[key] = Decoder(self.forward, self.kernels, shape, self.pool, method, self.captures)
        return self._decoders[key]

    def release(self) -> None:
        """Forget all decoders with their buffers and graphs, for instance when memory is short."""
        for decoder in self._decoders.values():
            decoder.method.forget()
        self._decoders.clear()
        gc.collect()  # a decoder and what it attends with know each other
        if torch.device(self.shape.device).type == "cuda":
            torch.cuda.empty_cache()

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [vocab] of the last token in float32."""
        hidden = self.network.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return self.network.get_output_embeddings()(hidden[:, -1:])[0, -1].float()

    def _now(self) -> float:
        if torch.device(self.shape.device).type == "cuda":
            for device in {self.shape.device, *self.shape.devices}:
                torch.cuda.synchronize(device)
        return perf_counter()


class _Run:
    """A request while it is being decoded."""

    def __init__(self, request: Request, setup: float, first: int):
        self.request, self.setup, self.first = request, setup, first
        self.fed = 0
        self.asked = 0  # tokens of the question that have been processed
        self.tokens = list(request.start) or ([] if request.question else [self._next(request.prompt.logits)])
        self.seconds: list[float] = []

    @property
    def input(self) -> int:
        """The token that the next step processes."""
        return self.request.question[self.asked] if self.asked < len(self.request.question) else self.tokens[-1]

    @property
    def steps(self) -> int:
        return len(self.seconds)

    def _next(self, logits: torch.Tensor, best: int | None = None) -> int:
        if self.fed < len(self.request.feed):
            self.fed += 1
            return self.request.feed[self.fed - 1]
        return best if best is not None and self.request.sampler is greedy else self.request.sampler(logits)

    def take(self, logits: torch.Tensor, best: int) -> int:
        """The next step's token, after a step with these logits [vocab], whose most likely token is ``best``."""
        self.asked = min(self.asked + 1, len(self.request.question))
        if self.asked == len(self.request.question):
            self.tokens.append(self._next(logits, best))
        return self.input

    @property
    def stopped(self) -> bool:
        return bool(self.tokens) and (self.tokens[-1] in self.request.stop_ids or self.request.ended(self.tokens))

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.request.max_new_tokens or self.stopped

    @property
    def reason(self) -> str:
        return "stop" if self.stopped else "length"

    def save(self, ledger: Ledger, row: int) -> None:
        keeper = self.request.keeper
        if keeper is not None and self.steps % keeper.every == 0:
            keeper.save(self.generation(ledger, row, "unfinished"))

    def generation(self, ledger: Ledger, row: int, reason: str) -> Generation:
        counts = {name: values[: self.steps, :, row : row + 1] for name, values in ledger.counts().items()}
        places = self.first + np.arange(self.steps)
        return Generation(list(self.tokens), reason, np.array(self.seconds), self.setup, counts, places, self.asked, ledger.prepared[row])


def _parked(x: torch.Tensor) -> torch.Tensor:
    """A copy in host memory. Of a GPU's tensor it is pinned, and there once the GPU has come so far."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x.contiguous(), non_blocking=True)


class _Tails:
    """Keeps the last n queries of every layer while chunks go by, and perhaps sums of the prompt's attention, [Hkv, prompt] per layer.

    ``park``: in host memory, layer by layer.
    """

    def __init__(self, shape: Shape, prompt: int, keep: int, column_sums: bool = False, park: bool = False):
        self.first, self.park = max(0, prompt - keep), park
        self.sums: list[torch.Tensor | None] = [None] * shape.layers
        if column_sums:
            self.sums = [torch.zeros(shape.kv_heads, prompt, device=shape.device_of(layer)) for layer in range(shape.layers)]
        self.none = torch.empty(1, shape.q_heads, 0, shape.head_dim, dtype=shape.dtype, device=shape.device)
        self.parts: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in range(shape.layers)]

    def take(self, layer: int, position: int, q_pre: torch.Tensor, q: torch.Tensor) -> None:
        skip = max(0, self.first - position)
        if skip < q.shape[2]:
            # Copies, so that a chunk's activations can go.
            self.parts[layer].append(tuple(_parked(x[:, :, skip:]) if self.park else x[:, :, skip:].clone() for x in (q_pre, q)))

    def add(self, layer: int, sums: torch.Tensor) -> None:
        """``sums`` [Hq, tokens so far] of a chunk."""
        total = self.sums[layer]
        total[:, : sums.shape[1]] += sums.view(len(total), -1, sums.shape[1]).sum(1)

    def done(self) -> list[PromptQueries]:
        """Once the device has nothing left to do."""
        made = []
        for layer, parts in enumerate(self.parts):
            sums, self.sums[layer] = self.sums[layer], None
            pair = [x[0] if len(x) == 1 else torch.cat(x, 2) for x in zip(*parts or [(self.none, self.none)], strict=True)]
            parts.clear()
            made.append(PromptQueries(*pair, self.first, _parked(sums) if self.park and sums is not None else sums))
        return made
