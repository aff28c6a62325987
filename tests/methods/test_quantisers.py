"""KIVI and INT8 as methods: which tokens are exact when, errors, counts, poison, budgets."""

import dataclasses

import pytest
import torch
from macbench_kernels import kernels
from macbench_kernels.quantised import unpack

from macbench.counting import Ledger, Shape
from macbench.errors import ConfigError
from macbench.methods.int8 import INT8
from macbench.methods.kivi import KIVI
from macbench.methods.kivi_2bit import KIVI2Bit
from tests.conftest import DEVICE
from tests.kernels.test_quantised import restored
from tests.methods.driver import Driver, Stream

LLAMA = Shape(32, 32, 8, 128, 128**-0.5)
SMOLLM2 = Shape(30, 9, 3, 64, 0.125)


def few(backend: str, steps: int) -> int:
    """The interpreter takes a second per step."""
    return steps if backend == "torch" or DEVICE == "cuda" else 4


@pytest.mark.parametrize(
    ("prompt", "length", "want"),
    [(300, 301, (256, 45, 172, 129)), (300, 302, (256, 46, 173, 129)), (383, 384, (256, 128, 255, 129)), (383, 385, (384, 1, 256, 129))],
)
def test_golden_residual(prompt, length, want):
    k, v = KIVI()._stops(torch.tensor([length]))
    assert (k.item(), length - k.item(), v.item(), length - v.item()) == want


@pytest.mark.parametrize(
    ("dim", "bits", "group", "row", "times"),
    [
        *((128, 2, g, row, times) for g, row, times in ((32, 48, 5.33), (64, 40, 6.4), (128, 36, 7.1))),
        *((128, 4, g, row, times) for g, row, times in ((32, 80, 3.20), (64, 72, 3.56), (128, 68, 3.76))),
        *((64, 2, g, row, times) for g, row, times in ((32, 24, 5.33), (64, 20, 6.4))),
        *((64, 4, g, row, times) for g, row, times in ((32, 40, 3.20), (64, 36, 3.56))),
    ],
)
def test_golden_bytes_of_a_row(dim, bits, group, row, times):
    """Codes with float16 scales and zeros, K or V of a token and KV head, and how many times smaller that is than bf16."""
    found = KIVI(bits=bits, group=group, residual=group)._row_bytes(dim)
    assert found == row and 2 * dim / found == pytest.approx(times, abs=0.02)


class Counted:
    """Kernels that compute nothing, so that counts at any length cost nothing."""

    def __getattr__(self, name):
        nothing = torch.zeros(1)
        return lambda *args, **options: type("State", (), {"out": nothing, "lse": nothing})


@pytest.mark.parametrize(("method", "want"), [(KIVI(bits=2), (0.1883, 0.2002)), (KIVI(bits=4), (0.3132, 0.3232)), (INT8(), (0.5156, 0.5313))])
def test_golden_bytes(method, want):
    """Llama-3.1-8B at 131072 and SmolLM2 at 8192 tokens: the ledger and the closed form."""
    for shape, length, rho in ((LLAMA, 131072, want[0]), (SMOLLM2, 8192, want[1])):
        shape = dataclasses.replace(shape, layers=2, max_tokens=256)
        ledger = Ledger(shape)
        method.begin(shape, Counted(), ledger)
        ledger.begin_step([length])
        cache = type("Cache", (), {"lengths": torch.tensor([length], dtype=torch.int32), "keys": lambda *_: None, "values": lambda *_: None})()
        for layer in range(2):
            method.attend(layer, torch.zeros(1), torch.zeros(1), cache)
        ledger.end_step()
        counts = {name: int(x.sum()) for name, x in ledger.counts().items()}
        # The document's table has R values in the residual, where its section on KIVI has R + 1.
        assert counts["bytes_kv"] / counts["bytes_full"] == pytest.approx(rho, abs=1e-4)
        assert counts["tokens_log"] == counts["tokens_log_full"] and counts["tokens_phys"] == counts["tokens_phys_full"]
        closed = method.ratio(length, shape) if isinstance(method, KIVI) else method.ratio(shape)
        assert counts["bytes_kv"] == pytest.approx(closed * counts["bytes_full"])


METHODS = {"kivi2": lambda: KIVI(2, 16, 32), "kivi4": lambda: KIVI(4, 32, 64), "int8": INT8}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]()


