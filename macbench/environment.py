"""What was run where: versions, device, commit and command, for environment.json and the metadata of every parquet part."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from macbench.errors import ConfigError
from macbench.redact import redact
from macbench.untrusted import document

_PACKAGES = (
    *("macbench", "torch", "transformers", "accelerate", "triton", "tokenizers", "safetensors", "gguf", "datasets", "numpy", "pandas", "pyarrow"),
    *("hydra-core", "wonderwords", "flash-attn", "flashinfer-python"),
)
# What two processes that work on one run should have in common, or the table says nothing about either.
_SHARED = ("git", "device", "backend", "dtype", "packages")


def facts(device: str, backend: str, dtype: str, model: dict | None = None, module: str = "macbench.run") -> dict:
    """A JSON-able description of this process, which runs ``module``. ``model``: its hashes."""
    return {
        "command": shlex.join(["python", "-m", module, *map(redact, _arguments())]),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({torch.get_num_threads()} threads)",
        "driver": _driver() if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "backend": backend,
        "dtype": dtype,
        **(model or {}),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _arguments() -> list[str]:
    """Of the command line; those of a sweep's job are its own, wherever a launcher runs it and whatever that says to its processes."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return list(HydraConfig.get().overrides.task)
    return sys.argv[1:]


def continued(run: Path, now: dict) -> list[str]:
    """Lines for the user about a run that another version of the code, or another machine, began; other weights are a ConfigError."""
    try:
        earlier = document(run / "environment.json")
    except (OSError, ValueError):
        return []
    for key, what in (("weights_sha256", "other weights"), ("model_sha256", "another configuration, tokenizer or adapter of the model")):
        before = earlier.get(key)
        if before and now.get(key) and before != now[key]:
            raise ConfigError("model.path", run, f"this run was begun with {what} (sha256 {str(before)[:12]}); use another runs_dir for this one")
    changed = [f"{key} {_short(earlier[key])}, now {_short(now[key])}" for key in _SHARED if key in earlier and earlier[key] != now[key]]
    what = "; rows of both will stand in one table, python -m macbench.verify lists them"
    return [f"the run was begun with {'; '.join(changed)}{what}"] if changed else []


def label(facts: bytes | None) -> str:
    """A few words for the facts in a part's metadata: commit, torch and device."""
    try:
        found = json.loads(facts or b"{}")
        return ", ".join([_short(found.get("git")), f"torch {found.get('packages', {}).get('torch')}", str(found.get("device"))])
    except (ValueError, AttributeError):
        return "unreadable facts"


def _short(value: object) -> str:
    if isinstance(value, dict) and "commit" in value:
        return f"{str(value['commit'])[:10]}{' with changes' if value.get('dirty') else ''}"
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _driver() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def to_json(data: dict) -> str:
    return json.dumps(data, indent=1, default=str) + "\n"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict | None:
    """Commit and whether tracked files differ from it, if the package runs from a checkout.

    For a copy of the tree without its history, MACBENCH_COMMIT may say what it is a copy of; whether it still is one is unknown then.
    """
    here = Path(__file__).resolve()

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here.parent, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed package may lie inside somebody else's checkout
        changes = git("diff", "HEAD", "--", ":/", ":(top,exclude)runs")  # records are no code
        found = {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
        return found | ({"diff_sha256": hashlib.sha256(changes.encode()).hexdigest()} if changes else {})
    except (OSError, subprocess.SubprocessError):
        claimed = os.environ.get("MACBENCH_COMMIT")
        return {"commit": claimed, "dirty": None} if claimed else None
