"""Codes against hand-made examples, attention over them against a float64 dequantise-and-attend reference."""

import pytest
import torch
from macbench_kernels import Codes, Scheme, UnsupportedError, kernels
from macbench_kernels.quantised import encode, pack, unpack

from tests.conftest import DEVICE, DTYPES, exact_state, filled_cache

INT8 = (Scheme(8, 1, 64, symmetric=True),) * 2


def kivi(bits, group=32):
    return Scheme(bits, group, 1), Scheme(bits, 1, group)


def decoded(codes, scale, zero):
    return codes * scale + zero


@pytest.mark.parametrize(
    ("bits", "values", "scale", "zero", "want", "restored"),
    [
        (2, [-1, 0, 0.5, 2], 1, -1, [0, 1, 2, 3], [-1, 0, 1, 2]),
        (2, [0.1, 0.2, 0.35, 0.9], 0.266667, 0.1, [0, 0, 1, 3], [0.1, 0.1, 0.366667, 0.9]),
        (4, [0, 1, 2, 7.5, 15], 1, 0, [0, 1, 2, 8, 15], [0, 1, 2, 8, 15]),
    ],
)
def test_golden_asymmetric_codes(bits, values, scale, zero, want, restored):
    """Along channels (values) and along tokens (keys): the same arithmetic. Scale and zero are those of the document rounded to float16."""
    x = torch.tensor([values])
    for rows, scheme in ((x, Scheme(bits, 1, len(values))), (x.mT, Scheme(bits, len(values), 1))):
        codes, s, z = encode(rows, scheme)
        assert codes.flatten().tolist() == want
        torch.testing.assert_close((s.item(), z.item()), (float(scale), float(zero)), atol=2e-4, rtol=0)
        torch.testing.assert_close(decoded(codes, s.float(), z.float()).flatten(), torch.tensor(restored).float(), atol=6e-4, rtol=0)


def test_golden_int8():
    codes, scale, zero = encode(torch.tensor([[0.5, -3, 7, 1.75]]), Scheme(8, 1, 4, symmetric=True))
    assert zero is None
    assert (codes - 128).flatten().tolist() == [9, -54, 127, 32]
    assert scale.item() == pytest.approx(0.055118, abs=1e-6)
    torch.testing.assert_close((codes - 128) * scale, torch.tensor([[0.496063, -2.976378, 7, 1.763780]]), atol=1e-6, rtol=0)


def test_golden_word_and_packing_is_reversible():
    assert pack(torch.tensor([0, 1, 2, 3] + [0] * 12), 2).tolist() == [228]
    for bits in (2, 4, 8):
        codes = torch.randint(0, 2**bits, (3, 5, 64))
        words = pack(codes, bits)
        assert words.dtype == torch.int32 and words.shape == (3, 5, 2 * bits)
        assert torch.equal(unpack(words, bits), codes.int())


def test_a_constant_group_stays_itself():
    codes, scale, zero = encode(torch.full((1, 4), 0.5), Scheme(2, 1, 4))
    assert codes.tolist() == [[0, 0, 0, 0]]
    assert (scale.item(), zero.item()) == (1, 0.5)


def made(schemes, k, v, room):
    """Codes of all of k, v [B, Hkv, n, d], rounded down to whole groups."""
    batch, heads, n, dim = k.shape
    both = []
    for scheme, x in zip(schemes, (k, v), strict=True):
        codes = Codes.create(scheme, batch, heads, room, dim, lambda name, *size, dtype: torch.zeros(size, dtype=dtype, device=DEVICE))
        for b in range(batch):
            codes.write(b, 0, x[b, :, : n - n % scheme.tokens])
        both.append(codes)
    return both


def nearest(quotient, stored):
    """Rounded half to even; where a rounding in float32 may lead to the other neighbour, the stored code counts if it is one of the two."""
    near = (quotient % 1 - 0.5).abs() < 3e-5  # the last digit of a float32 between 64 and 128 is 7.6e-6, and the scale has one, too
    return torch.where(near, stored.double().clamp(quotient.floor(), quotient.ceil()), quotient.round())


def restored(scheme, x, stored):
    """What the definition makes of x [n, d] of whole groups, in float64 with parameters as stored; ``stored``: codes, for ties."""
    device = x.device  # division happens on the host, where it is one
    n, d = x.shape
    whole = n // scheme.tokens, scheme.tokens, d // scheme.channels, scheme.channels
    groups, codes = x.cpu().double().view(whole), stored.cpu().view(whole)
    high, low = groups.amax((1, 3), keepdim=True), groups.amin((1, 3), keepdim=True)
    if scheme.symmetric:
        scale = (torch.maximum(high, -low).float() / 127).double().clamp(min=1e-6)
        made = nearest(groups / scale, codes - 128).clamp(-128, 127) * scale
    else:
        zero, scale = low.half().double(), ((high - low).float() / (2**scheme.bits - 1)).half().double()
        made = nearest((groups - zero) / scale, codes).clamp(0, 2**scheme.bits - 1) * scale + zero
    return made.view(n, d).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schemes", [kivi(2), kivi(4, 16), INT8], ids=["kivi2", "kivi4", "int8"])
