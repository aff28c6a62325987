"""Multipole Attention: exact attention to near clusters of keys, one pseudo-token for every cluster that is far.

Hooper, Zhao, Manolache, Kim, Mahoney, Shao, Keutzer, Gholami. arXiv:2506.13059, NeurIPS 2025. Written from the paper's description; no public
code was used. One level of clusters.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from macbench_kernels import State, kmeans, merge, present, rounded

from macbench.counting import ELEMENT_BYTES
from macbench.errors import ConfigError
from macbench.methods.base import Method, fitted, is_int, require, require_one_of

# Published settings: tokens that are never clustered, tokens clustered at a time, tokens per cluster, tokens clustered together, where queries look
# centroids up, iterations of k-means after the prompt and whenever a block is added.
SINKS = 10
BLOCK = 128
PER_CLUSTER = 16
WINDOW = 8192
LOOKUP = 2048
FIRST_ITERATIONS, ITERATIONS = 10, 3


def layout(prompt: int) -> tuple[int, int]:
    """(tokens that are clustered, tokens behind them that are not) of a prompt."""
    clustered = BLOCK * max(0, (prompt - SINKS) // BLOCK - 1)
    return clustered, max(0, prompt - SINKS - clustered)


def windows(clustered: int) -> list[int]:
    """Sizes of the pieces that are clustered together: WINDOW tokens each, the last 0.5 to 1.5 times that."""
    sizes = []
    while clustered >= WINDOW + WINDOW // 2:
        sizes.append(WINDOW)
        clustered -= WINDOW
    return [*sizes, clustered] if clustered else sizes


@lru_cache(16)  # prompts of a task are of a few lengths, and drawing takes the host a while
def _draws(seed: int, sets: int, n: int, k: int, clusters: int, iterations: int, among: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [sets, k] and [iterations - 1, sets, clusters]."""
    generator = torch.Generator().manual_seed(seed)
    return kmeans.draw(sets, n, k, generator), torch.randint(among, (iterations - 1, sets, clusters), generator=generator)


