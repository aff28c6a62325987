"""A sweep of shards by submitit's local executor: separate processes, as on a cluster, without one."""

import json
import os
import subprocess
import sys

import pandas as pd

from macbench.records import SCHEMAS
from tests import kills
from tests.test_cli import macbench  # noqa: F401


def test_shards_by_submitit_are_the_whole(macbench, tmp_path):  # noqa: F811
    model = kills.tiny_model(tmp_path / "model")
    sweep = ["-m", "shard=1/2,2/2", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    key = "sk-fake-0123456789abcdefXYZ"
    secret = ["++logger.project=own-" + key, "++logger.entity=${oc.env:HFTOKEN}"]
    command = [sys.executable, "-m", "macbench.run", *kills.arguments(model, tmp_path / "sharded", 4), *secret, *sweep]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENAI_API_KEY": key, "HFTOKEN": key}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    facts = json.loads(next((tmp_path / "sharded").rglob("environment.json")).read_text())
    assert "method=mac" in facts["command"] and " shard=" in facts["command"] and ".submitit" not in facts["command"]
    files = [path for path in (tmp_path / "sharded").rglob("*") if path.is_file()]
    assert {"multirun.yaml", "config.yaml"} <= {path.name for path in files} and any(path.suffix == ".pkl" for path in files)
    assert not [str(path) for path in files if key.encode() in path.read_bytes()] and key not in done.stdout + done.stderr
    assert macbench(*kills.arguments(model, tmp_path / "whole", 4))[0] == 0
    sharded, whole = kills.tables(tmp_path / "sharded"), kills.tables(tmp_path / "whole")
    for table in SCHEMAS:
        pd.testing.assert_frame_equal(sharded[table], whole[table])
    logs = list((tmp_path / "sharded" / ".sweep" / ".submitit").rglob("*_log.out"))
    assert len(logs) == 2 and all("records: " in log.read_text() for log in logs)
