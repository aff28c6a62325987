"""The one place where a model's attention is intercepted.

transformers calls a replaceable function with (q, k, v) after RoPE; a forward hook on the module that makes the query (``q_norm``
where a model normalises queries, else ``q_proj``, bias included) catches it before RoPE. Both go when the context manager ends.
This serves every architecture with that structure: Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from macbench.counting import Shape
from macbench.errors import ConfigError
from macbench.models.placement import compute_device, layer_devices

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_serial = count()


def attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The self-attention modules in layer order."""
    found = [m for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj") and hasattr(m, "layer_idx")]
    if len(found) != model.config.num_hidden_layers:
        kind = model.config.model_type
        raise ConfigError("model", kind, "needs attention modules with q_proj and k_proj in every layer (Llama, Mistral, Qwen2, Qwen3)")
    return sorted(found, key=lambda m: m.layer_idx)


def attention_shape(model: torch.nn.Module, max_tokens: int = 0) -> Shape:
    """Sizes of the model's attention, for requests of at most ``max_tokens``."""
    config, module = model.config, attention_modules(model)[0]
    rotary = model.base_model.rotary_emb

    def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # The module answers where it lies, which may be another GPU.
        cos, sin = (part[0].float().to(x.device) for part in rotary(x.float(), positions[None]))
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return (x * cos + turned * sin).to(x.dtype)

    return Shape(
        layers=config.num_hidden_layers,
        q_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=module.head_dim,
        scale=module.scaling,
        dtype=model.dtype,
        device=compute_device(model),
        max_tokens=max_tokens,
        rotate=rotate,
        devices=layer_devices(model),
    )


@contextmanager
def intercept(model: torch.nn.Module, attend: Attend) -> Iterator[None]:
    """While open, every attention of ``model`` is ``attend(layer, q_pre, q, k, v) -> out``.

    q_pre (before RoPE), q, out: [B, Hq, n, d]; k, v: [B, Hkv, n, d]; k after RoPE. The model must run without a cache of its own.
    """
    name = f"macbench-{next(_serial)}"
    queries: dict[int, torch.Tensor] = {}

    def catch(layer: int):
        def hook(module, args, output):
            queries[layer] = output

        return hook

    def attention(module, q, k, v, attention_mask, **kwargs):
        # q_proj gives [B, n, Hq * d], q_norm [B, n, Hq, d].
        q_pre = queries.pop(module.layer_idx).view(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        return attend(module.layer_idx, q_pre, q, k, v).transpose(1, 2), None

    before = model.config._attn_implementation
    hooks = []
    try:
        for module in attention_modules(model):
            source = module.q_norm if hasattr(module, "q_norm") else module.q_proj
            hooks.append(source.register_forward_hook(catch(module.layer_idx)))
        ALL_ATTENTION_FUNCTIONS[name] = attention
        model.config._attn_implementation = name
        yield
    finally:
        model.config._attn_implementation = before
        if name in ALL_ATTENTION_FUNCTIONS:
            del ALL_ATTENTION_FUNCTIONS[name]
        for hook in hooks:
            hook.remove()
