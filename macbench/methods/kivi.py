"""KIVI: keys quantised per channel, values per token, the newest tokens in full precision.

Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu. arXiv:2402.02750, ICML 2024. Public code (MIT): jy-yuan/KIVI.
"""

from dataclasses import dataclass, replace

import torch
from macbench_kernels import Scheme

from macbench.counting import ELEMENT_BYTES
from macbench.methods.base import Method, fixed, is_int, require
from macbench.methods.stored import Stored

GROUPS = (16, 32, 64, 128)


@dataclass
class KIVI(Method):
    """Attention over all L tokens, most of them dequantised. b = ``bits``, g = ``group``, R = ``residual``, head dimension d.

    A group of g elements (keys: a channel of g consecutive tokens after RoPE; values: g consecutive channels of a token) is stored as

        zero = min, scale = (max - min) / (2^b - 1), both in float16;  code = round_half_even((x - zero) / scale);  x' = code * scale + zero

    With L visible tokens the first Kq = floor((L-1) / R) * R keys and the first Vq = max(0, L-1-R) values are codes, the others are exact:
    the keys of a full residual are quantised as a block before the next step, the oldest of R + 1 values one per step. The prompt's
    attention is exact. As in the public code, no token is protected and no layer is spared.

    Counted per layer and KV head, as kv: (Kq + Vq) * (b d / 8 + 4 d / g) + (2 L - Kq - Vq) * 2 d, scales and zeros included. The
    code of one value row per step is a write, that of a block of R keys every R steps is maint. All tokens are accessed: rho_log = 1.
    Floor of rho_bytes: (b / 8 + 4 / g) / 2, of long texts. R + 2 to 2 R + 1 of the 2 L rows are exact, a sawtooth in L: a budget is held to the
    sums over the expected steps.

    A step takes longer than its bytes: matrix units take no such codes, and each is shifted, masked and converted on its way to them. With 2 bits at
    127K, batch 16, a step of one layer takes 1.66 of the target of 1.3 times its bytes at 2.75 TB/s + 15 us (one H100; docs/methods.md).
    """

    bits: int = 4
    group: int = 32
    residual: int = 128

    host_state = ("_quantised",)
    BITS = (2, 4)

    def __post_init__(self):
        require(self.bits in self.BITS, "method", "bits", self.bits, " or ".join(map(str, self.BITS)))
        require(self.group in GROUPS, "method", "group", self.group, f"one of {', '.join(map(str, GROUPS))}")
        whole = is_int(self.residual, 1) and self.residual % self.group == 0
        require(whole, "method", "residual", self.residual, f"an integer, a positive multiple of method.group={self.group}")

    def fit(self, rho, tokens, shape, generated=1):
        return fixed(rho, tokens, {kivi.ratio(tokens, shape, generated): kivi for kivi in (replace(self, bits=bits) for bits in self.BITS)})

    def ratio(self, tokens, shape, generated=1):
        """rho_bytes over the steps of a text, a ratio of sums: ``tokens`` are visible in the mean, ``generated`` of them its own."""
        first, steps = max(1, round(tokens - generated) + 1), max(1, round(2 * generated - 1))
        lengths = torch.arange(first, first + steps)
        seen, coded = int(lengths.sum()), int(torch.stack(self._stops(lengths)).sum())
        d = shape.head_dim
        return (coded * self._row_bytes(d) + (2 * seen - coded) * d * ELEMENT_BYTES) / (seen * shape.kv_row_bytes)

    def _row_bytes(self, dim):
        return int(Scheme(self.bits, 1, self.group).row_bytes(dim))

    def _stops(self, lengths):
        """Kq and Vq."""
        past = lengths - 1
        return (past // self.residual * self.residual).clamp(min=0), (past - self.residual).clamp(min=0)

    def check(self, shape):
        require(shape.head_dim % self.group == 0, "method", "group", self.group, f"a divisor of the model's head dimension {shape.head_dim}")

    def begin(self, shape, kernels, ledger):
        super().begin(shape, kernels, ledger)
        self.check(shape)
        self._keys, self._values = (
            Stored(self, Scheme(self.bits, self.group, 1), "k", 0), Stored(self, Scheme(self.bits, 1, self.group), "v", 1),
        )  # fmt: skip
        self.codes = list(zip(self._keys.layers, self._values.layers, strict=True))
        self._quantised = [0] * shape.batch  # keys per request, on the host
        self._blocks = self.buffer("blocks", shape.batch, dtype=torch.int32)

    def after_prompt(self, request, queries, cache):
        length = cache.host_lengths[request]
        keys, values = length // self.residual * self.residual, max(0, length - self.residual)
        self._keys.copy(cache, request, 0, keys)
        self._values.copy(cache, request, 0, values)
        self._quantised[request] = keys
        row = self.shape.key_bytes + self._row_bytes(self.shape.head_dim)  # read as it is, written as codes
        self.ledger.prepare(request, self.shape.layers * self.shape.kv_heads * (keys + values) * row)

    def between_steps(self, cache):
        blocks = []
        for request, length in enumerate(cache.host_lengths):
            done, whole = self._quantised[request], length // self.residual * self.residual
            blocks.append(max(0, whole - done) // self.residual)
            if blocks[-1]:
                self._keys.copy(cache, request, done, whole)
                self._quantised[request] = whole
        self._blocks.copy_(torch.tensor(blocks, dtype=torch.int32))

    def attend(self, layer, q_pre, q, cache):
        shape, (k, v) = self.shape, self.codes[layer]
        if layer == 0:  # the same for all layers
            self._k, self._v = self._stops(cache.lengths)
            self._newest = self._v - 1  # the value that has just left the residual
            self._coded = self._k + self._v
            self._exact = 2 * cache.lengths - self._coded
            self._tokens = cache.lengths * shape.q_heads, cache.lengths * shape.kv_heads
            self._wrote = self._v > 0
        self.kernels.quantise_rows(v, cache.values(layer), cache, self._newest)
        self._report(layer)
        return self.kernels.attend_quantised(q, cache, layer, k, v, self._k, self._v, shape.scale).out.to(q.dtype)

    def _report(self, layer):
        heads, dim = self.shape.kv_heads, self.shape.head_dim
        row = heads * self._row_bytes(dim)
        self.ledger.tokens(layer, *self._tokens, plain=False)
        self.ledger.add(layer, "kv", row, self._coded)
        self.ledger.add(layer, "kv", heads * dim * ELEMENT_BYTES, self._exact)
        self.ledger.add(layer, "write", row, self._wrote)
        self.ledger.add(layer, "maint", row * self.residual, self._blocks)
