"""Quantised copies of K and V: rectangular groups of integer codes with a scale and perhaps a zero each, and attention that reads them.

One scheme serves all methods, because they differ only in the shape of a group (tokens x channels):
KIVI's keys are 32 x 1 (per channel), its values 1 x 32 (per token), INT8 is 1 x d (per token and head).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.dispatch import UnsupportedError
from macbench_kernels.state import State, empty_state

# Smallest scale of symmetric codes; vLLM's per-token-head INT8.
SMALLEST_SCALE = 1e-6


@dataclass(frozen=True)
class Scheme:
    """Codes of ``bits`` bits (2, 4 or 8) in groups of ``tokens`` x ``channels``.

    Asymmetric: zero = min, scale = (max - min) / (2^bits - 1), both rounded to float16 first; code = round((x - zero) / scale), 0 where
    the scale is 0; x' = code * scale + zero. Symmetric: scale = max(absmax / (2^(bits-1) - 1), 1e-6) in float32, x' = code * scale;
    codes are stored with 2^(bits-1) added. Rounding is half to even, codes are clipped.
    """

    bits: int
    tokens: int
    channels: int
    symmetric: bool = False

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    def row_bytes(self, head_dim: int) -> float:
        """Bytes of one token of one head: codes, and its share of scales and zeros (float16 each, or one float32 scale)."""
        return self.bits * head_dim / 8 + 4 * head_dim / (self.tokens * self.channels)


def encode(x: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x [..., n, d] -> codes int64 [..., n, d] from 0, scale and zero (None if symmetric) [..., n / tokens, d / channels]."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    grouped = x.unflatten(-1, (-1, scheme.channels)).unflatten(-3, (-1, scheme.tokens))  # [..., n', tokens, d', channels]
    group = (-3, -1)
    most = 2**scheme.bits - 1
    if scheme.symmetric:
        half = 2 ** (scheme.bits - 1)
        scale = _over(grouped.abs().amax(group), half - 1).clamp(min=SMALLEST_SCALE).float()
        codes = (grouped / _spread(scale)).round().clamp(-half, half - 1) + half
        return codes.flatten(-4, -3).flatten(-2).long(), scale, None
    low, high = grouped.amin(group), grouped.amax(group)
    zero, scale = low.half(), _over(high - low, most).half()
    step = torch.where(scale == 0, torch.ones_like(scale), scale)  # a constant group would divide by 0
    codes = ((grouped - _spread(zero)) / _spread(step)).round().clamp(0, most)
    codes = torch.where(_spread(scale) == 0, 0, codes)
    return codes.flatten(-4, -3).flatten(-2).long(), step, zero


def _over(x: torch.Tensor, number: int) -> torch.Tensor:
    """x / number, correctly rounded on every device (CUDA multiplies by the reciprocal of a host number)."""
    return x / torch.full_like(x, number)


def _spread(parameter: torch.Tensor) -> torch.Tensor:
    """[..., n', d'] -> [..., n', 1, d', 1], to go with groups."""
    return parameter[..., None, :, None]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., d] of 0 .. 2^bits - 1 -> int32 [..., d * bits / 32], the first code in the lowest bits."""
    shifts = torch.arange(0, 32, bits, device=codes.device)
    words = (codes.long().unflatten(-1, (-1, 32 // bits)) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``pack``: int32 [..., d]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


@dataclass
class Codes:
    """Quantised rows of a batch: ``words`` int32 [B, Hkv, room, d * bits / 32]; ``scale``, ``zero`` [B, Hkv, room / tokens, d / channels]
    in float16, or ``scale`` in float32 and no ``zero`` if symmetric."""

    scheme: Scheme
    words: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None

    @classmethod
    def create(cls, scheme: Scheme, batch: int, kv_heads: int, room: int, head_dim: int, buffer: Callable, prefix: str = "") -> "Codes":
        """For ``room`` tokens, rounded up to whole groups. ``buffer(name, *size, dtype=)`` gives zeroed memory, names begin with ``prefix``."""
        if scheme.bits not in (2, 4, 8) or head_dim % scheme.per_word or head_dim % scheme.channels:
            raise UnsupportedError(
                f"head_dim={head_dim} with {scheme.bits}-bit codes in groups of {scheme.channels} channels: "
                f"must be a multiple of {scheme.per_word} and of {scheme.channels}"
            )
        groups = -(-room // scheme.tokens)
        size = (batch, kv_heads, groups, head_dim // scheme.channels)
        parameter = torch.float32 if scheme.symmetric else torch.float16
        return cls(
            scheme,
            buffer(f"{prefix} words", batch, kv_heads, groups * scheme.tokens, head_dim // scheme.per_word, dtype=torch.int32),
            buffer(f"{prefix} scale", *size, dtype=parameter),
            None if scheme.symmetric else buffer(f"{prefix} zero", *size, dtype=parameter),
        )

    def write(self, request: int | slice, start: int, x: torch.Tensor) -> None:
        """Quantise x [Hkv, n, d] as the tokens from ``start`` of a request, or of several: [B, Hkv, n, d]; both multiples of the group's tokens."""
        codes, scale, zero = encode(x, self.scheme)
        stop, size = start + x.shape[-2], self.scheme.tokens
        self.words[request, :, start:stop] = pack(codes, self.scheme.bits)
        self.scale[request, :, start // size : stop // size] = scale
        if zero is not None:
            self.zero[request, :, start // size : stop // size] = zero

    def read(self, request: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """The dequantised tokens [0, stop) of a request: [Hkv, stop, d]."""
        size = self.scheme.tokens
        whole = -(-stop // size)
        codes = unpack(self.words[request, :, : whole * size], self.scheme.bits).to(dtype)
        if self.scheme.symmetric:
            codes -= 2 ** (self.scheme.bits - 1)
        grouped = codes.unflatten(-1, (-1, self.scheme.channels)).unflatten(-3, (-1, size))
        x = grouped * _spread(self.scale[request, :, :whole].to(dtype))
        if self.zero is not None:
            x = x + _spread(self.zero[request, :, :whole].to(dtype))
        return x.flatten(-4, -3).flatten(-2)[:, :stop]


def quantise_rows(codes: Codes, rows: torch.Tensor, cache: PagedKVCache, position: torch.Tensor) -> None:
    """Quantise one row per request out of the cache, in place, for schemes whose groups are of one token. No host synchronisation.

    rows: a layer's keys or values [Hkv, pages, page_size, d]. position: int32 [B]; a negative one stands for row 0, which is harmless:
    row 0 is then quantised again when its turn comes.
    """
    at = position.clamp(min=0).long()
    request = torch.arange(len(at), device=at.device)
    page = cache.block_table[request, at // cache.page_size].long()
    found = rows.flatten(1, 2)[:, page * cache.page_size + at % cache.page_size]  # [Hkv, B, d]
    words, scale, zero = encode(found.transpose(0, 1)[:, :, None], codes.scheme)
    codes.words[request, :, at] = pack(words, codes.scheme.bits)[:, :, 0]
    codes.scale[request, :, at] = scale[:, :, 0]
    if zero is not None:
        codes.zero[request, :, at] = zero[:, :, 0]


def attend_quantised(
    q: torch.Tensor, cache: PagedKVCache, layer: int, k: Codes, v: Codes, k_stop: torch.Tensor, v_stop: torch.Tensor, scale: float
) -> State:
    """Decode attention over every visible token, of which the first keys and values are read dequantised and the others from the cache.

    q: [B, Hq, d] after RoPE. k_stop, v_stop: int32 [B], how many keys and values are read from ``k`` and ``v``.
    Returns out [B, Hq, d] and lse [B, Hq] in at least float32.
    """
    batch, heads, dim = q.shape
    kv_heads = cache.pool.kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)
    result = empty_state((batch, heads), dim, dtype, q.device)
    for b, (length, keys, values) in enumerate(zip(cache.lengths.tolist(), k_stop.tolist(), v_stop.tolist(), strict=True)):
        if not length:
            continue
        both = []
        for codes, stop, side in ((k, keys, 0), (v, values, 1)):
            fresh = [piece[side].to(dtype) for piece in cache.slice(layer, b, stop, length)]
            both.append(torch.cat([codes.read(b, stop, dtype), *fresh], 1))
        scores = (q[b].to(dtype) * scale).view(kv_heads, -1, dim) @ both[0].mT
        lse = scores.logsumexp(-1)
        result.out[b] = (torch.exp(scores - lse[..., None]) @ both[1]).reshape(heads, dim)
        result.lse[b] = lse.reshape(heads)
    return result
