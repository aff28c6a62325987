"""Oracle top-k: the k tokens of largest attention probability, chosen with the exact scores. What selectors are measured against."""

from dataclasses import dataclass

import torch

from macbench.methods.base import Method, fitted, is_int, require, require_one_of


@dataclass
class OracleTopK(Method):
    """Softmax over the k = ``budget`` visible tokens of largest attention probability a[h,i]; ties go to the lowest token.

    ``variant``: *shared*, one set per KV head by the mean of a over the group, the bound for methods that share a set; *per_q_head*, a set
    for every head; *page*, the k / ``page`` pages of largest summed a, the bound for Quest. The newest token is not forced.
    It maximises the attention mass that is kept, which is not the same as the smallest output error.

    ``count``: *honest* counts what must be read, all keys and k values: (L + k) / 2 tokens, so rho_bytes = 1/2 + k / (2 L). *ideal* leaves
    the scoring out and counts k tokens, k / L: what a selector would cost whose choice were free. idx: 4 bytes per id.

    A step takes longer than its bytes, whichever are counted: scores of all heads and tokens, 4 bytes each, are written, normalised, meaned and
    searched for the best. With count=honest that is 1.53 of the target of 1.3 times its bytes at 2.75 TB/s + 15 us (127K, batch 16, one H100;
    docs/methods.md).
    """

    budget: int = 512
    variant: str = "shared"
    count: str = "honest"
    page: int = 16

    COUNTS = ("honest", "ideal")

    def __post_init__(self):
        require_one_of("method", "variant", self.variant, ("shared", "per_q_head", "page"))
        require_one_of("method", "count", self.count, self.COUNTS)
        require(is_int(self.page, 1), "method", "page", self.page, "an integer of at least 1")
        require(is_int(self.budget, self.unit), "method", "budget", self.budget, f"an integer of at least {self.unit}")

    @property
    def unit(self) -> int:
        return self.page if self.variant == "page" else 1

    def caution(self, ctx):
        if ctx <= self.budget:
            return f"oracle_topk keeps {self.budget} tokens; ctx={ctx} runs as full attention"

    def fit(self, rho, tokens, shape, generated=1):
        honest = self.count == "honest"
        budget = round((2 * rho - 1 if honest else rho) * tokens / self.unit) * self.unit
        floor, why = (0.5, "the choice reads every key; count=ideal leaves that out") if honest else (0.0, "")
        return fitted(self, rho, tokens, "budget", budget, self.unit, floor + self.unit / tokens * (1 - floor), why or "one token or page")

    def attend(self, layer, q_pre, q, cache):
        shape, unit = self.shape, self.unit
        scores = self.kernels.token_scores(q, cache, layer, shape.scale, shape.max_tokens)
        if self.variant != "per_q_head":
            scores = scores.softmax(-1).unflatten(1, (shape.kv_heads, -1)).mean(2)
        if unit > 1:
            scores = torch.nn.functional.pad(scores, (0, -shape.max_tokens % unit)).unflatten(-1, (-1, unit)).sum(-1)
        valid = torch.arange(scores.shape[-1], device=q.device) * unit < cache.lengths[:, None]
        ids, counts = self.kernels.top(scores, self.budget // unit, valid[:, None], ordered=False)
        self.ledger.selected(layer, ids, counts, unit, cache.lengths, all_keys=self.count == "honest")
        return self.kernels.attend_selected(q, cache, layer, ids, counts, shape.scale, unit).out.to(q.dtype)
