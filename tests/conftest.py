"""Shared fixtures. Without a GPU, Triton kernels run under the interpreter, which must be chosen before triton is imported."""

import os
import secrets

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
from macbench_kernels import PagedKVCache, PagePool

from tests import within

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import quicken

    quicken()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")
# What kernels are tested in; half precision under the interpreter would show nothing of a GPU's.
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32,)


def pytest_configure():
    # Small tensors gain nothing from more threads, and processes side by side, workers of pytest and what they start, lose much by them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    within.STDERR.append(os.dup(2))  # before anything is kept of what tests print


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def seed() -> int:
    """Of a test's random inputs: fixed on a CPU, fresh in every run on a GPU. A failure shows it, MACBENCH_TEST_SEED repeats it."""
    value = int(os.environ.get("MACBENCH_TEST_SEED") or (0 if DEVICE == "cpu" else secrets.randbelow(1 << 31)))
    print(f"MACBENCH_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def filled_cache(k: torch.Tensor, v: torch.Tensor, page_size: int = 16, layers: int = 1, shuffle: bool = False) -> PagedKVCache:
    """A cache whose every layer holds k, v [B, Hkv, n, d]. ``shuffle`` scatters the pages, as after long use of a pool."""
    batch, heads, n, dim = k.shape
    per_request = -(-n // page_size) + 2
    pool = PagePool(layers, heads, dim, 2 * batch * per_request + 2, page_size, k.dtype, k.device)
    if shuffle:
        taken = [pool.take() for _ in range(pool.pages)]
        for page in taken[::2]:
            pool.release(page)
    cache = PagedKVCache(pool, batch)
    if n:
        cache.extend(n)
        for layer in range(layers):
            cache.append(layer, k, v)
    return cache


def exact_state(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in float64: q [d], k and v [n, d] -> out [d], lse (scalar)."""
    scores = (k.double() @ q.double()) * scale
    return torch.softmax(scores, 0) @ v.double(), torch.logsumexp(scores, 0)


def assert_near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Kernel outputs against float64: element by element in float32, by relative L2 error in half precision."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    got, want = got.double(), want.double()
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    else:
        assert (got - want).norm() <= 1e-2 * want.norm()
