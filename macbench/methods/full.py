"""Full attention: the reference that every other method is measured against."""

from dataclasses import dataclass

from macbench_kernels import visible_span

from macbench.methods.base import Method


@dataclass
class Full(Method):
    """Exact attention of every query head over all L visible tokens. Reads Hkv * L rows per layer and step."""

    def between_steps(self, cache):
        if self.kernels.plan is not None:
            self.kernels.plan(cache, self.shape.q_heads, self.shape.scale)

    def attend(self, layer, q_pre, q, cache):
        if layer == 0:  # the same for all layers
            self._span = visible_span(cache, q.shape[1])
        self.ledger.read(layer, self._span)
        return self.kernels.full(q, cache, layer, self.shape.scale)
