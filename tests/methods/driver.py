"""Drives a method through a prompt and decode steps on given tensors: no model, one layer, any dtype."""

from dataclasses import dataclass

import torch
from macbench_kernels import PagedKVCache, PagePool, kernels

from macbench.counting import Ledger, Shape
from macbench.methods.base import Method, PromptQueries


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
        sums = self.column_sums(prompt) if method.prompt_column_sums else None
        method.after_prefill(0, 0, PromptQueries(stream.q_pre[None, :, tail], stream.q[None, :, tail], first, sums), self.cache)

    def column_sums(self, prompt: int) -> torch.Tensor:
        """Attention probability that each prompt token got from all prompt queries of its group, float32 [Hkv, prompt]."""
        group = self.stream.q.shape[0] // self.stream.k.shape[0]
        k = self.stream.k[:, :prompt].double().repeat_interleave(group, 0)
        scores = (self.stream.q[:, :prompt].double() @ k.mT) * self.shape.scale
        unseen = torch.ones(prompt, prompt, dtype=torch.bool, device=k.device).triu(1)
        return scores.masked_fill(unseen, float("-inf")).softmax(-1).sum(1).unflatten(0, (-1, group)).sum(1).float()

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
