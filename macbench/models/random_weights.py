"""Networks of a published shape with random weights, made on the device: for latency only."""

from collections.abc import Mapping

import torch

from macbench.errors import ConfigError, choose
from macbench.models.fused import MODELS

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "num_experts", "num_experts_per_tok", "max_position_embeddings",
)  # fmt: skip
_WIDEST_HEAD = 256  # that the kernels take, and multiples of 8 only


def check(config: Mapping) -> None:
    """Raise a ConfigError that names the first field of ``model.random`` of which no network can be made."""
    if not isinstance(config, Mapping):
        raise ConfigError("model.random", config, "must be fields of a transformers configuration, as in conf/model/random_llama31_8b.yaml")
    choose("model.random.model_type", config.get("model_type"), MODELS)
    for key in _SIZES:
        value = config.get(key)
        if (key in config or key == "max_position_embeddings") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"model.random.{key}", value, "must be an integer of at least 1")
    head = config.get("head_dim")
    if head is not None and (isinstance(head, bool) or not isinstance(head, int) or not 0 < head <= _WIDEST_HEAD or head % 8):
        raise ConfigError("model.random.head_dim", head, f"must be a multiple of 8 up to {_WIDEST_HEAD}")
    if "num_experts" in config and config["num_experts"] < config.get("num_experts_per_tok", 1):
        raise ConfigError("model.random.num_experts", config["num_experts"], f"must be at least num_experts_per_tok={config['num_experts_per_tok']}")
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise ConfigError("model.random.num_attention_heads", heads, f"must be a multiple of num_key_value_heads={groups}")


def build(config: dict, device: str, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
    """A transformers causal LM in eval mode. ``config``: fields of its configuration, ``model_type`` included.

    Weights are normal with a deviation of 0.02, gains of norms are 1, biases 0. A ConfigError if there is no such network.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except Exception as error:  # of any kind: each field has its own checks there
        raise ConfigError("model.random", fields, f"gives no network ({type(error).__name__}: {str(error)[:300]})") from error
    network = network.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in network.named_parameters():
        with torch.no_grad():
            if weight.ndim > 1:
                weight.normal_(std=0.02, generator=generator)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
    # Its angles are a buffer that no state dict holds, so the empty one has lost them.
    network.base_model.rotary_emb = type(network.base_model.rotary_emb)(config).to(device)
    network.tie_weights()
    return network.eval().requires_grad_(False)
