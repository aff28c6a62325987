"""One decode step of a model for a batch: token ids in, logits out, with the attention left to a method.

Two ways: transformers' own modules (every model and device), and fused kernels around the same weights (``models/fused.py``).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from macbench_kernels import PagedKVCache

from macbench.models import fused
from macbench.models.adapter import intercept
from macbench.models.placement import compute_device, dispatched

# Where ``invariant`` is false.
NOT_INVARIANT = "needs the fused step of a GPU, at most 16 requests and no mixture of experts: other products depend on the number of their rows"


class Modules:
    """transformers' modules as they are."""

    name = "transformers"

    def __init__(self, network: torch.nn.Module):
        self.network = network
        # A mask of four dimensions is taken as given, whatever its values: no search for packed sequences, which would wait for the device.
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=compute_device(network))

    def invariant(self, batch: int) -> bool:
        """Whether what lies between the attentions gives each of up to ``batch`` texts the same, to the last bit, as it gets alone."""
        return False

    @contextmanager
    def attending(self, attend) -> Iterator[None]:
        """While open, ``step`` calls ``attend(layer, q_pre, q) -> out``, all [B, Hq, d], once the layer's K and V are in the cache."""

        def attention(layer, q_pre, q, k, v):
            self.cache.append(layer, k, v)
            return attend(layer, q_pre[:, :, 0], q[:, :, 0])[:, :, None]

        with intercept(self.network, attention):
            yield

    def step(self, tokens: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
        """Logits float32 [B, vocab] after the tokens int64 [B], for which the cache has just made room."""
        self.cache = cache
        position = (cache.lengths.long() - 1).clamp(min=0)[:, None]
        hidden = self.network.base_model(input_ids=tokens[:, None], position_ids=position, attention_mask=self.mask, use_cache=False)
        return self.network.get_output_embeddings()(hidden.last_hidden_state[:, -1]).float()


# Compute capabilities (major) of torch's grouped product in bfloat16; elsewhere, and in other dtypes, it asks the device how large the groups are.
_GROUPED = (9, 10)


def waits_for_device(network: torch.nn.Module) -> bool:
    """Whether a step on a GPU waits for what the GPU found, so that it cannot be captured: a mixture that asks which experts were chosen."""
    config = network.config
    if not getattr(config, "num_experts", 0):
        return False
    experts = getattr(config, "_experts_implementation", None)
    if experts == "grouped_mm" and network.dtype == torch.bfloat16:
        return torch.cuda.get_device_capability(compute_device(network))[0] not in _GROUPED
    return experts != "batched_mm"


def make_forward(network: torch.nn.Module, max_tokens: int, batch: int = 1):
    """The fastest way that serves this model here, for ``batch`` texts of up to ``max_tokens``."""
    fits = compute_device(network).type == "cuda" and not dispatched(network)
    if fits and fused.obstacle(network) is None and batch <= fused.MAX_BATCH:
        return fused.Fused(network, max_tokens)
    return Modules(network)
