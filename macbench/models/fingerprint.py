"""Hashes of a model, so that a run cannot go on with another one: its weights, and what else its folder says about it."""

import contextlib
import hashlib
import re
from pathlib import Path

from macbench.files import write_whole
from macbench.models import lora
from macbench.models.smollm2 import cache_root
from macbench.models.weights import folder_or_id

# What transformers reads of a folder besides weights: configurations, tokenizer, chat template.
_DESCRIPTION = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "vocab.txt", "merges.txt")

_LARGE = 64 << 20  # bytes; hashing less takes no longer than looking it up is worth


def hashes(spec) -> dict[str, str | None]:
    """Of a ``conf/model`` node, over names and contents of files: ``weights_sha256`` (safetensors) and ``model_sha256`` (configuration,
    tokenizer, chat template, adapter). None where there are no such files (random weights), and for a description that this program wrote
    itself, from a GGUF whose hash is in the configuration."""
    folder = _folder(folder_or_id(spec), spec.get("revision") or "main")
    adapter = lora.find(spec)
    described = [*_files(folder if spec.path else None, *_DESCRIPTION), *([f"adapter {_sha256(adapter)}"] if adapter else [])]
    return {"weights_sha256": _over(_files(folder, "*.safetensors")), "model_sha256": _over(described)}


def _files(folder: Path | None, *patterns: str) -> list[str]:
    """A line per file: its name in the folder and its hash."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()} if folder else ()
    return [f"{path.relative_to(folder).as_posix()} {_sha256(path)}" for path in sorted(found)]


def _over(lines: list[str]) -> str | None:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None


def _folder(where: str, revision: str) -> Path | None:
    """The local folder, or that of the hub's cache."""
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(where, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _sha256(path: Path) -> str:
    """Of a file's content. Large files take minutes, so what was found is kept, by path, size and time of change."""
    if re.fullmatch(r"[0-9a-f]{64}", path.resolve().name):
        return path.resolve().name  # the hub's cache names files by their hash
    stat = path.stat()
    if stat.st_size < _LARGE:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    known = cache_root() / "hashes" / hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    if known.is_file():
        return known.read_text()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        known.parent.mkdir(parents=True, exist_ok=True)
        write_whole(known, lambda file: file.write(found.encode()))
    return found