def stored(method, x, length, side):
    """[Hkv, length, d] in float64 as the method reads it, from the definition."""
    codes = method.codes[0][side]
    stop = length if isinstance(method, INT8) else [n.item() for n in method._stops(torch.tensor(length))][side]
    kept = unpack(codes.words[0, :, :stop], codes.scheme.bits)
    return torch.stack([torch.cat([restored(codes.scheme, head[:stop], own), head[stop:length].double()]) for head, own in zip(x, kept, strict=True)])


@pytest.mark.parametrize(("backend", "prompt"), [("torch", 20), ("torch", 100), ("torch", 126), ("triton", 126)])
def test_steps_equal_the_definition(method, backend, prompt):
    """Across flushes of the residual: every output is that of exact attention over the rows as they should be stored."""
    steps = few(backend, 40)
    stream = Stream.random(prompt + steps, dtype=torch.float32, device=DEVICE)
    driver = Driver(method, stream, prompt, backend)
    for t in range(prompt, prompt + steps):
        got = driver.step()
        k, v = stored(method, stream.k, t + 1, 0), stored(method, stream.v, t + 1, 1)
        for h in range(6):
            weights = torch.softmax(k[h // 3] @ stream.q[h, t].double() * driver.shape.scale, 0)
            torch.testing.assert_close(got[h].double(), weights @ v[h // 3], atol=2e-5, rtol=2e-5)


def test_more_bits_are_nearer_to_full_attention():
    errors = []
    for method in (KIVI(2), KIVI(4), INT8()):
        stream = Stream.random(400, dtype=torch.float32)
        driver = Driver(method, stream, 380)
        gaps = [[float((out - driver.exact(h, t, 0, t + 1)[0]).norm()) for h, out in enumerate(driver.step())] for t in range(380, 400)]
        errors.append(sum(map(sum, gaps)))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_writes_and_flushes_are_counted():
    """Every step writes one value row as codes; every R steps a block of keys is flushed, R * (b d / 8 + 4 d / g) bytes per head."""
    prompt, steps = 90, 80
    driver = Driver(KIVI(2, 32, 32), Stream.random(prompt + steps, dtype=torch.float32), prompt)
    for _ in range(steps):
        driver.step()
    counts = driver.ledger.counts()
    row = 2 * 24
    assert (counts["bytes_write"] == 2 * 2 * 64 * 2 + row).all()
    flushed = [32 * row if (t % 32) == 0 else 0 for t in range(prompt, prompt + steps)]
    assert counts["bytes_maint"][:, 0, 0].tolist() == flushed
    driver = Driver(INT8(), Stream.random(50, dtype=torch.float32), 40)
    driver.step()
    assert driver.ledger.counts()["bytes_write"].item() == 2 * (2 * 64 + 8)


def test_budgets():
    assert KIVI(4).fit(0.2, 131072, LLAMA).bits == 2
    assert KIVI(2).fit(0.3, 131072, LLAMA).bits == 4
    assert INT8().fit(0.5, 131072, LLAMA) == INT8()
    assert KIVI2Bit().fit(0.2, 131072, LLAMA) == KIVI2Bit()
    with pytest.raises(ConfigError, match=r"budget=0.3: must be within 10% of 0.188 for kivi_2bit"):
        KIVI2Bit().fit(0.3, 131072, LLAMA)
    with pytest.raises(ConfigError, match=r"budget=0.1: must be within 10% of 0.188 or 0.313 for kivi at 131072 tokens; 0.188 is its floor"):
        KIVI().fit(0.1, 131072, LLAMA)
    with pytest.raises(ConfigError, match=r"budget=0.25: must be within 10% of 0.516 for int8"):
        INT8().fit(0.25, 131072, LLAMA)


@pytest.mark.parametrize(
    ("key", "value"), [("bits", 3), ("bits", "2"), ("group", 48), ("group", 8), ("residual", 0), ("residual", 100), ("residual", 12.5)]
)
def test_wrong_parameters_name_key_value_and_what_is_allowed(key, value):
    with pytest.raises(ConfigError, match=f"method.{key}={value}: must be") as error:
        KIVI(**{key: value})
    assert "\n" not in str(error.value)


def test_a_group_that_does_not_divide_the_head_is_refused():
    with pytest.raises(ConfigError, match=r"method.group=128: must be a divisor of the model's head dimension 64"):
        KIVI(group=128).begin(SMOLLM2, kernels("torch"), None)
