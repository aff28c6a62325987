"""The bytes and tokens that one layer of one step should count, method by method: the formulas of their docstrings.

Where a count depends on what is chosen (unions of several heads' sets, pages that are partly filled, clusters of any size), the choice is made
here from its definition, in float64, and never asked of the method.
"""

import math
from dataclasses import dataclass, replace

import torch

from tests.methods.driver import Text, rotate


@dataclass
class Seen:
    """One layer of one request in one step, for closed forms: L visible tokens, the shape, how many of them were the prompt, and the text.

    ``row``: which request of the batch it is. Without a text only what depends on no choice can be told."""

    layer: int
    length: int
    s: object
    prompt: int
    text: Text | None = None
    row: int = 0

    @property
    def weights(self) -> torch.Tensor:
        """Attention probabilities of the newest token, float64 [Hkv, group, L]."""
        q = self.text.q[self.layer, :, self.length - 1].double().unflatten(0, (self.s.kv_heads, -1))
        return (q @ self.text.k[self.layer, :, : self.length].double().mT * self.s.scale).softmax(-1)

    def tokens(self, n, union=None, **bytes_) -> dict:
        """n tokens for each query head; ``union`` rows for each KV head (n, if None)."""
        rows = n if union is None else union
        return {"tokens_log": self.s.q_heads * n, "tokens_phys": self.s.kv_heads * rows, **bytes_}

    def ids(self, n, per_head=None) -> int:
        """Bytes of n ids per KV head (or other number of sets), none if they name everything."""
        return 4 * (per_head or self.s.kv_heads) * n


def full_counts(m, x):
    return x.tokens(x.length)


def mac_counts(m, x):
    """What does not depend on hits: a row of the ring and a stored result (float32 output, lse and depth) are written for every query head."""
    return {"bytes_meta": 0, "bytes_idx": 0, "bytes_write": x.s.q_heads * (2 * x.s.head_dim + 4 * x.s.head_dim + 4 + 4)}


def streaming_counts(m, x):
    return x.tokens(min(x.length, m.sinks + m.recent + 1))


def first_largest(values: torch.Tensor, n: int) -> list[int]:
    """Indices of the n largest; ties go to the lowest index."""
    return sorted(range(len(values)), key=lambda i: (-float(values[i]), i))[:n]


def tokens_of(pages: list[int], size: int, x: Seen) -> set[int]:
    """Visible tokens of pages."""
    return {t for i in pages for t in range(i * size, min((i + 1) * size, x.length))}


def union(sets: list[list[set[int]]]) -> dict:
    """Tokens summed over the query heads, and rows of each group's union. ``sets``: by KV head, of its query heads."""
    return {"tokens_log": sum(len(head) for own in sets for head in own), "tokens_phys": sum(len(set.union(*own)) for own in sets)}


