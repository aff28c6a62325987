"""Layers on several devices: for each run of layers on one of them a page pool, a cache, a ledger and a copy of the method of its own.

A copy knows its layers alone, counted from 0, and everything it touches lies on their device, so methods and kernels are what they are on one
device. What belongs to the model as a whole is in ``Shape`` (``first``, ``whole``) and in ``Method.part``. With one device nothing of this is used.
"""

from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
from macbench_kernels import Kernels, PagedKVCache, PagePool

from macbench.counting import Ledger, Shape
from macbench.methods.base import Method, PromptQueries


def parts(shape: Shape) -> list[Shape]:
    """The shape of each run of layers on one device; the shape itself if there is but one device."""
    found: list[Shape] = []
    for device, run in groupby(shape.devices):
        first = sum(part.layers for part in found)
        found.append(replace(shape, layers=len(list(run)), device=device, devices=(), first=first, whole=shape.layers))
    return found or [shape]


class SpreadPool:
    """The pools of all parts, each with as many pages."""

    def __init__(self, pools: list[PagePool]):
        self.parts, self.pages, self.page_size = pools, pools[0].pages, pools[0].page_size

    @property
    def free_pages(self) -> int:
        return min(pool.free_pages for pool in self.parts)


class SpreadCache:
    """A ``PagedKVCache`` for each part; what is done to one is done to all, so all hold the same tokens."""

    def __init__(self, pool: SpreadPool, batch: int = 1, width: int | None = None):
        self.parts = [PagedKVCache(part, batch, width) for part in pool.parts]
        self._places = [(cache, layer) for cache in self.parts for layer in range(cache.pool.layers)]

    def at(self, layer: int) -> tuple[PagedKVCache, int]:
        """The cache that holds a layer of the model, and which of its own layers that is."""
        return self._places[layer]

    @property
    def host_lengths(self) -> list[int]:
        return self.parts[0].host_lengths

    @property
    def active(self) -> list[bool]:
        return self.parts[0].active

    @property
    def lengths(self) -> torch.Tensor:
        """int32 [B], on the first layer's device."""
        return self.parts[0].lengths

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        cache, own = self.at(layer)
        cache.append(own, k, v)

    def slice(self, layer: int, *span: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        cache, own = self.at(layer)
        return cache.slice(own, *span)

    def share(self, sources: "list[tuple[SpreadCache, int]]") -> None:
        for i, cache in enumerate(self.parts):
            cache.share([(source.parts[i], request) for source, request in sources])

    def reserve(self, tokens: int | list[int]) -> None:
        self._all("reserve", tokens)

    def extend(self, tokens: int) -> None:
        self._all("extend", tokens)

    def count(self, tokens: int) -> None:
        self._all("count", tokens)

    def advance(self, tokens: int) -> None:
        self._all("advance", tokens)

    def activate(self, active: list[bool]) -> None:
        self._all("activate", active)

    def free(self) -> None:
        self._all("free")

    def _all(self, name: str, *args) -> None:
        for cache in self.parts:
            getattr(cache, name)(*args)


class SpreadLedger:
    """A ``Ledger`` for each part; counts are those of all layers in order."""

    def __init__(self, shape: Shape, page: int = 0):
        self.parts = [Ledger(part, page) for part in parts(shape)]

    @property
    def prepared(self) -> list[int]:
        return [sum(each) for each in zip(*(ledger.prepared for ledger in self.parts), strict=True)]

    def reset(self) -> None:
        for ledger in self.parts:
            ledger.reset()

    def begin_step(self, lengths: list[int]) -> None:
        for ledger in self.parts:
            ledger.begin_step(lengths)

    def end_step(self) -> None:
        for ledger in self.parts:
            ledger.end_step()

    def counts(self) -> dict[str, np.ndarray]:
        found = [ledger.counts() for ledger in self.parts]
        return {name: np.concatenate([counts[name] for counts in found], 1) for name in found[0]}


class SpreadMethod:
    """A method as a decoder sees it, made of a copy for each part. Every ``begin`` makes them anew: no captured step knows their memory."""

    def __init__(self, method: Method):
        self.method = method
        self.parts: list[Method] = []

    def begin(self, shape: Shape, kernels: Kernels, ledger: SpreadLedger) -> None:
        self.forget()
        self._places: list[tuple[int, int]] = []
        for i, (part, own) in enumerate(zip(parts(shape), ledger.parts, strict=True)):
            self.parts.append(self.method.part(part, self.parts[-1] if self.parts else None))
            self.parts[-1].begin(part, kernels, own)
            self._places += [(i, layer) for layer in range(part.layers)]
        self.method.parts = self.parts

    def forget(self) -> None:
        self.method.forget()
        self.parts = []

    def save(self) -> dict[str, object]:
        return {"parts": [part.save() for part in self.parts]}

    def restore(self, saved: dict[str, object]) -> None:
        for part, own in zip(self.parts, saved["parts"], strict=True):
            part.restore(own)

    def after_prompt(self, request: int, queries: list[PromptQueries], cache: SpreadCache) -> None:
        for part, own in zip(self.parts, cache.parts, strict=True):
            first = part.shape.first
            part.after_prompt(request, queries[first : first + part.shape.layers], own)

    def between_steps(self, cache: SpreadCache) -> None:
        for part, own in zip(self.parts, cache.parts, strict=True):
            part.between_steps(own)

    def attend(self, layer: int, q_pre: torch.Tensor, q: torch.Tensor, cache: SpreadCache) -> torch.Tensor:
        i, own = self._places[layer]
        return self.parts[i].attend(own, q_pre, q, cache.parts[i])


def make_pool(shape: Shape, pages: int, page_size: int) -> PagePool | SpreadPool:
    """``pages`` pages for every layer, on its device."""
    pools = [PagePool(s.layers, s.kv_heads, s.head_dim, pages, page_size, s.dtype, s.device) for s in parts(shape)]
    return SpreadPool(pools) if shape.devices else pools[0]


def make_cache(pool: PagePool | SpreadPool, batch: int = 1, width: int | None = None) -> PagedKVCache | SpreadCache:
    return (SpreadCache if isinstance(pool, SpreadPool) else PagedKVCache)(pool, batch, width)


def make_ledger(shape: Shape, page: int = 0) -> Ledger | SpreadLedger:
    return (SpreadLedger if shape.devices else Ledger)(shape, page)


def make_method(method: Method, shape: Shape) -> Method | SpreadMethod:
    return SpreadMethod(method) if shape.devices else method


def place(cache: PagedKVCache | SpreadCache, layer: int) -> tuple[PagedKVCache, int]:
    """The cache that holds a layer of the model, and which of its layers that is: what kernels are called with."""
    return cache.at(layer) if isinstance(cache, SpreadCache) else (cache, layer)
