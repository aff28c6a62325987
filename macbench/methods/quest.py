"""Quest: pages whose key bounds promise the largest scores for this query.

Tang, Zhao, Zhu, Xiao, Kasikci, Han. arXiv:2406.10774, ICML 2024. Public code (MIT): mit-han-lab/Quest.
"""

from dataclasses import dataclass, replace

import torch
from macbench_kernels import build_bounds, rounded

from macbench.methods.base import Method, fitted, is_int, require, require_one_of

GQA = (None, "sum", "max", "mean_query", "per_q_head")


@dataclass
class Quest(Method):
    """Per layer and KV head g with query heads h of its group, pages j of p = ``page`` tokens; L visible tokens, B = ``budget``.

        mn[g,j], mx[g,j] = channelwise minimum and maximum of the page's keys (after RoPE), kept up to date with every new token
        U[h,j]  = sum_d max(q[h,d] mn[g,j,d], q[h,d] mx[g,j,d])  >=  max over the page of q[h].k
        kept    = the max(B / p, ``min_pages``) pages of largest U_g[j] = sum over the group of U[h,j]; ties go to the lowest page

    ``gqa`` = *sum* needs only two products per KV head, whatever the group: U_g[j] = <sum_h relu(q_h), mx> - <sum_h relu(-q_h), mn>.
    *max* is the largest of the group; *mean_query* scores the mean query, which bounds nothing; *per_q_head* lets every head choose.
    ``mode`` = *harness*: the page of the newest token is always kept, inside the budget, and gqa = sum. *faithful*, the code behind the
    published accuracy: gqa = per_q_head, and the newest page is one like any other. With ``min_pages`` = 1, harness keeps as many
    pages as the published CUDA kernels. ``dense_layers`` attend everything.

    Counted per sparse layer and step: rows of the kept pages (per_q_head: their union over the group), 2 d elements of meta for each of the
    ceil(L / p) pages of every KV head, 4 bytes of idx per kept page, and the bounds of one page written. With no more than
    max(B / p, min_pages) pages nothing is scored, and the layer counts as dense.
    """

    budget: int = 1024
    page: int = 16
    dense_layers: tuple[int, ...] = (0, 1)
    min_pages: int = 3
    gqa: str | None = None
    mode: str = "harness"

    def __post_init__(self):
        require(is_int(self.page, 1), "method", "page", self.page, "an integer of at least 1")
        require(is_int(self.min_pages, 1), "method", "min_pages", self.min_pages, "an integer of at least 1")
        require(is_int(self.budget, self.page), "method", "budget", self.budget, f"an integer of at least one page, {self.page} tokens")
        listed = isinstance(self.dense_layers, (list, tuple)) and all(is_int(i, 0) for i in self.dense_layers)
        require(listed, "method", "dense_layers", self.dense_layers, "a list of layers, counted from 0")
        require_one_of("method", "mode", self.mode, ("harness", "faithful"))
        require_one_of("method", "gqa", self.gqa, GQA)
        self.dense_layers = tuple(self.dense_layers)

    @property
    def pages(self) -> int:
        return max(self.budget // self.page, self.min_pages)

    def caution(self, ctx):
        if ctx <= self.pages * self.page:
            return f"quest keeps {self.pages} pages of {self.page} tokens; ctx={ctx} runs as full attention"

    def check(self, shape):
        most = max(self.dense_layers, default=0)
        require(most < shape.layers, "method", "dense_layers", list(self.dense_layers), f"layers of the model, 0 to {shape.layers - 1}")

    def fit(self, rho, tokens, shape, generated=1):
        f = len([i for i in set(self.dense_layers) if i < shape.layers]) / shape.layers
        budget = 0 if f == 1 else int((rho - f) / (1 - f) * tokens - tokens / self.page) // self.page * self.page
        least = self.min_pages * self.page
        floor = f + (1 - f) * (1 / self.page + least / tokens)
        return fitted(self, rho, tokens, "budget", budget, least, floor, "dense layers, the bounds of all pages and the fewest pages")

    def part(self, shape, before):
        dense = (i - shape.first for i in self.dense_layers)
        return replace(self, dense_layers=tuple(i for i in dense if 0 <= i < shape.layers))

    def begin(self, shape, kernels, ledger):
        super().begin(shape, kernels, ledger)
        size = (shape.batch, shape.kv_heads, 2 * shape.head_dim, rounded(-(-shape.max_tokens // self.page)))
        self._bounds = self.buffer("bounds", shape.layers, *size)
        self.bounds = {i: self._bounds[i] for i in range(shape.layers) if i not in self.dense_layers}

    def after_prompt(self, request, queries, cache):
        n, shape = cache.host_lengths[request], self.shape
        for layers in self.slices(n):  # also of dense layers, which costs less than to launch the others one by one
            build_bounds(self._bounds[layers, request], cache.stacked(layers, request, 0, n, 0), self.page)
        # All keys read, a row of bounds written for every page.
        heads = len(self.bounds) * shape.kv_heads
        self.ledger.prepare(request, heads * (n * shape.key_bytes + -(-n // self.page) * shape.kv_row_bytes))

    def attend(self, layer, q_pre, q, cache):
        if layer not in self.bounds:
            return self.dense(layer, q, cache)
        bounds, shape = self.bounds[layer], self.shape
        if layer == min(self.bounds):  # the same for all layers
            pages = (cache.lengths + self.page - 1) // self.page
            self._scored = pages * (pages > self.pages)
            index = torch.arange(bounds.shape[-1], device=q.device)
            self._valid = (index < pages[:, None])[:, None]
            self._newest = (index == pages[:, None] - 1)[:, None]
        self.kernels.extend_bounds(bounds, cache, layer, self.page)
        scores = self._scores(q, bounds)
        if self.mode == "harness":
            scores = scores.masked_fill(self._newest, float("inf"))
        ids, counts = self.kernels.top(scores, self.pages, self._valid, ordered=False)
        self.ledger.add(layer, "meta", shape.kv_heads * shape.kv_row_bytes, self._scored)
        self.ledger.add(layer, "write", shape.kv_heads * shape.kv_row_bytes)
        self.ledger.selected(layer, ids, counts, self.page, cache.lengths)
        return self.kernels.attend_selected(q, cache, layer, ids, counts, shape.scale, self.page).out.to(q.dtype)

    def _scores(self, q, bounds):
        """[B, Hkv or Hq, pages]: the bound of every page, -inf for those of requests that keep all."""
        grouped = q.unflatten(1, (self.shape.kv_heads, -1)).to(torch.promote_types(q.dtype, torch.float32))
        gqa = self.gqa or ("per_q_head" if self.mode == "faithful" else "sum")
        if gqa == "mean_query":
            grouped = grouped.mean(2, keepdim=True)
        weights = torch.cat([grouped.clamp(min=0), grouped.clamp(max=0)], -1)  # of the maxima, and of the minima
        if gqa == "sum":
            weights = weights.sum(2, keepdim=True)
        scores = self.kernels.row_scores(weights, bounds, self._scored)
        return scores.flatten(1, 2) if gqa == "per_q_head" else scores.amax(2)
