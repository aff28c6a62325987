"""Two versions of the code work on one run at the same time: ``python -m tests.versions``, from a checkout with git.

The other version is a second checkout whose last commit changes ``macbench.__version__``. Both begin with nothing recorded.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from macbench.records import KEY
from tests import kills

HERE = Path(__file__).parents[1]
EXAMPLES = 24


def git(folder: Path, *args: str) -> str:
    who = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    return subprocess.run(["git", *who, *args], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def start(checkout: Path, args: list[str]) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'kernels'}", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "macbench.run", *args]
    return subprocess.Popen(command, cwd=checkout, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        other = folder / "other"
        git(HERE, "worktree", "add", "--detach", str(other))
        try:
            init = other / "macbench" / "__init__.py"
            init.write_text(init.read_text().replace('__version__ = "', '__version__ = "99.'))
            git(other, "commit", "-qam", "Another version")
            runs, args = folder / "runs", kills.arguments(kills.tiny_model(folder / "model"), folder / "runs", EXAMPLES)
            processes = [start(checkout, args) for checkout in (HERE, other)]
            said = [process.communicate()[1] for process in processes]
            rows = kills.tables(runs)["samples"]
            facts = [json.loads(pq.read_schema(path).metadata[b"macbench"]) for path in runs.rglob("samples/part-*.parquet")]
            (run,) = (path.parent for path in runs.rglob("config.yaml"))
            verify = [sys.executable, "-m", "macbench.verify", str(run), "examples=2", "device=cpu"]
            found = {
                "exit codes": [process.returncode for process in processes],
                "tracebacks": sum("Traceback" in text for text in said),
                "told": [line for text in said for line in text.splitlines() if "was begun with" in line],
                "examples": int(rows.example_id.nunique()),
                "duplicates": int(rows.duplicated(KEY).sum()),
                "examples by commit": dict(Counter(fact["git"]["commit"][:10] for fact in facts)),
                "verify": subprocess.run(verify, capture_output=True, text=True).stdout.strip().splitlines(),
            }
            print(json.dumps(found, indent=1))
        finally:
            git(HERE, "worktree", "remove", "--force", str(other))


if __name__ == "__main__":
    main()
