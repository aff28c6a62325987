"""The network that is trained: low-rank terms on every linear layer, merged anew in every forward pass, and hidden states without a mask.

peft computes x A^T B^T beside x W^T, which adds four kernels and their memory traffic to each of 210 small layers. Here W + s B A is made
first, in float32, and rounded once: the forward pass is the plain model's, and the very weights are trained that an evaluation uses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from macbench.models import lora

RANK, ALPHA = 32, 64
SCALE = ALPHA / RANK
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Module):
    """x [..., in] -> [..., out] with weight + scale * b @ a; ``weight`` float32 and frozen, a [rank, in] and b [out, rank] float32."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        super().__init__()
        out, into = linear.weight.shape
        self.register_buffer("weight", linear.weight.detach().float(), persistent=False)
        self.a = nn.Parameter(torch.empty(rank, into, device=linear.weight.device))
        self.b = nn.Parameter(torch.zeros(out, rank, device=linear.weight.device))
        nn.init.normal_(self.a, std=into**-0.5)
        self.scale, self.active = scale, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.addmm(self.weight, self.b, self.a, alpha=self.scale) if self.active else self.weight
        return F.linear(x, weight.to(x.dtype))


class Probe(nn.Module):
    """A Llama network of transformers with low-rank terms and another RoPE base. ``dtype``: of the computation."""

    def __init__(self, network: nn.Module, rope_theta: float, dtype: torch.dtype, rank: int = RANK, scale: float = SCALE):
        super().__init__()
        self.network, self.scale, self.dtype = network.eval().requires_grad_(False), scale, dtype
        body = network.model
        self.own_rotary = deepcopy(body.rotary_emb)
        config = deepcopy(network.config)
        config.rope_parameters = dict(config.rope_parameters) | {"rope_theta": rope_theta}
        self.rotary = type(body.rotary_emb)(config).to(network.device)
        self.active = True
        for layer in body.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name in PROJECTIONS:
                    if hasattr(parent, name):
                        setattr(parent, name, LoraLinear(getattr(parent, name), rank, scale))
        for module in (body.embed_tokens, *(m for m in body.modules() if hasattr(m, "variance_epsilon"))):
            module.weight.data = module.weight.data.to(dtype)

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor, lean: bool = False) -> torch.Tensor:
        """ids, positions [B, n] -> last hidden states [B, n, d]. ``lean``: the feed-forward layers are computed again in the backward pass."""
        body = self.network.model
        h = body.embed_tokens(ids)
        angles = (self.rotary if self.active else self.own_rotary)(h, positions)
        for layer in body.layers:
            # What transformers' layer does, with the fused norm of torch. No mask: rows are full, so attention is causal and nothing else.
            h = h + layer.self_attn(_norm(layer.input_layernorm, h), position_embeddings=angles, attention_mask=None)[0]
            x = _norm(layer.post_attention_layernorm, h)
            h = h + (checkpoint(layer.mlp, x, use_reentrant=False, preserve_rng_state=False) if lean else layer.mlp(x))
        return _norm(body.norm, h)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Selected hidden states [m, d] -> logits float32 [m, vocabulary]; the output layer is tied to the embedding."""
        return F.linear(hidden, self.network.model.embed_tokens.weight).float()

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.named_parameters() if name.endswith((".a", ".b"))}

    def factors(self) -> lora.Factors:
        """A and B by the names that the layers have in transformers' network."""
        return {name: (m.a, m.b) for name, m in self.network.named_modules() if isinstance(m, LoraLinear)}

    @torch.no_grad()
    def set_factors(self, factors: lora.Factors) -> None:
        for name, (a, b) in self.factors().items():
            a.copy_(factors[name][0])
            b.copy_(factors[name][1])

    @contextmanager
    def base(self) -> Iterator[None]:
        """While open, the network is the base model: no low-rank terms, its own RoPE base."""
        self._activate(False)
        try:
            yield
        finally:
            self._activate(True)

    def _activate(self, active: bool) -> None:
        self.active = active
        for module in self.modules():
            if isinstance(module, LoraLinear):
                module.active = active


def _norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
