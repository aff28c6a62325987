"""Full attention: the reference that every other method is measured against."""

from dataclasses import dataclass

import torch

from macbench.methods.base import Method


@dataclass
class Full(Method):
    """Exact attention of every query head over all L visible tokens. Reads Hkv * L rows per layer and step."""

    def attend(self, layer, q_pre, q, cache):
        stop = cache.lengths[:, None].expand(-1, q.shape[1])
        spans = torch.stack([torch.zeros_like(stop), stop])[None]
        self.ledger.read(layer, spans)
        return self.kernels.attend(q, cache, layer, spans, self.shape.scale).out[0].to(q.dtype)
