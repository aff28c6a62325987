"""TidalDecode: tokens chosen in two layers by full attention, used by all layers after them.

Yang, Zhang, Chen, Li, Jia. arXiv:2410.05076, ICLR 2025. Public code (Apache-2.0): DerrickYLJ/TidalDecode.
"""

from dataclasses import dataclass, replace

import torch

from macbench.methods.base import Method, fitted, is_int, require, require_one_of

# Layers that are dense in every model; the last of them makes the first choice.
FIRST = (0, 1, 2)


@dataclass
class TidalDecode(Method):
    """Layers 0, 1, 2 and c = ``reselect`` attend all L visible tokens. In every step layer 2, and again layer c, keep the k = ``budget``
    tokens of largest attention probability; layers 3 .. c-1 and c+1 .. N-1 attend only to their own K and V of those.

        S[g] = top-k over i of  mean over the group of softmax_i(q_h.k_i * scale);   ties go to the lowest token

    ``mode`` = *harness*: one set per KV head (``gqa`` = mean), the newest token is always in it. *faithful*: a set for each query head, by
    its own scores (gqa = per_q_head), the newest token not forced. Null takes what the mode says.

    c is 13 for Llama-3 8B, 7 for Llama-2 7B; no value is published for SmolLM2. Without a layer c, the first choice holds to the end.

    Counted: full layers as full attention (the scores come with it); others k rows per KV head (per_q_head: the union over the group, up to
    G k) and 4 bytes of idx per id. rho_bytes = 4/N + (1 - 4/N) k/L: no budget goes below 4/N.

    The two choosing layers take longer than their bytes: keys are read again for scores, which are written, normalised and searched for the best,
    4 bytes for each head and token at every pass.
    """

    budget: int = 512
    reselect: int = 13
    gqa: str | None = None
    mode: str = "harness"

    def __post_init__(self):
        require(is_int(self.budget, 1), "method", "budget", self.budget, "an integer of at least 1")
        require(is_int(self.reselect, 3), "method", "reselect", self.reselect, "a layer behind layer 2: an integer of at least 3")
        require_one_of("method", "mode", self.mode, ("harness", "faithful"))
        require_one_of("method", "gqa", self.gqa, (None, "mean", "per_q_head"))

    def caution(self, ctx):
        if ctx <= self.budget:
            return f"tidaldecode keeps {self.budget} tokens; ctx={ctx} runs as full attention"

    def check(self, shape):
        allowed = f"a layer of the model behind layer 2, at most {shape.layers - 1}"
        require(self.reselect < shape.layers, "method", "reselect", self.reselect, allowed)

    def fit(self, rho, tokens, shape, generated=1):
        f = len([i for i in {*FIRST, self.reselect} if i < shape.layers]) / shape.layers
        budget = 0 if f == 1 else round((rho - f) / (1 - f) * tokens)
        return fitted(self, rho, tokens, "budget", budget, 1, f + (1 - f) / tokens, "its full layers")

    def part(self, shape, before):
        own = replace(self)
        own.before = before
        return own

    def attend(self, layer, q_pre, q, cache):
        place = self.shape.first + layer
        if place in FIRST or place == self.reselect:
            if place >= FIRST[-1]:
                self._sets = self._select(layer, q, cache)
            return self.dense(layer, q, cache)
        if layer == 0:  # the choice was made on another device
            self._sets = tuple(x.to(q.device) for x in self.before._sets)
        self.ledger.selected(layer, *self._sets, 1, cache.lengths)
        return self.kernels.attend_selected(q, cache, layer, *self._sets, self.shape.scale).out.to(q.dtype)

    def _select(self, layer, q, cache):
        """ids int32 [B, Hkv or Hq, k] and counts."""
        scores = self.kernels.token_scores(q, cache, layer, self.shape.scale, self.shape.max_tokens)
        if (self.gqa or ("per_q_head" if self.mode == "faithful" else "mean")) == "mean":
            scores = scores.softmax(-1).unflatten(1, (self.shape.kv_heads, -1)).mean(2)
        index, length = torch.arange(scores.shape[-1], device=q.device), cache.lengths[:, None]
        if self.mode == "harness":
            scores = scores.masked_fill((index == length - 1)[:, None], float("inf"))
        return self.kernels.top(scores, self.budget, (index < length)[:, None], ordered=False)
