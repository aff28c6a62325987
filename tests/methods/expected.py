"""The bytes and tokens that one layer of one step should count, method by method: the formulas of their docstrings."""

from dataclasses import dataclass

from macbench.methods.multipole import layout


@dataclass
class Seen:
    """One layer of one request in one step, for closed forms: L visible tokens, the shape, and how many of them were the prompt."""

    layer: int
    length: int
    s: object
    prompt: int

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


def quest_counts(m, x):
    pages = -(-x.length // m.page)
    if x.layer in m.dense_layers:
        return x.tokens(x.length)
    write = x.s.kv_heads * x.s.kv_row_bytes
    if pages <= m.pages:
        return x.tokens(x.length, bytes_write=write)
    if m.mode == "faithful" or m.gqa == "per_q_head":
        return {"bytes_meta": pages * write, "bytes_write": write, "bytes_idx": x.ids(m.pages, x.s.q_heads)}
    n = m.pages * m.page - (-x.length % m.page)  # the newest page is partly filled
    return x.tokens(n, bytes_meta=pages * write, bytes_write=write, bytes_idx=x.ids(m.pages))


def oracle_counts(m, x):
    n = min(m.budget, x.length)
    sets = x.s.q_heads if m.variant == "per_q_head" else x.s.kv_heads
    idx = 0 if n == x.length else 4 * sets * n
    if m.variant != "shared":
        return {"bytes_idx": idx} if m.variant == "per_q_head" else {}
    if m.count == "ideal":
        return x.tokens(n, bytes_idx=idx)
    rows = x.s.kv_heads * (x.length + n)
    return {"tokens_log": x.s.q_heads * (x.length + n) // 2, "bytes_kv": rows * x.s.kv_row_bytes // 2, "bytes_idx": idx}


def tidal_counts(m, x):
    if x.layer < 3 or x.layer == m.reselect or x.length <= m.budget:
        return x.tokens(x.length)
    if m.mode == "faithful" or m.gqa == "per_q_head":
        return {"tokens_log": x.s.q_heads * m.budget, "bytes_idx": x.ids(m.budget, x.s.q_heads)}
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


def multipole_counts(m, x):
    clustered, _ = layout(x.prompt)
    absorbed = clustered + (128 if x.length - 10 - clustered >= 256 else 0)
    if absorbed <= (m.budget if m.mode == "harness" else 0):
        return x.tokens(x.length)
    return {}  # how many tokens near clusters have is checked in test_multipole
