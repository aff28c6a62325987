"""SnapKV: after prefill keep the prompt tokens that its last queries attend to.

Li, Huang, Yang, Venkitesh, Locatelli, Ye, Cai, Lewis, Chen. arXiv:2404.14469, NeurIPS 2024. Public code (Apache-2.0): FasterDecoding/SnapKV.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import avg_pool1d, max_pool1d

from macbench.errors import ConfigError
from macbench.methods.base import Method, fitted, is_int, label, require, require_one_of
from macbench.methods.survivors import Survivors, best
from macbench.methods.votes import window_votes

POOLING = {"max": max_pool1d, "avg": avg_pool1d}


@dataclass
class SnapKV(Method):
    """Eviction once, by the votes of an observation window. c = ``capacity`` tokens, W = ``window``, P prompt tokens, KV head g.

        vote    v[h, i] = sum over the last W prompt queries w of softmax_j(q_hw . k_j / sqrt(d))_i     for i < P - W
        reduce  v[g, i] = sum over the heads h of g (``gqa``: sum, max, or per_q_head = no reduction, a set per query head)
        pool    v'[g]   = max or mean over ``kernel`` neighbours; outside of the prefix is 0
        keep    the c - W best of v'[g], ties to the lowest position, and the last W; everything if P <= c

    Generated tokens are added, nothing is evicted later; all keep their true positions.

    ``mode`` harness: gqa sum. faithful: gqa per_q_head, as in the public code, which stores K and V once per query head; votes stay in
    float32 there too (the public code rounds probabilities to the model's precision).

    Counted per layer and KV head: min(P, c) + generated rows, the current one included; with per_q_head the union over the group. Survivors are
    read compactly, without an index. rho_bytes = (c + generated) / L; the floor is the window: (W + 1 + generated) / L.
    """

    capacity: int = 1024
    window: int = 32
    kernel: int = 7
    pooling: str = "max"
    mode: str = "harness"
    gqa: str | None = None

    def __post_init__(self):
        name = "method"
        require(is_int(self.window, 1), name, "window", self.window, "an integer of at least 1")
        above = is_int(self.capacity, 1) and self.capacity > self.window
        require(above, name, "capacity", self.capacity, f"an integer above method.window={self.window}")
        require(is_int(self.kernel, 1) and self.kernel % 2 == 1, name, "kernel", self.kernel, "an odd integer of at least 1")
        require_one_of(name, "pooling", self.pooling, tuple(POOLING))
        require_one_of(name, "mode", self.mode, ("harness", "faithful"))
        require_one_of(name, "gqa", self.gqa, (None, "sum", "max", "per_q_head"))

    @property
    def prompt_queries(self):
        return self.window

    @property
    def _gqa(self):
        return self.gqa or ("sum" if self.mode == "harness" else "per_q_head")

    def prefix(self, layer: int, prompt: int) -> int:
        """How many of the tokens before the window are kept."""
        return min(prompt, self.capacity) - self.window

    def caution(self, ctx):
        if ctx <= self.capacity:
            return f"{label(self)} keeps {self.capacity} tokens; ctx={ctx} runs as full attention"

    def fit(self, rho, tokens, shape, generated=1):
        if self._gqa == "per_q_head":
            raise ConfigError("budget", rho, f"does not apply to {label(self)} with gqa=per_q_head: the union over a group depends on the text")
        rows, least = rho * tokens, self.window + 1
        why = f"a window of {self.window} tokens, one more, and what is generated"
        capacity = fitted(self, rho, tokens, "capacity", round(rows - generated), least, (least + generated) / tokens, why).capacity
        # A schedule over layers may keep more than its nominal capacity.
        choices = (replace(self, capacity=c) for c in range(max(least, capacity - shape.layers), min(capacity, tokens) + 1))
        return min(choices, key=lambda choice: abs(choice.kept(tokens - generated, shape.layers) + generated - rows))

    def kept(self, prompt: float, layers: int) -> float:
        """Rows that are kept of a prompt, mean over the layers."""
        prompt = int(prompt)
        return sum(min(prompt, self.prefix(layer, prompt) + self.window) for layer in range(layers)) / layers

    def begin(self, shape, kernels, ledger):
        super().begin(shape, kernels, ledger)
        self.survivors = Survivors(self, shape.q_heads if self._gqa == "per_q_head" else shape.kv_heads, shape.max_tokens)

    def after_prompt(self, request, queries, cache):
        prompt, window = cache.host_lengths[request], self.window
        prefixes = [self.prefix(layer, prompt) for layer in range(self.shape.layers)]
        everything = torch.arange(prompt, device=queries[0].q.device)
        voting = sum(prefix < prompt - window for prefix in prefixes)
        if not voting:
            self.survivors.keep(slice(None), request, everything, prompt)
            return
        self.ledger.prepare(request, voting * self.shape.kv_heads * prompt * self.shape.key_bytes)  # the votes read all keys
        votes = window_votes([own.last(window) for own in queries], cache, request, self.shape.scale, self._gqa)[..., :-window]
        ids = best(self.kernels, pooled(votes, self.kernel, self.pooling), prefixes, prompt)
        recent = everything[-window:].expand(*ids.shape[:-1], -1)
        self.survivors.keep(slice(None), request, torch.cat([ids, recent], -1).sort(-1).values, prompt)

    def attend(self, layer, q_pre, q, cache):
        left = self.survivors
        if layer == 0:  # for all layers
            left.grow(cache.lengths)
        ids, counts = left.ids[layer], left.counts[layer]
        self.ledger.selected(layer, ids, counts, 1, cache.lengths, indexed=False, rows=left.rows[layer])
        return self.kernels.attend_selected(q, cache, layer, ids, counts, self.shape.scale).out.to(q.dtype)


def pooled(votes: torch.Tensor, kernel: int, pooling: str) -> torch.Tensor:
    """Over ``kernel`` neighbours of [layers, R, n], of which those outside count 0."""
    return POOLING[pooling](votes, kernel, stride=1, padding=kernel // 2)
