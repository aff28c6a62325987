"""A method whose pre-RoPE queries are replaced by a stream with a chosen hit rate: random weights never match by themselves."""

from types import SimpleNamespace

import torch

from macbench.attention.problem import Cell, Stream
from macbench.methods.mac import MAC


class SyntheticMAC(MAC):
    """MAC on made-up queries. ``load`` fills rings and stream once the decoder has begun; ``feed`` puts the next step's in place."""

    def begin(self, shape, kernels, ledger):
        super().begin(shape, kernels, ledger)
        self.inputs = self.buffer("inputs", shape.layers, shape.batch, shape.q_heads, shape.head_dim)
        self.stream, self.step = None, 0

    def load(self, ctx: int, steps: int, hit_rate: float, misses: str, max_gap: int, seed: int) -> None:
        """Rings full of normal queries and states as of ``ctx`` tokens, and queries for ``steps`` steps."""
        s = self.shape
        cell = Cell(
            s.q_heads, s.kv_heads, s.batch, ctx + 1, s.head_dim, window=self.window, band=self.band, tau=self.tau, max_gap=max_gap, dtype=s.dtype
        )
        generator = torch.Generator(s.device).manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=s.device, dtype=torch.float32).to(s.dtype)

        problem = SimpleNamespace(cell=cell, steps=steps, rings=s.layers, generator=generator, device=s.device, normal=normal)
        self.stream = Stream(problem, hit_rate, misses, self.rings).queries

    def feed(self) -> None:
        """Queries come from the model for nothing: call it outside of the clock."""
        self.inputs.copy_(self.stream[self.step])
        self.step += 1

    def attend(self, layer, q_pre, q, cache):
        return super().attend(layer, self.inputs[layer], q, cache)
