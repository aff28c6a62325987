"""Drives a method through a prompt and decode steps on given tensors: no model, one layer, any dtype."""

from dataclasses import dataclass

import torch
from macbench_kernels import PagedKVCache, PagePool, kernels

from macbench.counting import Ledger, Shape
from macbench.methods.base import Method, PromptQueries

# Sizes of the default model and of Llama-3.1-8B.
SMOL = dict(layers=30, q_heads=9, kv_heads=3, head_dim=64, scale=0.125)
LLAMA = dict(layers=32, q_heads=32, kv_heads=8, head_dim=128, scale=128**-0.5)


@dataclass
class Stream:
    """Queries before and after RoPE and K, V of a whole text: [Hq or Hkv, n, d]."""

    q_pre: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def random(cls, n, q_heads=6, kv_heads=2, dim=64, dtype=torch.float64, device="cpu", repeat=0.3, seed=0) -> "Stream":
        """Queries drift slowly around a few themes, so that some steps match a recent one and some do not."""
        torch.manual_seed(seed)
        themes = torch.randn(q_heads, 4, dim, dtype=dtype)
        theme = torch.randint(0, 4, (n,))
        q_pre = themes[:, theme] + repeat * torch.randn(q_heads, n, dim, dtype=dtype)
        q = q_pre + 0.05 * torch.randn(q_heads, n, dim, dtype=dtype)
        k, v = (torch.randn(kv_heads, n, dim, dtype=dtype) for _ in range(2))
        return cls(*(x.to(device) for x in (q_pre, q, k, v)))


def column_sums(q: torch.Tensor, k: torch.Tensor, prompt: int, scale: float) -> torch.Tensor:
    """Attention probability that each prompt token got from all prompt queries of a group: q [Hq, n, d], k [Hkv, n, d] -> float32 [Hkv, prompt]."""
    group = len(q) // len(k)
    scores = (q[:, :prompt].double() @ k[:, :prompt].double().repeat_interleave(group, 0).mT) * scale
    unseen = torch.ones(prompt, prompt, dtype=torch.bool, device=k.device).triu(1)
    return scores.masked_fill(unseen, float("-inf")).softmax(-1).sum(1).unflatten(0, (-1, group)).sum(1).float()


