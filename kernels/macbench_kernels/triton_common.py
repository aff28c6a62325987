"""What all Triton kernels share: the checks of their wrappers, launch helpers, and the arithmetic of lse in base 2."""

from contextlib import nullcontext
from functools import cache

import torch
import triton
import triton.language as tl

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.dispatch import UnsupportedError
from macbench_kernels.ring import Ring

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MAX_GROUP = 64
# What the interpreter pretends to have: few, so that shares stay long enough to be interesting in small tests.
_INTERPRETED_PROCESSORS = 3

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


def check(q: torch.Tensor, cache: PagedKVCache, layer: int) -> None:
    """q [B, Hq, d] against a layer of a cache; raises UnsupportedError in one line."""
    k = cache.keys(layer)
    launchable(q, {"cache": k, "block table": cache.block_table, "lengths": cache.lengths})
    if q.dim() != 3 or q.shape[0] != cache.batch:
        raise UnsupportedError(f"queries {tuple(q.shape)} on a cache of {cache.batch} requests: must be [requests, query heads, head_dim]")
    check_heads(q, k)


def check_heads(q: torch.Tensor, k: torch.Tensor) -> None:
    """q [n, Hq, d] against a layer of the pool [Hkv, pages, page_size, d]; raises UnsupportedError in one line."""
    dim, kv_heads = q.shape[-1], k.shape[0]
    if q.dtype not in DTYPES or q.dtype != k.dtype:
        raise UnsupportedError(f"dtype {q.dtype} with a cache of {k.dtype}: triton kernels take float16, bfloat16 or float32, the same for both")
    if dim > MAX_HEAD_DIM or dim % 8 or dim != k.shape[-1]:
        raise UnsupportedError(f"head_dim={dim}: triton kernels take multiples of 8 up to {MAX_HEAD_DIM}, the same in the cache")
    if q.shape[1] % kv_heads or q.shape[1] // kv_heads > MAX_GROUP:
        raise UnsupportedError(f"{q.shape[1]} query heads on {kv_heads} KV heads: must be a multiple, at most {MAX_GROUP} times")


def check_ring(q: torch.Tensor, ring: Ring) -> None:
    """q [B, Hq, d] before RoPE against a ring; raises UnsupportedError in one line."""
    launchable(q, {"ring.q": ring.q, "ring.out": ring.out, "ring.lse": ring.lse, "ring.depth": ring.depth})
    if q.dtype not in DTYPES or q.dtype != ring.q.dtype:
        raise UnsupportedError(f"dtype {q.dtype} with a ring of {ring.q.dtype}: triton kernels take float16, bfloat16 or float32, the same for both")
    if q.shape != (*ring.q.shape[:2], ring.q.shape[3]):
        raise UnsupportedError(f"queries {tuple(q.shape)} with a ring of {tuple(ring.q.shape)}: batch, heads and head_dim must agree")


def launchable(q: torch.Tensor, others: dict[str, torch.Tensor]) -> None:
    """The kernels can run where the queries lie, and everything that they get lies there too; raises UnsupportedError in one line."""
    if not q.is_cuda and not INTERPRETED:
        raise UnsupportedError(f"tensors on {q.device}: triton kernels need a CUDA device, or TRITON_INTERPRET=1 to be interpreted on a CPU")
    for name, tensor in others.items():
        if tensor.device != q.device:
            raise UnsupportedError(f"queries on {q.device}, {name} on {tensor.device}: all must be on one device")


def on_device(tensor: torch.Tensor):
    """Make the tensor's GPU current for the launch (Triton launches on the current one)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def _properties(index: int) -> tuple[int, tuple[int, int]]:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, (properties.major, properties.minor)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return _properties(torch.cuda.current_device() if device.index is None else device.index)[0]


def dependent_launch(device: torch.device) -> bool:
    """Whether kernels may start before their predecessor has finished (programmatic dependent launch, compute capability 9 and up)."""
    if device.type != "cuda":
        return False
    return _properties(torch.cuda.current_device() if device.index is None else device.index)[1] >= (9, 0)


def launch_options(early: bool) -> dict:
    """Keyword arguments of a launch whose kernel waits for its predecessor itself."""
    return {"launch_pdl": True} if early else {}


@triton.jit
def follow(EARLY: tl.constexpr):
    """Wait until the preceding kernel's writes are visible, then let the next kernel's programs take free places."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def finish(top, total):
    """(norm, lse in base 2) of sums of 2^(score - top): 1 and -inf where nothing was summed."""
    norm = tl.where(total > 0, total, 1.0)
    return norm, tl.where(total > 0, top + tl.log2(norm), float("-inf"))


# Triton decides when a kernel is defined, by TRITON_INTERPRET; what the variable says later changes nothing.
INTERPRETED = not isinstance(finish, triton.JITFunction)
