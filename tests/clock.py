"""A run on a machine whose clock is set back while it works: ``python -m tests.clock``, with libfaketime installed (Debian: ``faketime``).

Three real commands on one run, of which two are killed: one with the right time; one whose clock is a day behind and is set back a year
in the middle of its work; and one a year ahead, for the rest. One after the other, since libfaketime makes ``time.sleep``, by which a
worker waits for others, an error.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from macbench.records import KEY
from tests import kills

EXAMPLES = 24


def start(args: list[str], faked: Path, when: str) -> subprocess.Popen:
    """A run whose clock reads its offset from a file once a second; monotonic clocks are left as they are."""
    faked.write_text(when)
    (library,) = [path for path in Path("/usr/lib").rglob("libfaketime.so.1")][:1]
    env = os.environ | {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(faked), "FAKETIME_CACHE_DURATION": "1"}
    env |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "macbench.run", *args], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def until(runs: Path, parts: int, process: subprocess.Popen) -> None:
    while kills.parts(runs) < parts and process.poll() is None:
        time.sleep(0.01)


def main() -> None:
    if not shutil.which("faketime"):
        sys.exit("tests.clock needs libfaketime: apt-get install faketime")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        runs, args = folder / "runs", kills.arguments(kills.tiny_model(folder / "model"), folder / "runs", EXAMPLES)
        right = start(args, folder / "right", "+0d")
        until(runs, 5, right)
        right.send_signal(signal.SIGKILL)
        right.wait()
        back = start(args, folder / "back", "-1d")
        until(runs, 15, back)
        (folder / "back").write_text("-366d")
        until(runs, 20, back)
        back.send_signal(signal.SIGKILL)
        back.wait()
        ahead = start(args, folder / "ahead", "+365d")
        said = [ahead.communicate()[1]]
        rows = kills.tables(runs)["samples"]
        status = subprocess.run([sys.executable, "-m", "macbench.status", str(runs)], capture_output=True, text=True).stdout
        (run,) = (path.parent for path in runs.rglob("config.yaml"))
        verify = [sys.executable, "-m", "macbench.verify", str(run), "examples=2", "device=cpu"]
        found = {
            "exit code": ahead.returncode,
            "said": [line for text in said for line in text.splitlines() if line.startswith(("macbench: ", "Traceback")) or "Error" in line],
            "examples": int(rows.example_id.nunique()),
            "duplicates": int(rows.duplicated(KEY).sum()),
            "started": sorted({json.loads(pq.read_schema(path).metadata[b"macbench"])["started"] for path in runs.rglob("samples/part-*.parquet")}),
            "left behind": [path.name for path in runs.rglob("leases/*")],
            "status": status.splitlines()[-1].split()[1:],
            "verify": subprocess.run(verify, capture_output=True, text=True).stdout.strip().splitlines()[0].partition(": ")[2],
        }
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
