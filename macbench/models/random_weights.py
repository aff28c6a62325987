"""Networks of a published shape with random weights, made on the device: for latency only."""

import torch


def build(config: dict, device: str, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
    """A transformers causal LM in eval mode. ``config``: fields of its configuration, ``model_type`` included.

    Weights are normal with a deviation of 0.02, gains of norms are 1, biases 0.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
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
