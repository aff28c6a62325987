"""Low-rank adapters: the file format, and merging one into a network.

Hu et al., LoRA (ICLR 2022): W becomes W + scale * B @ A with A [rank, in] and B [out, rank]. The file is safetensors with A and B of
every adapted linear layer as int8 and one float32 scale a row (``<name>.A``, ``<name>.A_scale`` [rank], ``<name>.B``,
``<name>.B_scale`` [out]), and strings in its header: the hash of the base weights, RoPE's base, positions and the scale of the product.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from macbench.errors import ConfigError
from macbench.files import write_whole

FORMAT = "macbench-lora-int8-1"
_MOST = 1 << 30  # bytes of a file, which is hashed before it is opened; ours has 10 million
MOST_POSITIONS = 1 << 26
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Header:
    """What an adapter needs to be used rightly. ``base_sha256``: of the base model's GGUF; ``positions``: most tokens it was trained for."""

    base_sha256: str
    rope_theta: float
    positions: int
    scale: float


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with one scale a row: x [rows, n] float32 -> codes int8 [rows, n], scale float32 [rows]."""
    scale = x.abs().amax(1).clamp_min(1e-12) / 127
    return (x / scale[:, None]).round().to(torch.int8), scale


def save(path: Path, factors: Factors, header: Header) -> None:
    """Write A, B (float32) of each layer name."""
    from safetensors.torch import save as serialise

    tensors = {}
    for name, pair in factors.items():
        for part, x in zip("AB", pair, strict=True):
            tensors[f"{name}.{part}"], tensors[f"{name}.{part}_scale"] = quantise(x.detach().float().cpu())
    payload = serialise(tensors, metadata={"format": FORMAT, "adapter": json.dumps(asdict(header))})
    write_whole(path, lambda file: file.write(payload))


def read(path: Path) -> tuple[Factors, Header]:
    """A and B of every layer, float32, and the header."""
    from safetensors import SafetensorError, safe_open

    header = read_header(path)
    try:
        with safe_open(path, "pt") as file:
            x = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a safe_open is no dictionary)
        names = [name.removesuffix(".A") for name in x if name.endswith(".A")]
        if not names:
            raise ValueError("it has no factors")
        for name in (f"{name}.{part}" for name in names for part in "AB"):
            if x[name].dim() != 2 or x[f"{name}_scale"].shape != x[name].shape[:1]:
                raise ValueError(f"{name} or its scales have another shape")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ConfigError("model.adapter", path, f"cannot be read as an adapter ({error})") from None
    return {name: tuple(x[f"{name}.{part}"].float() * x[f"{name}.{part}_scale"][:, None] for part in "AB") for name in names}, header


def read_header(path: Path) -> Header:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ConfigError("model.adapter", path, f"its format is {metadata.get('format')}, must be {FORMAT}")
        header = Header(**json.loads(metadata["adapter"]))
        if not (_number(header.rope_theta) and header.rope_theta > 0 and _number(header.scale) and _number(header.positions, int)):
            raise ValueError("its header has a number that is none")
        if not 1 <= header.positions <= MOST_POSITIONS:
            raise ValueError(f"its header has {header.positions} positions, must be 1 to {MOST_POSITIONS}")
        return header
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError("model.adapter", path, f"cannot be read as an adapter ({error})") from None


def _number(value: object, kinds: type = int | float) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def packaged(name: str) -> Path:
    """Where an adapter lies that ships with the package."""
    return Path(__file__).parent.parent / "probe" / name


def find(spec) -> Path | None:
    """The checked adapter of a ``conf/model`` node, or None if it has none. A bare name is a file that ships with the package."""
    if not spec.get("adapter"):
        if spec.get("adapter_sha256"):
            raise ConfigError("model.adapter", None, "must be a file while model.adapter_sha256 names one; model=smollm2 is the base model")
        return None
    path = Path(str(spec.adapter))
    if not path.is_file() and path.name == str(path):
        path = packaged(path.name)
    if not path.is_file():
        raise ConfigError("model.adapter", spec.adapter, "no such file")
    if path.stat().st_size > _MOST:
        raise ConfigError("model.adapter", path, f"has {path.stat().st_size} bytes, at most {_MOST} are read")
    wanted = spec.get("adapter_sha256")
    if wanted and (found := sha256(path)) != wanted:
        raise ConfigError("model.adapter", path, f"sha256 is {found}, must be {wanted}; the file is damaged or another version")
    header = read_header(path)
    if not spec.path and header.base_sha256 != spec.gguf_sha256:
        raise ConfigError("model.adapter", path, f"was trained on a base with sha256 {header.base_sha256}, not on {spec.gguf_sha256}")
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def extend(config, header: Header) -> None:
    """Give a transformers configuration the adapter's RoPE base and positions."""
    config.rope_parameters = dict(config.rope_parameters or {}) | {"rope_type": "default", "rope_theta": header.rope_theta}
    config.max_position_embeddings = header.positions


def merge(network: torch.nn.Module, factors: Factors, scale: float, fail: Callable[[str], Exception] = ValueError) -> None:
    """Add scale * B @ A to the weights, in float32, in place. ``fail`` makes the exception for an adapter of another architecture."""
    for name, (a, b) in factors.items():
        try:
            weight = network.get_parameter(f"{name}.weight")
            if (*b.shape[:1], *a.shape[1:]) != weight.shape:  # before a product is made of it
                raise AttributeError(f"{name} has another shape")
            delta = scale * b.to(weight.device) @ a.to(weight.device)
        except (AttributeError, RuntimeError) as error:
            raise fail(f"does not fit the model ({error})") from None
        with torch.no_grad():
            weight.copy_(weight.float() + delta)


def round_weights(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give all parameters a dtype. Buffers keep theirs: RoPE's frequencies must stay float32."""
    for weight in network.parameters():
        weight.data = weight.data.to(dtype)
    network.config.dtype = dtype
