"""From a ``conf/model`` entry to a model, a tokenizer and a description of both."""

from dataclasses import dataclass

import torch

from macbench.counting import Shape
from macbench.errors import ConfigError, choose
from macbench.models import lora, placement
from macbench.models.chat import Chat
from macbench.models.smollm2 import converted
from macbench.models.trust import check_config, check_folder, check_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LoadedModel:
    """``network``: a transformers causal LM in eval mode. ``stop_ids``: token ids that end an answer."""

    network: torch.nn.Module
    chat: Chat
    stop_ids: frozenset[int]


def resolve_device(device: str) -> str:
    """``auto`` is cuda if there is one."""
    choose("device", device, ("auto", "cpu", "cuda"))
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "cuda", "no CUDA device is available; use device=cpu")
    return device


def resolve_dtype(spec, device: str) -> torch.dtype:
    """``auto`` is float32 on a CPU, bfloat16 on a GPU."""
    choose("model.dtype", spec.dtype, ("auto", *DTYPES))
    return DTYPES["float32" if device == "cpu" else "bfloat16"] if spec.dtype == "auto" else DTYPES[spec.dtype]


def folder_or_id(spec) -> str:
    """Where the weights are: a local folder or a hub id."""
    if spec.path:
        return str(spec.path)
    return str(converted(spec.get("gguf"), spec.gguf_sha256))


def max_context(spec) -> int:
    """Positions that a model serves with full attention, from its configuration alone.

    A sliding window in any layer ends it: every method here assumes that all earlier tokens are visible.
    """
    config = _config(spec)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    window = getattr(config, "sliding_window", None) if slides else None
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def planned_shape(spec, dtype: torch.dtype, device: str, max_tokens: int) -> Shape:
    """Sizes of the model's attention, from its configuration alone: no weights are read."""
    config = _config(spec)
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        layers=config.num_hidden_layers,
        q_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=dim,
        scale=dim**-0.5,
        dtype=dtype,
        device=device,
        max_tokens=max_tokens,
    )


def load(spec, device: str, chat: Chat, cache_bytes: int = 0) -> LoadedModel:
    """Load the network of a ``conf/model`` node: safetensors or GGUF, never pickles, no remote code.

    ``cache_bytes``: GPU memory that ``model.device_map`` leaves free for the KV cache.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    dtype = resolve_dtype(spec, device)
    where, options = folder_or_id(spec), _revision(spec)
    check_folder(where)
    check_size(where, _config(spec))
    adapter = lora.find(spec)
    # An adapter is added before weights are rounded, and the configuration is the extended one.
    first, extended = (torch.float32, {"config": _config(spec)}) if adapter else (dtype, {})
    placed = {} if adapter else placement.options(spec, device, cache_bytes, lambda: _skeleton(spec, dtype))
    try:
        network = AutoModelForCausalLM.from_pretrained(
            where, dtype=first, use_safetensors=True, trust_remote_code=False, attn_implementation="sdpa", **extended, **options, **placed
        )
    except Exception as error:  # whatever a foreign or damaged folder makes transformers, safetensors or json raise
        raise ConfigError("model.path", where, f"cannot be loaded: {_first_line(error)}") from error
    if adapter:
        factors, header = lora.read(adapter)
        lora.merge(network, factors, header.scale, lambda said: ConfigError("model.adapter", adapter, said))
        lora.round_weights(network, dtype)
    network = network.eval().requires_grad_(False)
    try:
        network = network if placed else network.to(device)
    except (RuntimeError, MemoryError) as error:
        said = f"cannot be moved to {device}: {_first_line(error)}; take a smaller model or model.device_map=auto"
        raise ConfigError("model.path", where, said) from error
    try:
        generation = GenerationConfig.from_pretrained(where, **options)
    except OSError:
        generation = network.generation_config
    eos = generation.eos_token_id if generation.eos_token_id is not None else chat.tokenizer.eos_token_id
    stop = frozenset(eos if isinstance(eos, list | tuple) else [eos]) - {None}
    return LoadedModel(network, chat, stop | {chat.tokenizer.eos_token_id} - {None})


def load_chat(spec) -> Chat:
    """The tokenizer with its template; enough to make prompts."""
    from transformers import AutoTokenizer

    where = folder_or_id(spec)
    try:
        return Chat(AutoTokenizer.from_pretrained(where, trust_remote_code=False, **_revision(spec)), spec.template)
    except ConfigError:
        raise
    except Exception as error:  # see load
        raise ConfigError("model.path", where, f"tokenizer cannot be loaded: {_first_line(error)}") from error


def _skeleton(spec, dtype: torch.dtype) -> torch.nn.Module:
    """The network without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(spec), dtype=dtype)


def _config(spec):
    from transformers import AutoConfig

    where = folder_or_id(spec)
    check_folder(where)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **_revision(spec))
    except Exception as error:  # see load
        raise ConfigError("model.path", where, f"cannot be loaded: {_first_line(error)}") from error
    check_config(where, config)
    if adapter := lora.find(spec):
        lora.extend(config, lora.read_header(adapter))
    return config


def _revision(spec) -> dict:
    return {"revision": spec.get("revision") or "main"}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]} ({type(error).__name__})" if lines else type(error).__name__