@pytest.mark.parametrize(
    ("lengths", "k_stop", "v_stop"),
    [([150, 33], [128, 32], [101, 7]), ([64, 96], [64, 96], [64, 96]), ([5, 0], [0, 0], [0, 0]), ([290, 131], [288, 128], [265, 130])],
)
def test_attention_equals_dequantised_in_float64(seed, backend, schemes, lengths, k_stop, v_stop, dtype):
    check_attention(backend, schemes, lengths, k_stop, v_stop, dtype, 2, 3, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("schemes", "kv_heads", "group", "dim"),
    [
        (kivi(2), 1, 8, 96), (kivi(2, 128), 1, 4, 128), (kivi(4, 64), 2, 1, 64), (kivi(4), 1, 20, 32),
        ((Scheme(8, 1, 96, symmetric=True),) * 2, 2, 1, 96), ((Scheme(8, 1, 32, symmetric=True),) * 2, 1, 20, 32),
    ],
)  # fmt: skip
def test_attention_over_many_tiles_of_codes(seed, backend, schemes, kv_heads, group, dim, dtype):
    """Heads that are padded, more of them than rows of a tile, groups as long as a tile, and shares without a tile."""
    check_attention(backend, schemes, [421, 170], [384, 128], [420, 41], dtype, kv_heads, group, dim)


def check_attention(backend, schemes, lengths, k_stop, v_stop, dtype, kv_heads, group, dim):
    room = max(96, *lengths)
    k, v = (torch.randn(2, kv_heads, room, dim, device=DEVICE).to(dtype) for _ in range(2))
    q = torch.randn(2, kv_heads * group, dim, device=DEVICE).to(dtype)
    cache = filled_cache(k, v, shuffle=True)
    both = made(schemes, k, v, room + 10)
    tolerance = 3e-5 if dtype == torch.float32 else 1e-2
    cache.lengths.copy_(torch.tensor(lengths))
    cache.host_lengths = lengths
    stops = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (k_stop, v_stop)]
    out, lse = kernels(backend, DEVICE).attend_quantised(q, cache, 0, *both, *stops, 0.125)
    for b, length in enumerate(lengths):
        for h in range(kv_heads * group):
            g = h // group
            if not length:
                assert lse[b, h] == float("-inf") and not out[b, h].any()
                continue
            rows = []
            for codes, x, stop in ((both[0], k, k_stop[b]), (both[1], v, v_stop[b])):
                whole = stop - stop % codes.scheme.tokens
                stored = unpack(codes.words[b, g, :whole], codes.scheme.bits)
                rows.append(torch.cat([restored(codes.scheme, x[b, g, :whole], stored), x[b, g, whole:length].double()]))
            want, want_lse = exact_state(q[b, h], *rows, 0.125)
            torch.testing.assert_close(out[b, h].double(), want, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(lse[b, h].double(), want_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scheme", "dim"), [(Scheme(2, 1, 32), 64), (Scheme(4, 1, 32), 96), (Scheme(8, 1, 96, True), 96)])
def test_a_row_is_quantised_like_a_block(backend, scheme, dim, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 40, dim, device=DEVICE).to(dtype)
    cache = filled_cache(x, x, shuffle=True)
    want, _ = made((scheme, scheme), x, x, 48)
    got, _ = made((scheme, scheme), x[:, :, :0], x[:, :, :0], 48)
    for position in ([0, 39], [17, -3]):
        kernels(backend, DEVICE).quantise_rows(got, cache.keys(0), cache, torch.tensor(position, dtype=torch.int32, device=DEVICE))
    for b, rows in enumerate(([0, 17], [0, 39])):
        for name in ("words", "scale", "zero"):
            if getattr(got, name) is not None:
                assert torch.equal(getattr(got, name)[b][:, rows], getattr(want, name)[b][:, rows]), name
    assert not got.words[0, :, 18:].any()


def test_schemes_without_a_kernel_are_refused():
    x = torch.randn(1, 1, 64, 64, device=DEVICE)
    both = made((Scheme(8, 1, 32, symmetric=True),) * 2, x, x, 64)
    stop = torch.tensor([64], dtype=torch.int32, device=DEVICE)
    with pytest.raises(UnsupportedError, match="symmetric ones of 8 bits with a scale per token"):
        kernels("triton", DEVICE).attend_quantised(x[:, :, 0], filled_cache(x, x), 0, *both, stop, stop, 1.0)


def test_sizes_that_do_not_pack_are_refused():
    with pytest.raises(UnsupportedError, match="head_dim=48 with 2-bit codes in groups of 32 channels: must be a multiple of 16 and of 32"):
        Codes.create(Scheme(2, 1, 32), 1, 1, 10, 48, lambda name, *size, dtype: None)
