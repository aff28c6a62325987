"""Full attention: the reference that every other method is measured against."""

from dataclasses import dataclass

from macbench_kernels import visible_span

from macbench.methods.base import Method


@dataclass
class Full(Method):
    """Exact attention of every query head over all L visible tokens. Reads Hkv * L rows per layer and step."""

    def attend(self, layer, q_pre, q, cache):
        self.ledger.read(layer, visible_span(cache, q.shape[1]))
        return self.kernels.full(q, cache, layer, self.shape.scale)
