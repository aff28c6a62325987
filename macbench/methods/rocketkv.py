"""RocketKV: evict once after the prompt, then choose tokens in every step by bounds of a few channels.

Behnam, Fu, Zhao, Tsai, Yu, Tumanov. arXiv:2502.14051, ICML 2025. Written from the paper's description; no public code was used.
"""

import math
from bisect import bisect
from dataclasses import dataclass
from typing import NamedTuple

import torch
from macbench_kernels import build_bounds, rounded

from macbench.counting import ELEMENT_BYTES
from macbench.errors import ConfigError
from macbench.methods.base import Method, fitted, is_int, require, require_one_of
from macbench.methods.snapkv import pooled
from macbench.methods.survivors import best
from macbench.methods.votes import window_votes

# Constants of the published settings: pooling of votes (tokens), share of the log-compression that stage 1 takes, smallest budget.
KERNEL = 63
SHARE, SHARE_PER_DOUBLING, MOST_SHARE = 0.2, 0.06, 0.8
LEAST_BUDGET = 16


class Sizes(NamedTuple):
    """What the budget becomes: ``keep`` prompt tokens survive stage 1 (``cap`` with the generated ones), stage 2 attends ``topk`` tokens and
    estimates with ``channels`` channels of chunks of ``chunk`` tokens; ``ratio`` is the compression that is left for stage 2."""

    cap: int
    keep: int
    topk: int
    ratio: float
    chunk: int
    channels: int


