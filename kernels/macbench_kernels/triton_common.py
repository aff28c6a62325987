"""What the wrappers of all Triton kernels check before a launch."""

from contextlib import nullcontext

import torch

from macbench_kernels.dispatch import UnsupportedError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MAX_GROUP = 64


def check(q: torch.Tensor, k: torch.Tensor) -> None:
    """q [B, Hq, d] against a layer of the pool [Hkv, pages, page_size, d]; raises UnsupportedError in one line."""
    dim, kv_heads = q.shape[-1], k.shape[0]
    if q.dtype not in DTYPES or q.dtype != k.dtype:
        raise UnsupportedError(f"dtype {q.dtype} with a cache of {k.dtype}: triton kernels take float16, bfloat16 or float32, the same for both")
    if dim > MAX_HEAD_DIM or dim % 8 or dim != k.shape[-1]:
        raise UnsupportedError(f"head_dim={dim}: triton kernels take multiples of 8 up to {MAX_HEAD_DIM}, the same in the cache")
    if q.shape[1] % kv_heads or q.shape[1] // kv_heads > MAX_GROUP:
        raise UnsupportedError(
            f"{q.shape[1]} query heads on {kv_heads} KV heads: must be a multiple, at most {MAX_GROUP} times"
        )
    if q.device != k.device:
        raise UnsupportedError(f"queries on {q.device}, cache on {k.device}: both must be on one device")


def on_device(tensor: torch.Tensor):
    """Make the tensor's GPU current for the launch (Triton launches on the current one)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
