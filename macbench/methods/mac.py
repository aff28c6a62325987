"""MAC-Attention: match a recent query, amend its stored attention state, complete it with the tokens since.

Yao, Jacobs, Krichene, Tanaka, Panda. arXiv:2604.00235, MLSys 2026. Public code (Apache-2.0): YJHMITWEB/MAC-Attention.
"""

import math
from dataclasses import dataclass

import torch
from macbench_kernels import MacParams, Ring

from macbench.counting import ELEMENT_BYTES
from macbench.methods.base import Method, is_int, require

# What a ring record holds besides the query: o in float32, lse (float32) and chain depth (int32).
_RECORD_EXTRA_BYTES = 4 + 4


@dataclass
class MAC(Method):
    """Reuse of recent attention states, per layer and query head h.

    Symbols: position t (L = t + 1 tokens visible), ring of the last K = ``window`` positions, band r = ``band``, front sink
    F = ``sink``, radius factor tau = ``tau``, head dimension d. The ring entry of position p is its pre-RoPE query x_p with
    S_p, the state (o, lse) over the keys [F, p+1-r).

        match     p = argmin_p ||x_t - x_p||_2 over eligible entries;  hit iff ||x_t - x_p|| < tau * sqrt(2 d)
        amend     a = p+1-r on a hit, else a = F:   M = state of q_t over [a, t+1-r)
        complete  B = state of q_t over [t+1-r, t],  C = over the sinks [0, F)
                  S_t = merge(S_p, M) on a hit, else M;   output = merge(S_t, B, C)
        append    entry of t := (x_t, S_t), which again covers [F, t+1-r)

    A hit reads exactly [p+1-r, t] and [0, F); a miss reads [0, t]. Both scan the ring. The prompt's last K queries fill the ring
    with exact states. Eligible are entries with a non-empty range (p >= F + r) and, with ``max_chain`` = c, those built on fewer
    than c reuses; below ``min_context`` visible tokens no match is tried and nothing is scanned.

    The public code's MAC_THRESHOLD T is stricter when larger: tau = 1 - T. Its default T = 0.45 is tau = 0.55 here.

    Counted per step and layer: scanned ring rows d*2 bytes each per query head (plus 4 for the depth if ``max_chain`` is set), for
    each hit one record of d*4 + 4 (lse) + 4 (depth) bytes, and Hq * (d*2 + d*4 + 8) bytes written.
    """

    tau: float = 0.45
    window: int = 512
    band: int = 256
    sink: int = 0
    min_context: int = 2048
    max_chain: int | None = None

    def __post_init__(self):
        number = isinstance(self.tau, (int, float)) and not isinstance(self.tau, bool)
        require(number and math.isfinite(self.tau) and self.tau >= 0, "method", "tau", self.tau, "a number of at least 0")
        require(is_int(self.window, 1), "method", "window", self.window, "an integer of at least 1")
        require(is_int(self.band, 1), "method", "band", self.band, "an integer of at least 1")
        require(is_int(self.sink, 0), "method", "sink", self.sink, "an integer of at least 0")
        require(is_int(self.min_context, 0), "method", "min_context", self.min_context, "an integer of at least 0")
        require(self.max_chain is None or is_int(self.max_chain, 0), "method", "max_chain", self.max_chain, "null or an integer of at least 0")

    @property
    def prompt_queries(self):
        return self.window

    def caution(self, ctx):
        if ctx < self.min_context:
            return f"mac matches nothing below method.min_context={self.min_context} tokens; ctx={ctx} runs as full attention"

    def begin(self, shape, kernels, ledger):
        super().begin(shape, kernels, ledger)
        radius = self.tau * math.sqrt(2 * shape.head_dim)
        self.params = MacParams(radius, self.band, self.sink, self.min_context, self.max_chain)
        rows = (shape.batch, shape.q_heads, self.window)
        precise = torch.promote_types(shape.dtype, torch.float32)
        self.rings = [
            Ring(
                self.buffer(f"q{i}", *rows, shape.head_dim),
                self.buffer(f"out{i}", *rows, shape.head_dim, dtype=precise),
                self.buffer(f"lse{i}", *rows, dtype=precise, fill=float("-inf")),
                self.buffer(f"depth{i}", *rows, dtype=torch.int32),
            )
            for i in range(shape.layers)
        ]

    def after_prefill(self, layer, request, queries, cache):
        queries = queries.last(self.window)
        first = queries.first - self.band
        state = self.kernels.causal(queries.q, cache, layer, first, self.shape.scale, lo=self.sink, request=request)
        rows = max(0, queries.first + queries.q.shape[2] - self.band - self.sink)  # that states of the ring cover
        entries = queries.q.shape[2] * self.shape.q_heads * (self.shape.head_dim * (ELEMENT_BYTES + 4) + _RECORD_EXTRA_BYTES)
        self.ledger.prepare(request, self.shape.kv_heads * rows * self.shape.kv_row_bytes + entries)
        self.rings[layer].fill(request, queries.q_pre, state, queries.first)

    def attend(self, layer, q_pre, q, cache):
        step = self.kernels.mac_step(q_pre, q, cache, layer, self.rings[layer], self.params, self.shape.scale)
        self._report(layer, step)
        return step.out

    def _report(self, layer, step):
        heads, dim = self.shape.q_heads, self.shape.head_dim
        row = dim * ELEMENT_BYTES + (4 if self.max_chain is not None else 0)
        record = dim * 4 + _RECORD_EXTRA_BYTES
        self.ledger.read(layer, step.spans)
        self.ledger.matched(layer, step.hit, step.chain)
        self.ledger.add(layer, "state", heads * row, step.scanned)
        self.ledger.add(layer, "state", record, step.looked_up)
        self.ledger.add(layer, "write", heads * (dim * ELEMENT_BYTES + record))
