"""A run on a disk that fills up, then on one that is read-only: ``python -m tests.disk`` as root, who may mount a small tmpfs."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import kills


def command(args: list[str]) -> tuple[int, str]:
    """Exit code and the last line of what a run prints on stderr."""
    env = os.environ | {"TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-m", "macbench.run", *args], capture_output=True, text=True, env=env, timeout=600)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def mount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", *options, str(folder)], check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model, disk = kills.tiny_model(Path(scratch) / "model"), Path(scratch) / "disk"
        disk.mkdir()
        mount(disk, "-t", "tmpfs", "-o", "size=600k", "tmpfs")
        found = {}
        try:
            args = kills.arguments(model, disk / "runs", 40)
            found["full"] = command(args)
            found["whole parts"] = kills.parts(disk)
            found["half files"] = len(list(disk.rglob(".writing-*")))
            mount(disk, "-o", "remount,ro")
            found["read-only"] = command(args)
            mount(disk, "-o", "remount,rw,size=50m")
            found["room again"] = command(args)[0]
            found["examples"] = kills.parts(disk)
            (run,) = (path.parent for path in disk.rglob("config.yaml"))
            verify = [sys.executable, "-m", "macbench.verify", str(run), "examples=2", "device=cpu"]
            found["verify"] = subprocess.run(verify, capture_output=True, text=True).stdout.strip().splitlines()[0].partition(": ")[2]
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
