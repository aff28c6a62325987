"""StreamingLLM: attention sinks and a sliding window.

Xiao, Tian, Chen, Han, Lewis. "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453, ICLR 2024.
"""

from dataclasses import dataclass

import torch
from macbench_kernels import State, merge

from macbench.errors import ConfigError
from macbench.methods.base import Method, fitted, is_int, require, require_one_of


@dataclass
class StreamingLLM(Method):
    """Each token attends the first s = ``sinks`` tokens, the last R = ``recent`` before it, and itself. Nothing is scored.

        read = [0, s) + [L - 1 - R, L),   L visible tokens: s + R + 1 rows per KV head, because the original attends before it evicts

    ``positions``: *original* keeps every token's own position. *cache*, as published, numbers the tokens by their place in the cache:
    the newest is at m = min(L - 1, s + R). Distances within the window stay what they were and sinks keep their places, so that
    equals attending the sinks with the query rotated for position m: no key is rotated again. Null: original in ``mode`` = harness,
    cache in ``mode`` = faithful.

    Counted per layer and step: the rows above; no metadata, no state, no index.
    """

    sinks: int = 4
    recent: int = 1020
    mode: str = "harness"
    positions: str | None = None

    def __post_init__(self):
        require(is_int(self.sinks, 0), "method", "sinks", self.sinks, "an integer of at least 0")
        require(is_int(self.recent, 1), "method", "recent", self.recent, "an integer of at least 1")
        require_one_of("method", "mode", self.mode, ("harness", "faithful"))
        require_one_of("method", "positions", self.positions, (None, "original", "cache"))

    @property
    def rotates(self) -> bool:
        return self.positions == "cache" or (self.positions is None and self.mode == "faithful")

    def caution(self, ctx):
        if ctx <= self.sinks + self.recent + 1:
            return f"streaming_llm keeps {self.sinks + self.recent + 1} tokens; ctx={ctx} runs as full attention"

    def fit(self, rho, tokens, shape, generated=1):
        recent = round(rho * tokens) - self.sinks - 1
        return fitted(self, rho, tokens, "recent", recent, 1, (self.sinks + 2) / tokens, "sinks, one more token and the newest")

    def begin(self, shape, kernels, ledger):
        super().begin(shape, kernels, ledger)
        if self.rotates and shape.rotate is None:
            raise ConfigError("method.positions", "cache", "needs a model whose rotary embedding is known")

    def attend(self, layer, q_pre, q, cache):
        if layer == 0:  # the same for all layers
            stop = cache.lengths[:, None].expand(-1, q.shape[1])
            front = stop.clamp(max=self.sinks)
            start = torch.maximum(stop - 1 - self.recent, front)
            self._spans = torch.stack([torch.zeros_like(front), front, start, stop]).unflatten(0, (2, 2))
            self._place = (cache.lengths - 1).clamp(min=0, max=self.sinks + self.recent)
        self.ledger.read(layer, self._spans)
        scale, attend = self.shape.scale, self.kernels.attend
        if self.rotates:
            placed = self.shape.rotate(q_pre.transpose(0, 1), self._place).transpose(0, 1).to(q.dtype)
            sinks, recent = attend(placed, cache, layer, self._spans[:1], scale), attend(q, cache, layer, self._spans[1:], scale)
            return merge(State(sinks.out[0], sinks.lse[0]), State(recent.out[0], recent.lse[0])).out.to(q.dtype)
        out, lse = attend(q, cache, layer, self._spans, scale)
        return merge(State(out[0], lse[0]), State(out[1], lse[1])).out.to(q.dtype)
