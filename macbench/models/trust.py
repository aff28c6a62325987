"""A model folder that somebody else wrote: numbers, names and sizes are checked before anything is allocated or read by them."""

import json
from pathlib import Path

from macbench.errors import ConfigError, one_line

KEY = "model.path"
# Far beyond published models; what exceeds them is a mistake or malice, and would take all memory, or forever.
_MOST = {
    "num_hidden_layers": 1 << 10,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 19,
    "moe_intermediate_size": 1 << 19,
    "num_attention_heads": 1 << 11,
    "num_key_value_heads": 1 << 11,
    "head_dim": 1 << 10,
    "num_experts": 1 << 12,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 26,
}
_DESCRIPTION = (".json", ".jinja", ".model", ".txt")
_MOST_JSON = 256 << 20  # bytes of one of these; the largest published tokenizer.json has 35 MB
# Elements per byte of a file: four-bit weights, and an embedding that is the output matrix as well.
_PACKED = 4


def check_config(where: object, config, key: str = KEY) -> None:
    """``config``: a transformers configuration, before a model is made of it."""
    for name, most in _MOST.items():
        value = getattr(config, name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
            raise ConfigError(key, where, f"its configuration has {name} {str(value)[:40]}, must be a number from 1 to {most}")
    if config.num_attention_heads % (getattr(config, "num_key_value_heads", None) or config.num_attention_heads):
        raise ConfigError(key, where, "its configuration has a number of attention heads that key-value heads do not divide")


def check_folder(where: str) -> None:
    """Files of a local folder: JSON of sensible size, an index that names files of the folder; a hub id is left to the hub's client."""
    folder = Path(where)
    if not folder.is_dir():
        return
    root = folder.resolve().parents[1] if folder.resolve().parent.name == "snapshots" else folder  # the hub's cache links to its blobs
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.resolve().is_relative_to(root.resolve()):
            raise ConfigError(KEY, path, "is a link to a file outside of the model's folder")
        if path.suffix in _DESCRIPTION and path.is_file() and path.stat().st_size > _MOST_JSON:
            raise ConfigError(KEY, path, f"has {path.stat().st_size} bytes, at most {_MOST_JSON} are read")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
            wrong = sorted(str(name) for name in names if not isinstance(name, str) or Path(name).name != name)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(KEY, index, f"cannot be read ({one_line(error)})") from None
        if wrong:
            raise ConfigError(KEY, index, f"names {wrong[0]}, which is no file of the folder")


def check_size(where: str, config) -> None:
    """The files of a local folder are large enough for the parameters that its configuration declares: nothing huge is made of nothing."""
    folder = Path(where)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
    if size:
        check_parameters(KEY, where, config, size)


def check_parameters(key: str, where: object, config, size: int) -> None:
    """``size``: bytes of the weights."""
    vocabulary, hidden, layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
    experts = getattr(config, "num_experts", None) or 1
    inner = (getattr(config, "moe_intermediate_size", None) if experts > 1 else None) or config.intermediate_size
    parameters = vocabulary * hidden + layers * (3 * experts * inner * hidden + 2 * hidden * hidden)
    if parameters > _PACKED * size:
        raise ConfigError(key, where, f"its configuration declares about {parameters} parameters, but its weights have only {size} bytes")
