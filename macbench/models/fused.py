"""A decode step of Llama-like models by fused kernels: few launches a layer around the same weights.

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
MAX_BATCH = 512  # beyond, a step is a small prefill
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
        self._blank: dict[tuple[int, int], torch.Tensor] = {}
        self.attend = None
        positions = torch.arange(max_tokens, device=network.device)[None]
        cos, sin = network.base_model.rotary_emb(torch.zeros(1, dtype=torch.float32, device=network.device), positions)
        half = cos.shape[-1] // 2
        self.cos, self.sin = (part[0, :, :half].float().contiguous() for part in (cos, sin))

    def invariant(self, batch: int) -> bool:
        """See models/forward.py. Own products sum in the same order whatever the number of rows; torch's take other kernels for other numbers."""
        from macbench_kernels.triton_linear import MAX_ROWS

        return batch <= MAX_ROWS and all(layer.gate_up is not None for layer in self.layers)

    @contextmanager
    def attending(self, attend) -> Iterator[None]:
        outer, self.attend = self.attend, attend
        try:
            yield
        finally:
            self.attend = outer  # not this one, which knows the decoder, and with it all the decoder's memory

    def step(self, tokens: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
        from macbench_kernels.triton_linear import MAX_ROWS

        hidden = self.network.get_input_embeddings()(tokens)
        return self._few(hidden, cache) if len(tokens) <= MAX_ROWS else self._many(hidden, cache)

    def _few(self, hidden: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
        """Every product streams its weights once, and norms are part of the products: five launches a layer, and the attention."""
        from macbench_kernels.triton_linear import linear, scale
        from macbench_kernels.triton_rope import rotate_append

        eps, head = self.eps, self.network.get_output_embeddings()
        scaled = scale(hidden, self.layers[0].module.input_layernorm.weight)
        for i, layer in enumerate(self.layers):
            after = self.layers[i + 1].module.input_layernorm if i + 1 < len(self.layers) else self.network.base_model.norm
            qkv = linear(scaled, layer.qkv, layer.bias, eps=eps)
            q_pre, q = rotate_append(qkv, self.cos, self.sin, cache, i, self.heads, layer.gains, eps)
            middle = layer.module.post_attention_layernorm
            hidden, scaled = linear(self.attend(i, q_pre, q).flatten(1), layer.out, residual=hidden, gain=middle.weight)
            if layer.gate_up is None:
                hidden = hidden + _experts(layer.module.mlp, middle(hidden))
                scaled = scale(hidden, after.weight)
            else:
                gates = linear(scaled, layer.gate_up, eps=eps, gated=True)
                hidden, scaled = linear(gates, layer.down, residual=hidden, gain=after.weight)
        return linear(scaled, head.weight, head.bias, eps=eps, dtype=torch.float32)

    def _many(self, hidden: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
        """torch's products, and one launch for each thing in between."""
        from macbench_kernels.triton_rope import rotate_append
        from macbench_kernels.triton_rows import rms_norm, swiglu

        eps, head = self.eps, self.network.get_output_embeddings()
        for i, layer in enumerate(self.layers):
            qkv = torch.nn.functional.linear(rms_norm(hidden, layer.module.input_layernorm.weight, eps), layer.qkv, layer.bias)
            q_pre, q = rotate_append(qkv, self.cos, self.sin, cache, i, self.heads, layer.gains, eps)
            hidden = torch.addmm(hidden, self.attend(i, q_pre, q).flatten(1), layer.out.T)
            normed = rms_norm(hidden, layer.module.post_attention_layernorm.weight, eps)
            if layer.gate_up is None:
                hidden = hidden + _experts(layer.module.mlp, normed)
            else:
                hidden = torch.addmm(hidden, swiglu(torch.nn.functional.linear(normed, layer.gate_up)), layer.down.T)
        return head(rms_norm(hidden, self.network.base_model.norm.weight, eps)).float()

    def products(self, rows: int) -> None:
        """The matrix products of a step alone, on zeros; for the benchmark's breakdown. Those of a mixture of experts are left out."""
        from macbench_kernels.triton_linear import MAX_ROWS, linear

        weights = [(w, w is layer.gate_up) for layer in self.layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down) if w is not None]
        for weight, gated in [*weights, (self.network.get_output_embeddings().weight, False)]:
            x = self._inputs(rows, weight.shape[1])
            if rows <= MAX_ROWS:
                linear(x, weight, gated=gated)
            else:
                torch.nn.functional.linear(x, weight)

    def _inputs(self, rows: int, width: int) -> torch.Tensor:
        if (rows, width) not in self._blank:
            self._blank[rows, width] = torch.zeros(rows, width, dtype=self.network.dtype, device=self.network.device)
        return self._blank[rows, width]


def _experts(mlp: torch.nn.Module, normed: torch.Tensor) -> torch.Tensor:
    """A mixture of experts by transformers' module: [rows, hidden]."""
    mixed = mlp(normed[:, None])
    return (mixed[0] if isinstance(mixed, tuple) else mixed)[:, 0]


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
    whole = getattr(parts[0], "joined_rows", None)
    if whole is not None:
        views = whole.split([part.weight.shape[0] for part in parts]) if len(whole) == sum(part.weight.shape[0] for part in parts) else ()
        if all(v.data_ptr() == p.weight.data_ptr() and v.dtype == p.weight.dtype for v, p in zip(views, parts, strict=False)) and views:
            return whole
        del parts[0].joined_rows  # the weights have been replaced since
    whole = torch.cat([part.weight.data for part in parts])
    start = 0
    for part in parts:
        rows = part.weight.shape[0]
        part.weight.data = whole[start : start + rows]
        start += rows
    parts[0].joined_rows = whole
    return whole
