"""Which of torch's attention kernels is the fastest here, forward and backward."""

from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.backends import cuda

LENGTH = 32768  # tokens: long enough for a kernel to show its speed, and a few tenths of a second for all of them


def choose(network: nn.Module) -> dict[str, float]:
    """Time flash and cuDNN attention in the network's shape on a GPU, leave only the faster one on; TFLOP/s of those that work.

    Nothing is left on that would build the matrix of scores: at 131,072 tokens it has no room.
    """
    config = network.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    cuda.enable_math_sdp(False)
    cuda.enable_mem_efficient_sdp(False)
    speeds = {}
    switches = {"flash": cuda.enable_flash_sdp, "cudnn": cuda.enable_cudnn_sdp}
    for name in switches:
        for other, switch in switches.items():
            switch(other == name)
        try:
            # As in the model: [B, n, heads, d] in memory.
            q, k, v = (torch.randn(1, LENGTH, h, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for h in heads)
            for last in (False, True):
                torch.cuda.synchronize()
                start = perf_counter()
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                out.backward(out.detach())
                torch.cuda.synchronize()
                if last:
                    speeds[name] = 3.5 * 2 * LENGTH**2 * heads[0] * dim / (perf_counter() - start) / 1e12
            if not all(torch.isfinite(x.grad).all() for x in (q, k, v)):
                del speeds[name]
        except RuntimeError as error:
            print(f"attention by {name} does not work here: {str(error).splitlines()[0][:120]}")
    if not speeds:
        cuda.enable_math_sdp(True)
        return speeds
    best = max(speeds, key=speeds.get)
    for name, switch in switches.items():
        switch(name == best)
    return speeds
