"""Tiny random models of every supported architecture, in float64."""

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import DEVICE

ARCHITECTURES = {
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": None},
    "qwen2": {"num_attention_heads": 7, "num_key_value_heads": 1},
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "qwen3_moe": {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
}


def tiny(kind: str, dtype=torch.float64, **extra) -> torch.nn.Module:
    """Two layers, head_dim 16, weights large enough for attention to matter."""
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 97, "max_position_embeddings": 512}
    config = AutoConfig.for_model(kind, **(sizes | ARCHITECTURES[kind] | extra))
    config._experts_implementation = "eager"  # the grouped product has no float64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.normal_(std=0.2)
        elif "norm" in name or "bias" in name:
            weight.uniform_(0.5, 1.5)
    return model.to(DEVICE)


def rotary(model: torch.nn.Module):
    """The architecture's own apply_rotary_pos_emb."""
    return sys.modules[type(model).__module__].apply_rotary_pos_emb