@dataclass
class Multipole(Method):
    """Per layer and KV head. The first 10 tokens and the last 128 to 255 are always exact; those between are in clusters of 16 on average:
    k-means of the keys without rotation, in windows of 8192 tokens. Cluster i: N_i tokens, key centroid C_i, value centroid V_i.

        x_h    = the query of head h rotated for position 2048, whatever its own
        S[h,i] = exp(x_h.C_i * scale) / sum_j N_j exp(x_h.C_j * scale);   S_g[i] = sum over the group
        near   = clusters in descending S_g while their tokens add up to at most B = ``budget``
        output = softmax over sinks, recent tokens and tokens of near clusters (exact), and for every far cluster one pseudo-token
                 with score x_h.C_i * scale + log N_i and value V_i.   ``replacement`` = False leaves far clusters out

    ``mode`` = *harness*: the cluster that would exceed B ends the list, and a request with no more than B clustered tokens is dense.
    *faithful*: its score (the lowest of all, if nothing exceeds B) is a strict threshold, so ties with it go too, and even an unlimited
    budget leaves one cluster far.

    When 256 tokens are unclustered, the oldest 128 are clustered before the step: 8 new clusters at random ones of them, the others join
    the nearest cluster of the last window, then 3 iterations of k-means there. When that window reaches 12288 tokens, its first 8192
    tokens and 512 clusters are frozen. That happens between steps, as it depends on lengths, and counts as maint: 4 passes over the
    window's keys, one over its values, its centroids written. ``seed`` draws the random tokens, the same for all requests.

    Counted per KV head, layer and step: exact rows; meta: a key centroid (d elements) and a count (4 bytes) per cluster, a value centroid
    (d elements) per far cluster; 4 bytes of idx per token of near clusters. rho_bytes is about (202 + B) / L + (1 - B / 2 L) / 16.

    A step takes 2.79 of the target of 1.3 times its bytes at 2.75 TB/s + 15 us (127K, batch 16, ratio 0.07, one H100; docs/methods.md), because of
    launches, not of bytes: a layer is 313 of them. The list of near clusters ends where their tokens exceed B, so scores of all clusters pass through
    several softmaxes, a sort and running sums, float32 for each head and most of them torch's own, between the reads of key and of value centroids.
    """

    budget: int = 128
    replacement: bool = True
    mode: str = "harness"
    seed: int = 0

    host_state = ("_clustered", "_frozen")

    def __post_init__(self):
        require(is_int(self.budget, 1), "method", "budget", self.budget, "an integer of at least 1")
        require(isinstance(self.replacement, bool), "method", "replacement", self.replacement, "true or false")
        require_one_of("method", "mode", self.mode, ("harness", "faithful"))
        require(is_int(self.seed, 0), "method", "seed", self.seed, "an integer of at least 0")

    def caution(self, ctx):
        exact = SINKS + 2 * BLOCK
        if ctx < exact or (self.mode == "harness" and ctx <= exact + self.budget):
            return f"multipole keeps {exact} tokens exact and has a budget of {self.budget}; ctx={ctx} runs as full attention, or nearly"

    def fit(self, rho, tokens, shape, generated=1):
        exact = SINKS + 1.5 * BLOCK - 0.5  # the mean over a cycle
        share = 1 / PER_CLUSTER if self.replacement else 0.5 / PER_CLUSTER
        saved = 0.5 / PER_CLUSTER if self.replacement else 0.0  # value centroid of a near token's cluster
        budget = round((rho * tokens - exact - share * tokens) / (1 - saved))
        return fitted(self, rho, tokens, "budget", budget, 1, share + (exact + 1) / tokens, "centroids, sinks and recent tokens")

    # -- clusters ------------------------------------------------------------------------------------------------------

    def begin(self, shape, kernels, ledger):
        super().begin(shape, kernels, ledger)
        if shape.rotate is None:
            raise ConfigError("method", "multipole", "needs a model whose rotary embedding is known")
        heads, d = (shape.layers, shape.batch, shape.kv_heads), shape.head_dim
        most = rounded(shape.max_tokens // PER_CLUSTER)
        self.centroids = self.buffer("centroids", *heads, d, most)
        self.values = self.buffer("values", *heads, most, d)
        self.counts = self.buffer("counts", *heads, most, dtype=torch.int32)
        # The tokens of cluster i: members[starts[i]], and N_i - 1 more behind it.
        self.starts = self.buffer("starts", *heads, most, dtype=torch.int32)
        self.members = self.buffer("members", *heads, max(1, shape.max_tokens), dtype=torch.int32)
        self.clustered = self.buffer("clustered", shape.batch, dtype=torch.int32)
        self.clusters = self.buffer("clusters", shape.batch, dtype=torch.int32)
        self.maint = self.buffer("maint", shape.batch, dtype=torch.int64)
        self.lookup = self.buffer("lookup", 1, dtype=torch.int64, fill=LOOKUP)
        self._clustered = [0] * shape.batch  # the same as on the device
        self._frozen = [0] * shape.batch  # tokens in windows that are closed

    def after_prompt(self, request, queries, cache):
        clustered, _ = layout(cache.host_lengths[request])
        # Keys and values read once, however many iterations; two centroids and a count per cluster and a list of the tokens written.
        cluster, sets = self.shape.kv_row_bytes + 4, self.shape.layers * self.shape.kv_heads
        self.ledger.prepare(request, sets * (clustered * (self.shape.kv_row_bytes + 4) + clustered // PER_CLUSTER * cluster))
        for layers in self.slices(clustered):
            at, sets = 0, self._sets(layers)
            for size in windows(clustered):
                points, k = self._points(layers, request, cache, at, at + size), size // PER_CLUSTER
                seeds, anew = self._draws(at, size, k, k, FIRST_ITERATIONS)
                centroids = kmeans.lloyd(points, kmeans.take(points, seeds[sets].to(points.device)), anew[:, sets])
                self._store(layers, request, cache, at, centroids, kmeans.nearest(points, centroids))
                at += size
        self._frozen[request] = clustered - (windows(clustered) or [0])[-1]
        self._set(request, clustered)

    def between_steps(self, cache):
        self.maint.zero_()
        for request, (length, grows) in enumerate(zip(cache.host_lengths, cache.active, strict=True)):
            if length + grows - SINKS - self._clustered[request] >= 2 * BLOCK:
                work = self._absorb(request, cache)
                frozen, clustered = self._frozen[request], self._clustered[request] + BLOCK
                self._frozen[request] = clustered - windows(clustered - frozen)[-1]
                self._set(request, clustered)
                self.maint[request] = work

    def _absorb(self, request, cache) -> int:
        """Cluster the next BLOCK tokens; returns the bytes of one layer's maintenance."""
        start, end = self._frozen[request], self._clustered[request]
        stop, per_block = end + BLOCK, BLOCK // PER_CLUSTER
        *closed, live = windows(stop - start)
        order, anew = self._draws(end, BLOCK, BLOCK, live // PER_CLUSTER, ITERATIONS, live)
        known = slice(start // PER_CLUSTER, end // PER_CLUSTER)
        for layers in self.slices(stop - start):
            sets = self._sets(layers)
            points = self._points(layers, request, cache, start, stop)
            new, chosen = points[:, end - start :], order[sets].to(points.device)
            old = self.centroids[layers, request, :, :, known].mT.flatten(0, 1).to(points.dtype)
            centroids = torch.cat([old, kmeans.take(new, chosen[:, :per_block])], 1)
            held = self.counts[layers, request, :, known].flatten(0, 1).long()
            held = torch.cat([held, torch.ones_like(chosen[:, :per_block])], 1)[..., None]
            others = kmeans.take(new, chosen[:, per_block:])
            average, joined = kmeans.means(others, kmeans.nearest(others, centroids), centroids.shape[1])
            joined = joined[..., None]
            centroids, at = (centroids * held + average * joined) / (held + joined).clamp(min=1), start
            for size in closed:  # tokens of a window that closes may belong to clusters of the one that stays open: they move
                own, points = points[:, :size], points[:, size:]
                shut, centroids = centroids[:, : size // PER_CLUSTER], centroids[:, size // PER_CLUSTER :]
                self._store(layers, request, cache, at, shut, kmeans.nearest(own, shut))
                at += size
            centroids = kmeans.lloyd(points, centroids, anew[:, sets])
            self._store(layers, request, cache, at, centroids, kmeans.nearest(points, centroids))
        rows = 2 * sum(closed) + (ITERATIONS + 2) * live + 2 * ((stop - start) // PER_CLUSTER)
        return self.shape.kv_heads * rows * self.shape.head_dim * ELEMENT_BYTES

    def _sets(self, layers):
        """KV heads of these layers among those of all layers of the model."""
        first, heads = self.shape.first, self.shape.kv_heads
        return slice((first + layers.start) * heads, (first + layers.stop) * heads)

    def _points(self, layers, request, cache, start, stop):
        """Keys of clustered tokens [start, stop), without their rotation: [layers * Hkv, n, d]."""
        keys = cache.stacked(layers, request, SINKS + start, SINKS + stop, 0).flatten(0, 1)
        plain = self.shape.rotate(keys, -torch.arange(SINKS + start, SINKS + stop, device=keys.device))
        return plain.to(torch.promote_types(keys.dtype, torch.float32))

    def _store(self, layers, request, cache, start, centroids, labels):
        """Clusters of the clustered tokens from ``start`` on: centroids [layers * Hkv, k, d], labels [layers * Hkv, n]."""
        heads, n, k = self.shape.kv_heads, labels.shape[1], centroids.shape[1]
        here = slice(start // PER_CLUSTER, start // PER_CLUSTER + k)
        values = cache.stacked(layers, request, SINKS + start, SINKS + start + n, 1).flatten(0, 1)
        average, count = kmeans.means(values.to(centroids.dtype), labels, k)
        members = torch.sort(labels, dim=-1, stable=True).indices
        self.centroids[layers, request, :, :, here] = centroids.mT.unflatten(0, (-1, heads)).to(self.shape.dtype)
        self.values[layers, request, :, here] = average.unflatten(0, (-1, heads)).to(self.shape.dtype)
        self.counts[layers, request, :, here] = count.unflatten(0, (-1, heads)).int()
        self.starts[layers, request, :, here] = (start + count.cumsum(-1) - count).unflatten(0, (-1, heads)).int()
        self.members[layers, request, :, start : start + n] = (SINKS + start + members).unflatten(0, (-1, heads)).int()

    def _set(self, request, clustered):
        self._clustered[request] = clustered
        self.clustered[request] = clustered
        self.clusters[request] = clustered // PER_CLUSTER

    def _draws(self, turn, n, k, clusters, iterations, among=None):
        """Random tokens of all layers, the same for every request: k of n to begin with, and per iteration but the last one of ``among`` (n) for
        each of ``clusters``, should it be empty."""
        return _draws(self.seed * 1_000_003 + turn, self.shape.model_layers * self.shape.kv_heads, n, k, clusters, iterations, among or n)

    # -- attention -----------------------------------------------------------------------------------------------------

    def attend(self, layer, q_pre, q, cache):
        shape, counts = self.shape, self.counts[layer]
        if layer == 0:  # the same for all layers
            self._exact = cache.lengths - self.clustered
            self._dense = self.clustered <= (self.budget if self.mode == "harness" else 0)
            self._scored = torch.where(self._dense, 0, self.clusters).int()
            self._known = (torch.arange(counts.shape[-1], device=q.device) < self._scored[:, None])[:, None]
        placed = shape.rotate(q_pre[:, :, None], self.lookup)[:, :, 0].unflatten(1, (shape.kv_heads, -1))
        filled = self._known & (counts > 0)
        scores = self.kernels.row_scores(placed.to(torch.promote_types(q.dtype, torch.float32)) * shape.scale, self.centroids[layer], self._scored)
        mass = (scores + counts.clamp(min=1).log()[:, :, None]).masked_fill(~filled[:, :, None], float("-inf"))
        total = mass.logsumexp(-1, keepdim=True).clamp(min=-1e30)
        near, order, sizes = self._choose(layer, (scores - total).exp().sum(2), filled)
        taken = sizes.sum(-1)
        ids, amounts = self._tokens(layer, cache, order, sizes, taken)
        state = self.kernels.attend_selected(q, cache, layer, ids, amounts, shape.scale)
        if self.replacement:
            far = mass.masked_fill(near[:, :, None], float("-inf"))
            lse = far.logsumexp(-1)
            weights = (far - lse.clamp(min=-1e30)[..., None]).exp()
            pseudo = State(self.kernels.weigh_rows(weights, self.values[layer]).flatten(1, 2), lse.flatten(1, 2))
            state = merge(state, pseudo)
            self.ledger.add(layer, "meta", shape.head_dim * ELEMENT_BYTES, self._scored[:, None] - near.sum(-1))
        self.ledger.add(layer, "meta", shape.kv_heads * (shape.head_dim * ELEMENT_BYTES + 4), self._scored)
        self.ledger.add(layer, "idx", 4, taken)
        self.ledger.add(layer, "maint", 1, self.maint)
        self.ledger.selected(layer, ids, amounts, 1, cache.lengths, indexed=False)
        return state.out.to(q.dtype)

    def _choose(self, layer, score, filled):
        """near bool [B, Hkv, clusters]; and clusters in descending score [B, Hkv, n] with the number of their tokens if they are near, else 0."""
        order, known = self.kernels.top(score, self.budget + 1, filled)  # every cluster on the list has a token, so one more than B is enough
        listed = torch.arange(order.shape[-1], device=order.device) < known[..., None]
        sizes = self.counts[layer].gather(-1, order.long()) * listed
        over = (sizes.cumsum(-1) > self.budget) & listed
        if self.mode == "harness":
            chosen = listed & ~over
        else:
            ranked = score.gather(-1, order.long())
            first = torch.where(over.any(-1), over.int().argmax(-1), known - 1).clamp(min=0).long()
            chosen = listed & (ranked > ranked.gather(-1, first[..., None]))
        return present(order, chosen, filled.shape[-1]), order, sizes * chosen

    def _tokens(self, layer, cache, order, sizes, taken):
        """ids int32 [B, Hkv, n] and how many: sinks and recent tokens, then those of near clusters; of dense requests simply all."""
        upto = sizes.cumsum(-1)
        index = torch.arange(self.budget, device=order.device, dtype=upto.dtype).expand(*upto.shape[:2], -1).contiguous()
        rank = torch.searchsorted(upto, index, right=True).clamp(max=order.shape[-1] - 1)
        place = self.starts[layer].gather(-1, order.gather(-1, rank).long()) + index - (upto - sizes).gather(-1, rank)
        tokens = self.members[layer].gather(-1, place.clamp(0, self.members[layer].shape[-1] - 1).long())
        i = torch.arange(min(SINKS + 2 * BLOCK + self.budget, self.shape.max_tokens), device=order.device).expand(*upto.shape[:2], -1)
        exact, clustered, dense = (x[:, None, None] for x in (self._exact, self.clustered, self._dense))
        behind = tokens.gather(-1, (i - exact).clamp(0, self.budget - 1))
        always = i + torch.where((i < SINKS) | dense, 0, clustered)
        ids = torch.where((i < exact) | dense, always, behind).int()
        return ids, torch.where(self._dense[:, None], cache.lengths[:, None], self._exact[:, None] + taken).int().clamp(max=ids.shape[-1])
