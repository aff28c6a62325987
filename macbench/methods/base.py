"""What a method is: three calls, and a report of every byte it reads. A method knows the kernel layer and nothing above it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from macbench_kernels import Kernels, PagedKVCache, visible_span

from macbench.counting import Ledger, Shape
from macbench.errors import ConfigError

# The largest knob, in tokens or whatever it counts: far beyond any context, and far below what 32 bits and the memory hold.
MOST = 1 << 22
# Elements of keys that ``Method.slices`` lets be copied at once.
_MOST_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class PromptQueries:
    """The last queries of the prompt of one layer.

    ``q_pre``, ``q``: [1, Hq, n, d] before and after RoPE, of positions ``first`` .. ``first + n - 1``. n is the smaller of the prompt's
    length and the most that any method of the run asked for; a method takes the last rows it needs. ``column_sums``: float32
    [Hkv, prompt tokens], the attention probability that each token got from all prompt queries of a KV head's group, if a method asked.
    """

    q_pre: torch.Tensor
    q: torch.Tensor
    first: int
    column_sums: torch.Tensor | None = None

    def last(self, n: int) -> "PromptQueries":
        """The last ``n`` of them (all, if there are fewer)."""
        skip = max(0, self.q.shape[2] - n)
        return PromptQueries(self.q_pre[:, :, skip:], self.q[:, :, skip:], self.first + skip, self.column_sums)

    def to(self, device: str | torch.device) -> "PromptQueries":
        """The same on a device (these, if they are there)."""
        parts = [x if x is None else x.to(device, non_blocking=True) for x in (self.q_pre, self.q, self.column_sums)]
        return PromptQueries(*parts[:2], self.first, parts[2])


@dataclass
class Method:
    """Base of all methods: a dataclass of hyper-parameters.

    A batch of generations is ``begin``, then ``after_prompt`` for every request (by default ``after_prefill`` for each of its layers), then, for
    every decode step, ``between_steps`` and ``attend`` for every layer. Requests have their own lengths.

    ``attend`` may be captured in a CUDA graph that is replayed for other steps and other prompts. So it does not synchronise with the host, its
    shapes and branches follow from hyper-parameters and ``self.shape`` alone (never from ``cache.host_lengths``), and its state lives in
    memory that ``begin`` keeps: see ``buffer``. It reports what it reads to ``self.ledger`` with the same tensors that it gives to
    ``self.kernels``. Whatever cannot obey, such as re-clustering every 128 tokens, belongs in ``between_steps``.
    """

    #: Names of what a method keeps on the host between steps, each a list of plain numbers made by ``begin``.
    host_state = ()
    parts = ()  # where layers are on several devices: the copies that were made by ``part``
    counted_page = 0  # tokens of the pages whose reads are counted as well; 0: they are not. It takes time

    @property
    def prompt_queries(self) -> int:
        """How many of the prompt's last queries ``after_prefill`` needs."""
        return 0

    @property
    def prompt_column_sums(self) -> bool:
        """Whether ``after_prefill`` needs the sums of the whole prompt's attention; they cost about one more q.k pass."""
        return False

    def caution(self, ctx: int) -> str | None:
        """A line for the user if the method has no effect at a context of ``ctx`` tokens."""
        return None

    def check(self, shape: Shape) -> None:
        """Raise a ConfigError if a knob does not go with this shape: asked before anything is computed."""

    def fit(self, rho: float, tokens: int, shape: Shape, generated: float = 1) -> "Method":
        """A copy whose own knob makes rho_bytes equal ``rho`` with ``tokens`` visible ones, by the method's closed form.

        ``generated``: how many of these were not in the prompt, the current one included; both are means over decode steps.

        Raises a ConfigError that names the floor if no value of the knob does. Index lists (4 bytes per id) are left out of the closed forms.
        """
        raise ConfigError("budget", rho, f"does not apply to {label(self)}, whose reads follow from no budget")

    def part(self, shape: Shape, before: "Method | None") -> "Method":
        """A copy for a part of the layers, where these are on several devices; ``before``: that for the layers before them. See spread.py.

        It is called with layers counted from 0. What depends on a layer's place in the model adds ``shape.first``.
        """
        return replace(self)

    def begin(self, shape: Shape, kernels: Kernels, ledger: Ledger) -> None:
        """Forget the previous generations and prepare for ``shape.batch`` of this shape. With the same shape as before, all memory stays in place."""
        # A decoder for another number of requests may come in between: each keeps the memory that its captured step knows.
        stores = self.__dict__.setdefault("_stores", {})
        self._buffers: dict[str, torch.Tensor] = stores.setdefault(shape, {})
        self.shape, self.kernels, self.ledger = shape, kernels, ledger

    def forget(self) -> None:
        """Give all memory back. Steps that were captured before must not be replayed any more."""
        for name in set(self.__dict__) - set(self.__dataclass_fields__):
            del self.__dict__[name]

    def buffer(self, name: str, *size: int, dtype: torch.dtype | None = None, fill: float = 0) -> torch.Tensor:
        """A tensor of this size filled with ``fill``: the same memory every time that ``begin`` asks for it under this name.

        ``dtype``: that of the model, if None.
        """
        if name not in self._buffers:
            self._buffers[name] = torch.empty(size, dtype=dtype or self.shape.dtype, device=self.shape.device)
        return self._buffers[name].fill_(fill)

    def save(self) -> dict[str, object]:
        """A copy of all that ``begin``, ``after_prefill`` and the steps so far have made, for ``restore`` with the same shape."""
        copies: dict[str, object] = {name: list(getattr(self, name)) for name in self.host_state}
        return copies | {"buffers": {name: buffer.clone() for name, buffer in self._buffers.items()}}

    def restore(self, saved: dict[str, object]) -> None:
        """Be where ``save`` was called; the memory stays in place."""
        for name in self.host_state:
            getattr(self, name)[:] = saved[name]
        for name, copy in saved["buffers"].items():
            self._buffers[name].copy_(copy)

    def after_prompt(self, request: int, queries: list[PromptQueries], cache: PagedKVCache) -> None:
        """The prompt's K and V of ``request`` are in the cache: build what decoding needs in all layers, whose queries are listed.

        Layers have the same sizes, and what is launched for all of them at once costs the host little: see ``slices``.
        """
        for layer, own in enumerate(queries):
            self.after_prefill(layer, request, own, cache)

    def slices(self, tokens: int, layers: int | None = None) -> Iterator[slice]:
        """Layers to handle together, so that copies of ``tokens`` keys of each do not fill the memory."""
        layers = self.shape.layers if layers is None else layers
        each = max(1, _MOST_ELEMENTS // max(1, self.shape.kv_heads * tokens * self.shape.head_dim))
        return (slice(first, min(first + each, layers)) for first in range(0, layers, each))

    def after_prefill(self, layer: int, request: int, queries: PromptQueries, cache: PagedKVCache) -> None:
        """The share of one layer in ``after_prompt``. ``queries`` are of that request (batch 1)."""

    def between_steps(self, cache: PagedKVCache) -> None:
        """Called on the host before each decode step, while ``cache.host_lengths`` do not count the new token yet; may synchronise."""

    def attend(self, layer: int, q_pre: torch.Tensor, q: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
        """Attention output [B, Hq, d] of one decode step; q_pre, q: [B, Hq, d]. The tokens' own K and V are in the cache already."""
        raise NotImplementedError

    def dense(self, layer: int, q: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
        """Full attention in this layer, reported: for layers that a method leaves dense."""
        self.ledger.read(layer, visible_span(cache, q.shape[1]))
        return self.kernels.full(q, cache, layer, self.shape.scale)


def label(method: Method) -> str:
    """The name of a method in messages: that of its file."""
    return type(method).__module__.rpartition(".")[2]


def fitted(method: Method, rho: float, tokens: int, knob: str, value: int, least: int, floor: float, why: str) -> Method:
    """A copy with ``knob`` = ``value``; a ConfigError with ``floor``, and why there is one, if that is below ``least``."""
    if value < least:
        floor = math.ceil(1000 * floor) / 1000
        raise ConfigError("budget", rho, f"must be at least {floor:.3f} for {label(method)} at {tokens} tokens, its floor: {why}")
    return replace(method, **{knob: value})


def fixed(rho: float, tokens: int, choices: dict[float, Method]) -> Method:
    """``fit`` of a method that has only a few possible values of rho_bytes, the keys of ``choices``: the nearest, if within 10% of ``rho``."""
    nearest = min(choices, key=lambda ratio: abs(ratio - rho))
    if abs(nearest - rho) > 0.1 * rho:
        name, possible = label(choices[nearest]), " or ".join(f"{ratio:.3f}" for ratio in sorted(choices))
        raise ConfigError("budget", rho, f"must be within 10% of {possible} for {name} at {tokens} tokens; {min(choices):.3f} is its floor")
    return replace(choices[nearest])


def require(holds: bool, method: str, key: str, value: object, allowed: str) -> None:
    """Raise a ConfigError for ``method.key`` unless ``holds``."""
    if not holds:
        large = "integer" in allowed and isinstance(value, int) and value > MOST
        raise ConfigError(f"{method}.{key}", value, f"must be {allowed}{f' and at most {MOST}' if large else ''}")


def require_one_of(method: str, key: str, value: object, choices: tuple) -> None:
    """Raise a ConfigError for ``method.key`` unless the value is among the choices (None is spelled null)."""
    require(value in choices, method, key, value, f"one of {', '.join('null' if c is None else str(c) for c in choices)}")


def is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST
