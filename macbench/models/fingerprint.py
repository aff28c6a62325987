"""One hash of a model's weights, so that a run cannot go on with others."""

import contextlib
import hashlib
import re
from pathlib import Path

from macbench.files import write_whole
from macbench.models.smollm2 import cache_root
from macbench.models.weights import folder_or_id


def weights_sha256(spec) -> str | None:
    """Over names and contents of the safetensors files of a ``conf/model`` node; None where there are none (random weights)."""
    folder = _folder(folder_or_id(spec), spec.get("revision") or "main")
    files = sorted(folder.glob("*.safetensors")) if folder else []
    lines = [f"{path.name} {_sha256(path)}" for path in files]
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
    known = cache_root() / "hashes" / hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    if known.is_file():
        return known.read_text()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        known.parent.mkdir(parents=True, exist_ok=True)
        write_whole(known, lambda file: file.write(found.encode()))
    return found
