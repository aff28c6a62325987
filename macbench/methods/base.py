"""What a method is: three calls, and a report of every byte it reads. A method knows the kernel layer and nothing above it."""

from dataclasses import dataclass

import torch
from macbench_kernels import Kernels, PagedKVCache

from macbench.counting import Ledger, Shape
from macbench.errors import ConfigError


@dataclass(frozen=True)
class PromptQueries:
    """The last queries of the prompt of one layer.

    ``q_pre``, ``q``: [1, Hq, n, d] before and after RoPE, of positions ``first`` .. ``first + n - 1``. n is the smaller of the prompt's
    length and the most that any method of the run asked for; a method takes the last rows it needs.
    """

    q_pre: torch.Tensor
    q: torch.Tensor
    first: int

    def last(self, n: int) -> "PromptQueries":
        """The last ``n`` of them (all, if there are fewer)."""
        skip = max(0, self.q.shape[2] - n)
        return PromptQueries(self.q_pre[:, :, skip:], self.q[:, :, skip:], self.first + skip)


@dataclass
class Method:
    """Base of all methods: a dataclass of hyper-parameters.

    One generation is ``begin``, then ``after_prefill`` for every layer, then ``attend`` for every decode step and layer. ``attend`` must
    not synchronise with the host, so that a decode step can be captured in a CUDA graph, and reports what it reads to ``self.ledger``
    with the same tensors that it gives to ``self.kernels``.
    """

    @property
    def prompt_queries(self) -> int:
        """How many of the prompt's last queries ``after_prefill`` needs."""
        return 0

    def caution(self, ctx: int) -> str | None:
        """A line for the user if the method has no effect at a context of ``ctx`` tokens."""
        return None

    def begin(self, shape: Shape, kernels: Kernels, ledger: Ledger) -> None:
        """Forget the previous generation and prepare for one of this shape."""
        self.shape, self.kernels, self.ledger = shape, kernels, ledger

    def after_prefill(self, layer: int, queries: PromptQueries, cache: PagedKVCache) -> None:
        """The prompt's K and V of ``layer`` are in the cache: build what decoding needs."""

    def attend(self, layer: int, q_pre: torch.Tensor, q: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
        """Attention output [B, Hq, d] of one decode step; q_pre, q: [B, Hq, d]. The token's own K and V are in the cache already."""
        raise NotImplementedError


def require(holds: bool, method: str, key: str, value: object, allowed: str) -> None:
    """Raise a ConfigError for ``method.key`` unless ``holds``."""
    if not holds:
        raise ConfigError(f"{method}.{key}", value, f"must be {allowed}")


def is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
