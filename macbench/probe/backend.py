"""Which of torch's attention kernels is the fastest here, forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Neither builds the matrix of scores, for which there is no room at 131,072 tokens.
KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
LENGTH = 32768  # tokens: long enough for a kernel to show its speed, and a few tenths of a second for all of them


@contextmanager
def fastest(network: nn.Module) -> Iterator[None]:
    """While open, attention on a GPU is by the faster of ``KERNELS`` in the network's shape, or the other where that one refuses."""
    if network.device.type != "cuda":
        yield
        return
    config = network.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    speeds = {kernel: speed(kernel, heads, dim) for kernel in KERNELS}
    print("attention, TFLOP/s:", {kernel.name: round(found) for kernel, found in speeds.items()}, flush=True)
    order = sorted((kernel for kernel in KERNELS if speeds[kernel]), key=speeds.get, reverse=True)
    with sdpa_kernel(order or [SDPBackend.MATH], set_priority=True):
        yield


def speed(kernel: SDPBackend, heads: tuple[int, int, int], dim: int) -> float:
    """TFLOP/s of causal attention forward and backward, 0 where the kernel does not work. ``heads``: of queries, keys and values."""
    # As in the model: [B, n, heads, d] in memory.
    q, k, v = (torch.randn(1, LENGTH, h, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for h in heads)
    try:
        with sdpa_kernel(kernel):
            for _ in range(2):  # the first one builds plans
                torch.cuda.synchronize()
                start = perf_counter()
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                out.backward(out.detach())
                torch.cuda.synchronize()
                took = perf_counter() - start
    except RuntimeError as error:
        print(f"{kernel.name} does not work here: {str(error).splitlines()[0][:120]}")
        return 0.0
    if not all(torch.isfinite(x.grad).all() for x in (q, k, v)):
        return 0.0
    return 3.5 * 2 * LENGTH**2 * heads[0] * dim / took / 1e12
