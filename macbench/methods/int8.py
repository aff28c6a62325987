"""INT8 KV cache: one code per element, one scale per token and head. The scheme of vLLM's per-token-head mode (Apache-2.0)."""

from dataclasses import dataclass

from macbench_kernels import Scheme

from macbench.methods.base import Method, fixed
from macbench.methods.stored import Stored


@dataclass
class INT8(Method):
    """Attention over all L tokens, the current one included, whose K and V are stored as symmetric 8-bit codes.

    Per token, KV head and side, with head dimension d:

        scale = max(max |x| / 127, 1e-6) in float32,   code = clip(round_half_even(x / scale), -128, 127),   x' = code * scale

    The prompt is quantised after its exact prefill, every later token when it arrives.

    Counted: Hkv * L * (2 d + 8) bytes as kv (codes and two scales per token); the new row is written in that form too. All tokens are
    accessed (rho_log = 1), so rho_bytes = (2 d + 8) / (4 d), whatever the length. No knob, no other mode.

    Matrix units take no such codes; each is converted on its way to them, and still a step of one layer takes 0.70 of the target of 1.3 times its
    bytes at 2.75 TB/s + 15 us (127K, batch 16, one H100; docs/methods.md).
    """

    def fit(self, rho, tokens, shape, generated=1):
        return fixed(rho, tokens, {self.ratio(shape): self})

    @staticmethod
    def ratio(shape):
        """rho_bytes."""
        return (2 * shape.head_dim + 8) / shape.kv_row_bytes

    def begin(self, shape, kernels, ledger):
        super().begin(shape, kernels, ledger)
        scheme = Scheme(8, 1, shape.head_dim, symmetric=True)
        self._stored = [Stored(self, scheme, name, side) for side, name in enumerate("kv")]
        self.codes = list(zip(*(stored.layers for stored in self._stored), strict=True))
        self._row = shape.kv_heads * int(2 * scheme.row_bytes(shape.head_dim))

    def after_prompt(self, request, queries, cache):
        prompt, shape = cache.host_lengths[request], self.shape
        for stored in self._stored:
            stored.copy(cache, request, 0, prompt)
        # Read as it is, written as codes.
        self.ledger.prepare(request, shape.layers * prompt * (shape.kv_heads * shape.kv_row_bytes + self._row))

    def attend(self, layer, q_pre, q, cache):
        lengths, (k, v), shape = cache.lengths, self.codes[layer], self.shape
        if layer == 0:  # the same for all layers
            self._newest = lengths - 1
            self._tokens = lengths * shape.q_heads, lengths * shape.kv_heads
        self.kernels.quantise_rows(k, cache.keys(layer), cache, self._newest)
        self.kernels.quantise_rows(v, cache.values(layer), cache, self._newest)
        self.ledger.tokens(layer, *self._tokens, plain=False)
        self.ledger.add(layer, "kv", self._row, lengths)
        # The ledger has charged the new row in bf16 already.
        self.ledger.add(layer, "write", self._row - shape.kv_heads * shape.kv_row_bytes)
        return self.kernels.attend_quantised(q, cache, layer, k, v, lengths, lengths, shape.scale).out.to(q.dtype)
