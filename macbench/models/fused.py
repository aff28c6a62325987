"""A decode step of Llama-like models by fused kernels: seven launches a layer around the same weights, attention included.

Serves decoders whose layers are norm, attention with RoPE, norm, SwiGLU: Llama, Mistral, Qwen2 (biases), Qwen3 (norms of queries and keys).
A mixture of experts keeps transformers' own module for its experts. Module names stay; the weights of q, k, v and of gate, up become
views of joint matrices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from macbench_kernels import PagedKVCache

MODELS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
# RoPE whose angles depend on the position alone, not on the length of the text.
_ROPES = ("default", "linear", "llama3", "yarn", "proportional")
MAX_BATCH = 64  # rows of kernels.linear
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def obstacle(network: torch.nn.Module) -> str | None:
    """Why this model cannot go this way; None if it can."""
    config = network.config
    if config.model_type not in MODELS:
        return f"model type {config.model_type}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    if network.base_model.rotary_emb.rope_type not in _ROPES:
        return f"RoPE of type {network.base_model.rotary_emb.rope_type}"
    if network.dtype not in _DTYPES:
        return f"dtype {network.dtype}"
    for layer in network.base_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        parts += [mlp.gate_proj, mlp.up_proj, mlp.down_proj] if hasattr(mlp, "gate_proj") else []
        if any(type(part) is not torch.nn.Linear for part in parts) or any(part.bias is not None for part in parts[3:]):
            return "linear layers of another kind"
    return None


@dataclass
class _Layer:
    qkv: torch.Tensor
    bias: torch.Tensor | None
    gains: tuple[torch.Tensor, torch.Tensor] | None
    out: torch.Tensor
    gate_up: torch.Tensor | None
    down: torch.Tensor | None
    module: torch.nn.Module


class Fused:
    """See models/forward.py: ``attending`` and ``step``. ``max_tokens``: positions that the RoPE tables hold."""

    name = "fused"

    def __init__(self, network: torch.nn.Module, max_tokens: int):
        self.network = network
        self.layers = [_joined(layer) for layer in network.base_model.layers]
        self.heads = network.config.num_attention_heads
        self.eps = network.config.rms_norm_eps
        positions = torch.arange(max_tokens, device=network.device)[None]
        cos, sin = network.base_model.rotary_emb(torch.zeros(1, dtype=torch.float32, device=network.device), positions)
        half = cos.shape[-1] // 2
        self.cos, self.sin = (part[0, :, :half].float().contiguous() for part in (cos, sin))

    @contextmanager
    def attending(self, attend) -> Iterator[None]:
        self.attend = attend
        yield

    def step(self, tokens: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
        from macbench_kernels.triton_linear import linear
        from macbench_kernels.triton_rope import rotate_append

        eps = self.eps
        hidden = self.network.get_input_embeddings()(tokens)
        for i, layer in enumerate(self.layers):
            qkv = linear(hidden, layer.qkv, layer.bias, gain=layer.module.input_layernorm.weight, eps=eps)
            q_pre, q = rotate_append(qkv, self.cos, self.sin, cache, i, self.heads, layer.gains, eps)
            hidden = linear(self.attend(i, q_pre, q).flatten(1), layer.out, residual=hidden)
            if layer.gate_up is None:
                mixed = layer.module.mlp(layer.module.post_attention_layernorm(hidden)[:, None])
                hidden = hidden + (mixed[0] if isinstance(mixed, tuple) else mixed)[:, 0]
                continue
            gates = linear(hidden, layer.gate_up, gain=layer.module.post_attention_layernorm.weight, eps=eps, gated=True)
            hidden = linear(gates, layer.down, residual=hidden)
        head = self.network.get_output_embeddings()
        return linear(hidden, head.weight, head.bias, gain=self.network.base_model.norm.weight, eps=eps, dtype=torch.float32)


def _joined(layer: torch.nn.Module) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    biases = [part.bias for part in parts]
    gains = (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None
    dense = hasattr(mlp, "gate_proj")
    return _Layer(
        _join(parts),
        torch.cat(biases) if biases[0] is not None else None,
        gains,
        attention.o_proj.weight,
        _join([mlp.gate_proj, mlp.up_proj]) if dense else None,
        mlp.down_proj.weight if dense else None,
        layer,
    )


def _join(parts: list[torch.nn.Linear]) -> torch.Tensor:
    """One matrix of the parts' rows; the parts become views of it, so that nothing is held twice."""
    whole = torch.cat([part.weight.data for part in parts])
    start = 0
    for part in parts:
        rows = part.weight.shape[0]
        part.weight.data = whole[start : start + rows]
        start += rows
    return whole