class Driver:
    """``prompt`` tokens are prefilled, then ``step()`` decodes the next token of the stream; batch 1 (or copies of the stream)."""

    def __init__(self, method: Method, stream: Stream, prompt: int, backend: str = "torch", keep: int | None = None):
        heads, _, dim = stream.q.shape
        self.shape = Shape(1, heads, stream.k.shape[0], dim, dim**-0.5, stream.q.dtype, stream.q.device, 1, stream.q.shape[1])
        self.method, self.stream, self.prompt = method, stream, prompt
        self.ledger = Ledger(self.shape)
        pool = PagePool(1, stream.k.shape[0], dim, stream.q.shape[1] // 16 + 4, 16, stream.q.dtype, stream.q.device)
        self.cache = PagedKVCache(pool)
        self.cache.extend(prompt)
        self.cache.append(0, stream.k[None, :, :prompt], stream.v[None, :, :prompt])
        method.begin(self.shape, kernels(backend, stream.q.device), self.ledger)
        first = max(0, prompt - (method.prompt_queries if keep is None else keep))
        tail = slice(first, prompt)
        sums = column_sums(stream.q, stream.k, prompt, dim**-0.5) if method.prompt_column_sums else None
        method.after_prompt(0, [PromptQueries(stream.q_pre[None, :, tail], stream.q[None, :, tail], first, sums)], self.cache)

    def grow(self) -> int:
        """Make the next token visible; returns its position."""
        t = self.cache.host_lengths[0]
        self.method.between_steps(self.cache)
        self.cache.extend(1)
        self.cache.append(0, self.stream.k[None, :, t : t + 1], self.stream.v[None, :, t : t + 1])
        self.ledger.begin_step(self.cache.host_lengths)
        return t

    def step(self) -> torch.Tensor:
        """Output [Hq, d] of the next token."""
        t = self.grow()
        out = self.method.attend(0, self.stream.q_pre[None, :, t], self.stream.q[None, :, t], self.cache)[0]
        self.ledger.end_step()
        return out

    def exact(self, head: int, t: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Float64 state of the query of (head, t) over the keys [start, stop), from the stream itself."""
        g = head // (self.stream.q.shape[0] // self.stream.k.shape[0])
        k, v = self.stream.k[g, start:stop].double(), self.stream.v[g, start:stop].double()
        scores = (k @ self.stream.q[head, t].double()) * self.shape.scale
        if stop <= start:
            return torch.zeros_like(self.stream.q[head, t]).double(), torch.tensor(float("-inf"), dtype=torch.float64)
        return torch.softmax(scores, 0) @ v, torch.logsumexp(scores, 0)


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE as Llama does it: x [..., n, d], positions int [n]."""
    half = x.shape[-1] // 2
    angle = positions.double()[:, None] * 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@dataclass
class Text:
    """One request: queries before and after RoPE [layers, Hq, n, d], K and V [layers, Hkv, n, d]; the first ``prompt`` tokens are its prompt."""

    q_pre: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    prompt: int

    @classmethod
    def random(cls, prompt, steps, layers=4, group=3, kv_heads=2, dim=32, dtype=torch.float32, seed=0, device="cpu") -> "Text":
        """Keys gather around a few directions, so that attention is peaked somewhere and pages differ."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        n = prompt + steps
        themes = normal(layers, kv_heads, 5, dim)
        k_pre = 0.6 * normal(layers, kv_heads, n, dim) + 1.2 * themes[:, :, torch.randint(0, 5, (n,), generator=generator)]
        aim = themes[:, :, torch.randint(0, 5, (n,), generator=generator)].repeat_interleave(group, 1)
        q_pre = normal(layers, kv_heads * group, n, dim) + aim
        places = torch.arange(n)
        drawn = (q_pre, rotate(q_pre, places), rotate(k_pre, places), normal(layers, kv_heads, n, dim))
        return cls(*(x.to(device, dtype) for x in drawn), prompt)


class Batch:
    """A method on several requests that decode in step; ``step()`` returns the outputs of all layers, [layers, B, Hq, d].

    ``idle``: empty requests behind the others, as in a batch that is not full; they take part in every call and do not grow.
    """

    def __init__(self, method: Method, texts: list[Text], backend="torch", page_size=16, permute=False, layer_kernels=None, max_tokens=None, idle=0):
        self.method, self.texts, first = method, [*texts, *texts[:1] * idle], texts[0]
        layers, heads, _, dim = first.q.shape
        kv_heads, dtype, device = first.k.shape[1], first.k.dtype, first.k.device
        longest = max(t.k.shape[2] for t in texts)
        sizes = (layers, heads, kv_heads, dim, dim**-0.5, dtype, device, len(self.texts), max_tokens or longest)
        self.shape = Shape(*sizes, rotate)
        self.ledger = Ledger(self.shape)
        pool = PagePool(layers, kv_heads, dim, len(texts) * (-(-longest // page_size) + 3), page_size, dtype, device)
        alone = [PagedKVCache(pool) for _ in texts]
        for cache, text in zip(alone, texts, strict=True):
            cache.extend(text.prompt)
            for layer in range(layers):
                cache.append(layer, text.k[layer, None, :, : text.prompt], text.v[layer, None, :, : text.prompt])
        self.cache = PagedKVCache(pool, len(self.texts))
        self.cache.share([(cache, 0) for cache in alone])
        self.cache.activate([b < len(texts) for b in range(len(self.texts))])
        for cache in alone:
            cache.free()
        if permute:
            self._permute()
        method.begin(self.shape, layer_kernels or kernels(backend, device), self.ledger)
        for b, text in enumerate(texts):
            start = max(0, text.prompt - method.prompt_queries)
            tail = slice(start, text.prompt)
            queries = []
            for layer in range(layers):
                sums = column_sums(text.q[layer], text.k[layer], text.prompt, dim**-0.5) if method.prompt_column_sums else None
                queries.append(PromptQueries(text.q_pre[layer, None, :, tail], text.q[layer, None, :, tail], start, sums))
            method.after_prompt(b, queries, self.cache)
        self.steps = 0

    def _permute(self) -> None:
        """Move every page somewhere else."""
        pool = self.cache.pool
        order = torch.randperm(pool.pages, generator=torch.Generator().manual_seed(5))
        for rows in (pool.k, pool.v):
            rows[:, :, order.to(rows.device)] = rows.clone()
        moved = order.tolist()
        pool._refs = [pool._refs[moved.index(page)] for page in range(pool.pages)]
        pool._free = sorted(moved[page] for page in pool._free)
        self.cache.tables = [[moved[page] for page in table] for table in self.cache.tables]
        self.cache._refresh_device()

    @property
    def lengths(self) -> list[int]:
        return list(self.cache.host_lengths)

    def queries(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """q_pre and q [B, Hq, d] of the newest tokens."""
        return tuple(torch.stack([getattr(t, x)[layer, :, n - 1] for t, n in zip(self.texts, self.lengths, strict=True)]) for x in ("q_pre", "q"))

    def grow(self) -> None:
        """Make the next token of every request visible in all layers."""
        self.ledger.begin_step([n + active for n, active in zip(self.lengths, self.cache.active, strict=True)])
        self.method.between_steps(self.cache)
        self.cache.extend(1)
        for layer in range(self.shape.layers):
            new = (torch.stack([getattr(t, x)[layer, :, n - 1 :][:, :1] for t, n in zip(self.texts, self.lengths, strict=True)]) for x in "kv")
            self.cache.append(layer, *new)
        self.steps += 1

    def attend(self) -> torch.Tensor:
        return torch.stack([self.method.attend(layer, *self.queries(layer), self.cache) for layer in range(self.shape.layers)])

    def step(self) -> torch.Tensor:
        self.grow()
        out = self.attend()
        self.ledger.end_step()
        return out

    def counts(self) -> dict:
        return self.ledger.counts()

    def weights(self, layer: int, b: int, h: int) -> torch.Tensor:
        """Float64 attention probabilities of the newest token of a request, [L]."""
        text, n = self.texts[b], self.lengths[b]
        g = h * self.shape.kv_heads // self.shape.q_heads
        return torch.softmax(text.k[layer, g, :n].double() @ text.q[layer, h, n - 1].double() * self.shape.scale, 0)

    def over(self, layer: int, b: int, h: int, tokens) -> torch.Tensor:
        """Float64 attention output of the newest token of a request over ``tokens`` alone, [d]."""
        text, n = self.texts[b], self.lengths[b]
        g, tokens = h * self.shape.kv_heads // self.shape.q_heads, list(tokens)
        weights = torch.softmax(text.k[layer, g, tokens].double() @ text.q[layer, h, n - 1].double() * self.shape.scale, 0)
        return weights @ text.v[layer, g, tokens].double()

    def full(self) -> torch.Tensor:
        """Float64 full attention of the newest tokens, like ``step()``."""
        heads = range(self.shape.q_heads)
        rows = [[[self.over(i, b, h, range(n)) for h in heads] for b, n in enumerate(self.lengths)] for i in range(self.shape.layers)]
        return torch.stack([torch.stack([torch.stack(x) for x in y]) for y in rows])


def toy(keys, queries, values=None) -> Text:
    """One layer, one KV head: keys [n][d], the newest token's queries [heads][d], V[t] = t by default; the last key is the newest token."""
    k = torch.tensor(keys, dtype=torch.float64)
    v = torch.arange(len(k), dtype=torch.float64)[:, None].expand_as(k) if values is None else torch.tensor(values, dtype=torch.float64)
    q = torch.tensor(queries, dtype=torch.float64)[:, None].expand(-1, len(k), -1)
    return Text(q[None], q[None], k[None, None], v[None, None], len(k) - 1)
