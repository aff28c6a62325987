"""Full attention by FlashInfer's paged decode kernels (https://github.com/flashinfer-ai/flashinfer) on our pages; all else is Triton's.

FlashInfer plans on the host before every step, for the lengths of that step. Its buffers stay in place, so a captured step may be replayed.
"""

import os
from dataclasses import replace

import torch

from macbench_kernels.cache import PagedKVCache
from macbench_kernels.dispatch import Kernels, UnsupportedError

_WORKSPACE_BYTES = 256 << 20
# Groups from which on FlashInfer's tensor-core kernel is the faster one.
_TENSOR_CORE_GROUP = 4


class FlashInfer:
    """One planned wrapper per batch size; ``plan`` before each step, ``full`` within it."""

    def __init__(self):
        os.environ.setdefault("FLASHINFER_DISABLE_VERSION_CHECK", "1")
        try:
            import flashinfer
        except ImportError as error:
            raise UnsupportedError(f"backend=flashinfer: not installed ({error})") from error
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper
        self.planned: dict[tuple, object] = {}

    def plan(self, cache: PagedKVCache, heads: int, scale: float) -> None:
        """For a step in which every active request of ``cache`` sees one token more than it holds."""
        pool, device = cache.pool, cache.lengths.device
        key = (cache.batch, heads, cache.block_table.shape[1])
        size = cache.page_size
        lengths = [max(1, n + active) for n, active in zip(cache.host_lengths, cache.active, strict=True)]
        used = [-(-n // size) for n in lengths]
        indptr = torch.tensor([0, *used], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        last = torch.tensor([(n - 1) % size + 1 for n in lengths], dtype=torch.int32)
        cache.reserve(1)  # the table as the step will see it
        indices = torch.cat([cache.block_table[i, :n] for i, n in enumerate(used)])
        if key not in self.planned:
            most = cache.batch * cache.block_table.shape[1]
            self.planned[key] = self.wrapper(
                torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device), "HND", use_cuda_graph=True,
                use_tensor_cores=heads // pool.kv_heads >= _TENSOR_CORE_GROUP,
                paged_kv_indptr_buffer=torch.empty(cache.batch + 1, dtype=torch.int32, device=device),
                paged_kv_indices_buffer=torch.empty(most, dtype=torch.int32, device=device),
                paged_kv_last_page_len_buffer=torch.empty(cache.batch, dtype=torch.int32, device=device),
            )  # fmt: skip
        self.planned[key].plan(
            indptr, indices, last, heads, pool.kv_heads, pool.head_dim, size, q_data_type=pool.k.dtype, kv_data_type=pool.k.dtype, sm_scale=scale
        )

    def full(self, q: torch.Tensor, cache: PagedKVCache, layer: int, scale: float) -> torch.Tensor:
        """See torch_backend.full."""
        wrapper = self.planned[cache.batch, q.shape[1], cache.block_table.shape[1]]
        return wrapper.run(q, (cache.keys(layer).transpose(0, 1), cache.values(layer).transpose(0, 1)))


def with_flashinfer(triton: Kernels) -> Kernels:
    """The Triton kernels with FlashInfer's full attention."""
    peer = FlashInfer()
    return replace(triton, name="flashinfer", full=peer.full, plan=peer.plan)