def sizes(total: int, max_new: int, head_dim: int, budget: int) -> Sizes:
    """Both stages from one budget: ``total`` tokens are compressed c = total / budget times, c^e of it by stage 1."""
    c = max(1.0, total / budget)
    e = min(SHARE + SHARE_PER_DOUBLING * math.log2(c), MOST_SHARE)
    cap = max(math.floor(total / c**e), min(2 * max_new, total))
    ratio = max(1.0, cap / budget)
    chunk = math.ceil(math.sqrt(ratio))
    if chunk > ratio:
        chunk = 1
    return Sizes(cap, cap - max_new, budget // 2, ratio, chunk, math.floor(head_dim * chunk / ratio))


@dataclass
class RocketKV(Method):
    """Sizes follow from b = ``budget``, S = the most tokens a request may see, ``max_new`` and d: c = S / b, e = min(.2 + .06 log2 c, .8),

        cap = max(S / c^e, min(2 max_new, S)),  keep = cap - max_new,  topk = b / 2,
        c2 = max(1, cap / b),  chunk = ceil(sqrt c2) (1 if that exceeds c2),  r = d chunk / c2

    Stage 1, after prompts of P > keep tokens, per KV head: v[i] = attention that token i < P - W receives from the last W = ``window``
    queries of the whole group, max-pooled over 63 tokens; the keep - W of largest v and the last W stay. Everyone keeps its position.

    Stage 2, every step, over the M tokens that are left, in chunks j of consecutive ones with bounds mn, mx of their keys:

        sgn[d] = +1 if sum_h q[h,d] > 0 else -1;   bd[j] = mx[j] where sgn = +1, mn[j] where -1;   I = the r channels of largest mean_h |q[h,d]|
        u[h,j] = sum over I of q[h,d] bd[j,d];     tau[h] = sqrt(d * sum over I of |q[h]| / sum |q[h]|)
        s[j]   = mean over h of softmax over tokens (u[h] / tau[h]);   attend the topk tokens of largest s exactly; ties to the first

    ``mode`` = *harness*: the newest token takes the place of the last choice, and requests of no more than b tokens lose nothing and
    attend everything. *faithful*: neither. There a whole prompt is kept and attended only up to keep, and up to topk, tokens.

    Counted per KV head, layer and step: topk rows; r * ceil(M / chunk) elements of meta, read from channel-major bounds; 4 bytes of idx
    per chosen token; the bounds of one chunk written. That is about b rows in all: the budget is traffic, not attended tokens.
    Votes belong to prefill and are not counted. S is the run's context, not that of a request, so that shapes stay the same.

    A step takes longer than its bytes: between its two reads the scores of all chunks pass through a softmax and a search for the best, one
    program per KV head each, in launches that wait for one another. Its bytes pay for none of that: 1.47 of the target of 1.3 times its bytes at
    2.75 TB/s + 15 us (127K, batch 16, budget 0.05, one H100; docs/methods.md).
    """

    budget: int = 1024
    window: int = 32
    max_new: int = 128
    mode: str = "harness"

    def __post_init__(self):
        require(is_int(self.budget, LEAST_BUDGET), "method", "budget", self.budget, f"an integer of at least {LEAST_BUDGET}")
        require(is_int(self.window, 1), "method", "window", self.window, "an integer of at least 1")
        require(is_int(self.max_new, 1), "method", "max_new", self.max_new, "an integer of at least 1")
        require_one_of("method", "mode", self.mode, ("harness", "faithful"))

    @property
    def prompt_queries(self):
        return self.window

    def caution(self, ctx):
        if self.mode == "harness" and ctx <= self.budget:
            return f"rocketkv has a budget of {self.budget} tokens; ctx={ctx} runs as full attention"

    def fit(self, rho, tokens, shape, generated=1):
        least = self._rows(LEAST_BUDGET, tokens, shape, generated)
        budget = bisect(range(tokens + 1), rho * tokens, lo=LEAST_BUDGET, key=lambda b: self._rows(b, tokens, shape, generated))
        if rho * tokens < least:
            budget = 0
        return fitted(self, rho, tokens, "budget", budget, LEAST_BUDGET, least / tokens, f"{LEAST_BUDGET} tokens, and their estimate")

    def _rows(self, budget, tokens, shape, generated):
        """What a step reads with ``budget``, in rows: about as many, but what is estimated grows with the generated tokens."""
        size = sizes(max(shape.max_tokens, tokens), self.max_new, shape.head_dim, budget)
        left = min(tokens - generated, size.keep) + generated
        return size.topk + size.channels * left / size.chunk / (2 * shape.head_dim)

    def check(self, shape):
        keep = sizes(shape.max_tokens, self.max_new, shape.head_dim, self.budget).keep
        if keep < self.window:
            at = f"{max(0, keep)} prompt tokens at ctx={shape.max_tokens} with method.max_new={self.max_new}"
            raise ConfigError("method.budget", self.budget, f"leaves {at}; must be at least method.window={self.window}")

    def begin(self, shape, kernels, ledger):
        super().begin(shape, kernels, ledger)
        self.check(shape)
        size = self.size = sizes(shape.max_tokens, self.max_new, shape.head_dim, self.budget)
        heads = (shape.batch, shape.kv_heads)
        sides = 1 if size.chunk == 1 else 2  # the bounds of a single key are the key
        chunks = rounded(-(-shape.max_tokens // size.chunk))
        self.bounds = self.buffer("bounds", shape.layers, *heads, sides * shape.head_dim, chunks)
        # The i-th token that is left is token kept[i], or i + removed behind those.
        self.kept = self.buffer("kept", shape.layers, *heads, size.keep, dtype=torch.int32)
        self.removed = self.buffer("removed", shape.batch, dtype=torch.int32)
        # The most tokens that a step attends.
        self._room = min(max(size.topk, self.budget) if self.mode == "harness" else size.topk, shape.max_tokens)

    def after_prompt(self, request, queries, cache):
        shape, n, keep, kept = self.shape, cache.host_lengths[request], self.size.keep, self.kept[:, request]
        evicts = n > (max(keep, self.budget) if self.mode == "harness" else keep)
        self.removed[request] = n - keep if evicts else 0
        kept.copy_(torch.arange(keep, device=kept.device).expand_as(kept))
        if evicts:
            votes = window_votes([own.last(self.window) for own in queries], cache, request, shape.scale, "sum")[..., : -self.window]
            kept[..., : keep - self.window] = best(self.kernels, pooled(votes, KERNEL, "max"), keep - self.window)
            kept[..., keep - self.window :] += n - keep
        for layers in self.slices(n):
            keys = cache.stacked(layers, request, 0, n, 0)
            if evicts:
                keys = keys.gather(2, kept[layers].long()[..., None].expand(-1, -1, -1, shape.head_dim))
            build_bounds(self.bounds[layers, request], keys, self.size.chunk)
        # All keys read, bounds of the chunks that are left written.
        chunks = -(-keys.shape[2] // self.size.chunk)
        bounds = chunks * self.bounds.shape[3] * ELEMENT_BYTES
        self.ledger.prepare(request, shape.layers * shape.kv_heads * (n * shape.key_bytes + bounds))

    def attend(self, layer, q_pre, q, cache):
        shape, size, bounds = self.shape, self.size, self.bounds[layer]
        if layer == 0:  # the same for all layers
            self._prepare(cache)
        self.kernels.extend_bounds(bounds, cache, layer, size.chunk, self.removed)
        scores = self._chunk_scores(q, bounds)
        args = (self._counts, size.chunk, self._room, self.mode == "harness", self.kept[layer], self.removed)
        ids, places = self.kernels.top_tokens(scores, self._left, *args)
        self.ledger.add(layer, "meta", shape.kv_heads * size.channels * ELEMENT_BYTES, self._scored)
        self.ledger.add(layer, "write", shape.kv_heads * bounds.shape[2] * ELEMENT_BYTES)
        self.ledger.selected(layer, ids, self._counts, 1, cache.lengths, store=(places, self._left))
        return self.kernels.attend_selected(q, cache, layer, ids, self._counts, shape.scale).out.to(q.dtype)

    def _prepare(self, cache):
        size = self.size
        left = self._left = cache.lengths - self.removed  # M
        all_of_it = left <= size.topk
        if self.mode == "harness":
            all_of_it = all_of_it | (cache.lengths <= self.budget)
        self._counts = torch.where(all_of_it, left, size.topk)[:, None].expand(-1, self.shape.kv_heads).contiguous()
        chunks = (left + size.chunk - 1) // size.chunk
        self._scored = torch.where(all_of_it, 0, chunks).int()

    def _chunk_scores(self, q, bounds):
        """s [B, Hkv, chunks]: the mean probability of a token of each chunk; all equal for requests that attend everything."""
        both = bounds.shape[2] > self.shape.head_dim
        weights, rows = self.kernels.strong_channels(q, self.shape.kv_heads, self.size.channels, both)
        return self.kernels.mean_probability(self.kernels.row_scores(weights, bounds, self._scored, rows), self._left, self.size.chunk)
