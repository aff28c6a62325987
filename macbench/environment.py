"""What was run where: versions, device, commit and command, for environment.json and the metadata of every parquet part."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

_PACKAGES = ("macbench", "torch", "transformers", "triton", "tokenizers", "datasets", "numpy", "wonderwords", "flash-attn", "flashinfer-python")


def facts(device: str, backend: str, dtype: str) -> dict:
    """A JSON-able description of this process."""
    return {
        "command": shlex.join(["python", "-m", "macbench.run", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({torch.get_num_threads()} threads)",
        "backend": backend,
        "dtype": dtype,
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


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
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        claimed = os.environ.get("MACBENCH_COMMIT")
        return {"commit": claimed, "dirty": None} if claimed else None
