"""One text as full attention wrote it, with the queries of its decode steps and all keys and values."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from macbench.engine import Engine


@dataclass(frozen=True)
class Layer:
    """One layer of a text, in float32.

    ``x``, ``q``: [Hq, n, d], queries before and after RoPE of the positions ``first`` .. ``first + n - 1``. ``k``, ``v``: [Hkv, T, d], all
    T = first + n tokens, keys after RoPE. ``steps``: the last so many queries are the decode steps that are measured. ``scale`` multiplies q.k.
    """

    x: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    first: int
    steps: int
    scale: float

    @property
    def unit(self) -> float:
        """sqrt(2 d): the unit of distances, in which tau is the radius of a hit."""
        return (2 * self.x.shape[-1]) ** 0.5

    @property
    def positions(self) -> torch.Tensor:
        """int64 [steps]: of the tokens that the measured steps process."""
        end = self.first + self.x.shape[1]
        return torch.arange(end - self.steps, end, device=self.x.device)

    def at(self, of: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rows of ``x`` or ``q`` at positions int64 [Hq, m]: [Hq, m, d]."""
        return of.gather(1, (positions - self.first)[..., None].expand(-1, -1, of.shape[-1]))


@contextmanager
def layers(engine: Engine, ids: list[int], steps: int, reach: int) -> Iterator[Iterator[Layer]]:
    """The layers of the text ``ids``, whose last ``steps`` tokens are measured, with the queries of ``reach`` positions before them.

    One exact prefill of the whole text gives what its decode steps saw: every query depends on the tokens before it alone.
    """
    prompt = engine.prefill(ids, steps + reach)

    def each() -> Iterator[Layer]:
        for i, queries in enumerate(own.to(engine.shape.device) for own in prompt.queries):
            parts = zip(*prompt.cache.slice(i, 0, 0, len(ids)), strict=True)
            k, v = (torch.cat(pieces, 1).float().to(engine.shape.device) for pieces in parts)
            yield Layer(queries.q_pre[0].float(), queries.q[0].float(), k, v, queries.first, steps, engine.shape.scale)

    try:
        yield each()
    finally:
        prompt.free()
