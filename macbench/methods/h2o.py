"""H2O: keep the tokens that have received most attention so far, and the most recent ones.

Zhang, Sheng, Zhou, Chen, Zheng, Cai, Song, Tian, Re, Barrett, Wang, Chen. arXiv:2306.14048, NeurIPS 2023. Written from the description alone.
"""

from dataclasses import dataclass, replace

import torch

from macbench.methods.base import Method, fitted, is_int, require
from macbench.methods.survivors import Survivors
from macbench.methods.tova import kept


@dataclass
class H2O(Method):
    """Heavy hitters H = ``heavy``, recent tokens R = ``recent``, P prompt tokens, KV head g.

        prompt  a[g, i] = sum over the heads h of g and all prompt queries j >= i of softmax_j(q_hj . k / sqrt(d))_i
                keep the H best of the first P - R and the last R; everything if P <= H + R
        step    attend to what is left and the new token (H + R + 1 rows), add its probabilities (summed over the group) to a,
                then evict argmin a[g] among all but the newest R

    Sums are float32, not normalised by how many queries saw a token, which favours early ones as in the paper; what is evicted loses
    its score. Tokens keep their true positions. Ties keep the lowest position. The paper's models have one query head per KV head; the sum over a
    group is ours. There is no other mode: the public simulation of short tasks ranks by attention from the future.

    Counted per layer and KV head, with n = min(L, H + R + 1): n rows, read compactly without an index, and as state 8 n bytes, float32 scores
    read and written.
    rho_bytes = (H + R + 1) (4 d + 8) / (4 d L); floor: three rows (H = R = 1).
    """

    heavy: int = 512
    recent: int = 512

    def __post_init__(self):
        require(is_int(self.heavy, 1), "method", "heavy", self.heavy, "an integer of at least 1")
        require(is_int(self.recent, 1), "method", "recent", self.recent, "an integer of at least 1")

    @property
    def prompt_column_sums(self):
        return True

    def caution(self, ctx):
        if ctx <= self.heavy + self.recent + 1:
            return f"h2o keeps {self.heavy + self.recent + 1} tokens; ctx={ctx} evicts nothing"

    def fit(self, rho, tokens, shape, generated=1):
        row = 1 + 8 / shape.kv_row_bytes  # a row and its score, in rows
        capacity = round(rho * tokens / row) - 1
        fitted(self, rho, tokens, "recent", capacity, 2, 3 * row / tokens, "a heavy hitter, a recent token and the newest")
        heavy = min(max(1, round(capacity * self.heavy / (self.heavy + self.recent))), capacity - 1)
        return replace(self, heavy=heavy, recent=capacity - heavy)

    def begin(self, shape, kernels, ledger):
        super().begin(shape, kernels, ledger)
        room = self.heavy + self.recent + 1
        self.survivors = Survivors(self, shape.kv_heads, room)
        precise = torch.promote_types(shape.dtype, torch.float32)
        self.received = self.buffer("received", shape.layers, shape.batch, shape.kv_heads, room, dtype=precise)  # a, at the places of the lists
        self._scores = self.buffer("scores", shape.batch, shape.q_heads, room, dtype=precise)

    def after_prompt(self, request, queries, cache):
        prompt, sums = cache.host_lengths[request], torch.stack([own.column_sums for own in queries])
        left = torch.arange(prompt, device=sums.device).expand(*sums.shape[:-1], -1)
        if prompt > self.heavy + self.recent:
            left = kept(self.kernels, sums, self.heavy + self.recent, self.recent)
        # Sums over the prompt's attention take another pass over its keys; what is left keeps a float32 score.
        heads = self.shape.layers * self.shape.kv_heads
        self.ledger.prepare(request, heads * (prompt * self.shape.key_bytes + left.shape[-1] * 4))
        self.survivors.keep(slice(None), request, left, prompt)
        self.received[:, request, :, : left.shape[-1]] = sums.gather(-1, left)

    def attend(self, layer, q_pre, q, cache):
        left = self.survivors
        if layer == 0:  # for all layers
            left.grow(cache.lengths)
            self.received.scatter_(-1, left.slot[..., None], 0)
        ids, counts = left.ids[layer], left.counts[layer]
        self.ledger.selected(layer, ids, counts, 1, cache.lengths, indexed=False, rows=left.rows[layer])
        self.ledger.add(layer, "state", 8, counts)
        state = self.kernels.attend_selected(q, cache, layer, ids, counts, self.shape.scale, scores=self._scores)
        self.kernels.least_attended(self._scores, state.lse, ids, counts, cache.lengths, self.recent, left.freed[layer], self.received[layer])
        return state.out.to(q.dtype)
