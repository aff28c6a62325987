"""TOVA: token omission via attention, the least attended token goes in every step.

Oren, Hassid, Yarden, Adi, Schwartz. arXiv:2401.06104, EMNLP 2024. Public code (Apache-2.0): schwartz-lab-NLP/TOVA.
"""

from dataclasses import dataclass

import torch
from macbench_kernels import Kernels

from macbench.methods.base import Method, fitted, is_int, require, require_one_of
from macbench.methods.survivors import Survivors, best
from macbench.methods.votes import window_votes


@dataclass
class TOVA(Method):
    """A cache of c = ``capacity`` tokens; whenever it holds more, the one with the least weight in the newest query's attention is evicted.

        weight  w[g, i] = mean over the heads h of KV head g of softmax_j(q_h . k_j / sqrt(d))_i, over the tokens i that are left
        prompt  keep the c highest weights of the last prompt query
        step    attend to what is left and the new token (c + 1 rows), then evict argmin w[g]; nothing is accumulated

    Ties keep the lowest position; all tokens keep their true positions. ``gqa`` mean: as above. layer_shared: the mean is over all query
    heads of the layer, so that all KV heads keep the same tokens. ``mode`` harness: gqa mean, and the newest token is not evicted.
    faithful: layer_shared, and it may be.

    Counted per layer and KV head: c + 1 rows (all, while there are fewer), read compactly without an index. rho_bytes = (c + 1) / L;
    floor: two rows.
    """

    capacity: int = 1024
    mode: str = "harness"
    gqa: str | None = None

    def __post_init__(self):
        require(is_int(self.capacity, 1), "method", "capacity", self.capacity, "an integer of at least 1")
        require_one_of("method", "mode", self.mode, ("harness", "faithful"))
        require_one_of("method", "gqa", self.gqa, (None, "mean", "layer_shared"))

    @property
    def prompt_queries(self):
        return 1

    @property
    def _protected(self):
        """How many of the newest tokens are safe."""
        return 1 if self.mode == "harness" else 0

    def caution(self, ctx):
        if ctx <= self.capacity + 1:
            return f"tova keeps {self.capacity + 1} tokens; ctx={ctx} runs as full attention"

    def fit(self, rho, tokens, shape, generated=1):
        return fitted(self, rho, tokens, "capacity", round(rho * tokens) - 1, 1, 2 / tokens, "one token and the newest")

    def begin(self, shape, kernels, ledger):
        super().begin(shape, kernels, ledger)
        room = self.capacity + 1
        self.survivors = Survivors(self, shape.kv_heads, room)
        self._scores = self.buffer("scores", shape.batch, shape.q_heads, room, dtype=torch.promote_types(shape.dtype, torch.float32))
        self._shared = self.gqa == "layer_shared" or (self.gqa is None and self.mode == "faithful")

    def after_prompt(self, request, queries, cache):
        prompt = cache.host_lengths[request]
        if prompt <= self.capacity:
            self.survivors.keep(slice(None), request, torch.arange(prompt, device=queries[0].q.device), prompt)
            return
        self.ledger.prepare(request, self.shape.layers * self.shape.kv_heads * prompt * self.shape.key_bytes)  # the weights need all keys
        weights = window_votes([own.last(1) for own in queries], cache, request, self.shape.scale, "mean")
        if self._shared:  # groups are of one size
            weights = weights.mean(1, keepdim=True)
        self.survivors.keep(slice(None), request, kept(self.kernels, weights, self.capacity, self._protected), prompt)

    def attend(self, layer, q_pre, q, cache):
        left, scale = self.survivors, self.shape.scale
        if layer == 0:  # for all layers
            left.grow(cache.lengths)
        ids, counts = left.ids[layer], left.counts[layer]
        self.ledger.selected(layer, ids, counts, 1, cache.lengths, indexed=False, rows=left.rows[layer])
        state = self.kernels.attend_selected(q, cache, layer, ids, counts, scale, scores=self._scores)
        self.kernels.least_attended(self._scores, state.lse, ids, counts, cache.lengths, self._protected, left.freed[layer], shared=self._shared)
        return state.out.to(q.dtype)


def kept(kernels: Kernels, weights: torch.Tensor, capacity: int, newest: int) -> torch.Tensor:
    """Positions of the ``capacity`` highest weights [..., n], the ``newest`` in any case: [..., capacity]."""
    n = weights.shape[-1]
    recent = torch.arange(n - newest, n, device=weights.device).expand(*weights.shape[:-1], -1)
    return torch.cat([best(kernels, weights[..., : n - newest], capacity - newest), recent], -1)