def quest_counts(m, x):
    pages = -(-x.length // m.page)
    if x.layer in m.dense_layers:
        return x.tokens(x.length)
    write = x.s.kv_heads * x.s.kv_row_bytes
    if pages <= m.pages:
        return x.tokens(x.length, bytes_write=write)
    if m.mode == "faithful":
        keys, q = x.text.k[x.layer, :, : x.length].double(), x.text.q[x.layer, :, x.length - 1].double().unflatten(0, (x.s.kv_heads, -1))
        bounds = [torch.maximum(q * part.amin(1)[:, None], q * part.amax(1)[:, None]).sum(-1) for part in keys.split(m.page, 1)]
        sets = [[tokens_of(first_largest(head, m.pages), m.page, x) for head in own] for own in torch.stack(bounds, -1)]
        return union(sets) | {"bytes_meta": pages * write, "bytes_write": write, "bytes_idx": x.ids(m.pages, x.s.q_heads)}
    n = m.pages * m.page - (-x.length % m.page)  # the newest page is partly filled
    return x.tokens(n, bytes_meta=pages * write, bytes_write=write, bytes_idx=x.ids(m.pages))


def oracle_counts(m, x):
    """Sets of tokens of every head, from the probabilities; half a token for a key alone."""
    sets, units = [], 0
    for own in x.weights:
        if m.variant == "page":
            ids = first_largest(torch.stack([part.sum() for part in own.mean(0).split(m.page)]), m.budget // m.page)
            chosen = [tokens_of(ids, m.page, x)] * len(own)
        elif m.variant == "shared":
            ids = first_largest(own.mean(0), m.budget)
            chosen = [set(ids)] * len(own)
        else:
            chosen = [set(first_largest(head, m.budget)) for head in own]
            ids = [t for head in chosen for t in head]
        sets.append(chosen)
        units += len(ids) * (x.length > len(chosen[0]))
    found = union(sets) | {"bytes_idx": 4 * units}
    if m.count == "ideal":
        return found
    kv = (found.pop("tokens_phys") + x.s.kv_heads * x.length) * x.s.kv_row_bytes // 2
    return found | {"tokens_log": (found["tokens_log"] + x.s.q_heads * x.length) // 2, "bytes_kv": kv, "bytes_meta": 0, "bytes_state": 0}


def tidal_counts(m, x):
    if x.layer < 3 or x.layer == m.reselect or x.length <= m.budget:
        return x.tokens(x.length)
    if m.mode == "faithful":
        chosen = replace(x, layer=m.reselect if x.layer > m.reselect else 2).weights
        return union([[set(first_largest(head, m.budget)) for head in own] for own in chosen]) | {"bytes_idx": x.ids(m.budget, x.s.q_heads)}
    return x.tokens(m.budget, bytes_idx=x.ids(m.budget))


def snap_counts(m, x):
    kept = m.prefix(x.layer, x.prompt) + m.window + x.length - x.prompt
    return {"tokens_log": x.s.q_heads * kept} if m._gqa == "per_q_head" else x.tokens(kept)


def tova_counts(m, x):
    return x.tokens(min(x.length, m.capacity + 1))


def h2o_counts(m, x):
    n = min(x.length, m.heavy + m.recent + 1)
    return x.tokens(n, bytes_state=8 * x.s.kv_heads * n)


def kivi_counts(m, x):
    k, v = (x.length - 1) // m.residual * m.residual, max(0, x.length - 1 - m.residual)
    code = m.bits * x.s.head_dim // 8 + 4 * x.s.head_dim // m.group
    exact = (2 * x.length - k - v) * 2 * x.s.head_dim
    flushed = x.length - 1 > x.prompt and (x.length - 1) % m.residual == 0
    write = {"bytes_write": x.s.kv_heads * code * (v > 0), "bytes_maint": x.s.kv_heads * code * m.residual * flushed}
    return x.tokens(x.length, bytes_kv=x.s.kv_heads * ((k + v) * code + exact), **write)


def int8_counts(m, x):
    row = 2 * x.s.head_dim + 8
    return x.tokens(x.length, bytes_kv=x.s.kv_heads * x.length * row, bytes_write=x.s.kv_heads * (row - x.s.kv_row_bytes))


def rocket_counts(m, x):
    prompt = x.prompt
    evicts = prompt > (max(m.size.keep, m.budget) if m.mode == "harness" else m.size.keep)
    left = x.length - (prompt - m.size.keep if evicts else 0)
    write = x.s.kv_heads * (2 if m.size.chunk > 1 else 1) * x.s.head_dim * 2
    if left <= m.size.topk or (m.mode == "harness" and x.length <= m.budget):
        return x.tokens(left, bytes_write=write, bytes_idx=x.ids(left) if evicts else 0)
    meta = x.s.kv_heads * -(-left // m.size.chunk) * m.size.channels * 2
    return x.tokens(m.size.topk, bytes_meta=meta, bytes_write=write, bytes_idx=x.ids(m.size.topk))


def near_clusters(score: list[float], sizes: list[int], budget: int, mode: str) -> list[int]:
    """Clusters in descending score while their tokens add up to at most the budget; *faithful*: those above the first score beyond."""
    order = sorted((i for i, size in enumerate(sizes) if size), key=lambda i: (-score[i], i))
    near, total, threshold = [], 0, score[order[-1]] if order else 0
    for i in order:
        total += sizes[i]
        if total > budget:
            threshold = score[i]
            break
        near.append(i)
    return [i for i in order if score[i] > threshold] if mode == "faithful" else near


def cluster_scores(m, x, g: int) -> tuple[list[float], list[int]]:
    """S_g of every cluster of a KV head, summed over its group, and the clusters' sizes, from the centroids that the method has made."""
    group, d = x.s.q_heads // x.s.kv_heads, x.s.head_dim
    placed = rotate(x.text.q_pre[x.layer, g * group : (g + 1) * group, x.length - 1].double()[:, None], torch.tensor([2048]))[:, 0]
    sizes = m.counts[x.layer][x.row, g, : clustered(x) // 16].double()
    z = placed @ m.centroids[x.layer][x.row, g, :d, : len(sizes)].double() * x.s.scale
    z[:, sizes == 0] = -math.inf
    return (z.exp() / (sizes * z.exp()).sum(1, keepdim=True)).sum(0).tolist(), sizes.int().tolist()


def clustered(x) -> int:
    """Tokens in clusters: 128 at a time, of the prompt all but its first 10 and its last 128 to 255, and then whenever 256 are not."""
    blocks = max(0, (x.prompt - 10) // 128 - 1)
    return 128 * (blocks + max(0, (x.length - 10 - 128 * blocks) // 128 - 1))


def multipole_counts(m, x):
    heads, d, tokens = x.s.kv_heads, x.s.head_dim, clustered(x)
    # 4 passes over the keys of the only window, one over its values, two centroids per cluster written; when the last token came.
    absorbs = tokens > 0 and x.length > x.prompt and x.length - 10 - tokens == 128
    maint = heads * (5 * tokens + 2 * tokens // 16) * 2 * d * absorbs
    if tokens <= (m.budget if m.mode == "harness" else 0):
        return x.tokens(x.length, bytes_maint=maint)
    taken = clusters = 0
    for g in range(heads):
        score, sizes = cluster_scores(m, x, g)
        near = near_clusters(score, sizes, m.budget, m.mode)
        taken, clusters = taken + sum(sizes[i] for i in near), clusters + len(near)
    rows = heads * (x.length - tokens) + taken
    meta = heads * tokens // 16 * (2 * d + 4) + (heads * tokens // 16 - clusters) * 2 * d * m.replacement
    return {"tokens_log": x.s.group * rows, "tokens_phys": rows, "bytes_meta": meta, "bytes_idx": 4 * taken, "bytes_maint": maint}
