"""What a decode step of every method takes, from runs that had the card to themselves, for the tables at equal bytes.

    python -m analysis.step_times RUNS_DIR [RUNS_DIR ...] [out=runs/reference/h100/step_times.parquet]

A run for this is short, and one process makes it: the times of processes that share a card say nothing of a method. Median and 90th percentile over
all steps; the requests of a batch decode in step, so a step is a token of each of them. The first step of a generation counts like the others:
compiling and capturing come before it.
"""

import json
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa

from analysis.load import BUDGET, run_folders, swept
from analysis.table import markdown
from macbench.attention.table import write
from macbench.errors import ConfigError
from macbench.records import read_table
from macbench.untrusted import configuration

_KEY = [("ctx", pa.int64()), ("batch", pa.int64()), ("method", pa.string()), ("budget", pa.string())]
SCHEMA = pa.schema([*_KEY, ("steps", pa.int64()), ("ms_p50", pa.float64()), ("ms_p90", pa.float64()), ("device", pa.string())])


def measured(folders: list[Path]) -> pd.DataFrame:
    """A row of ``SCHEMA`` per context, batch, method and ``budget`` (text; '' of what runs as it is). Sweeps are left out."""
    rows = []
    for folder in folders:
        steps = read_table(folder, "steps", ["method", "variant", "latency_ms"])
        if swept(steps):
            continue
        batch, device = configuration(folder).get("batch") or 1, _facts(folder)["device"]
        for (method, variant), part in steps.groupby(["method", "variant"], sort=False):
            found = BUDGET.search(variant)
            key = {"ctx": int(folder.parent.name), "batch": batch, "method": method, "budget": found[1] if found else ""}
            spread = {"ms_p50": part.latency_ms.median(), "ms_p90": part.latency_ms.quantile(0.9)}
            rows.append(key | {"steps": len(part)} | spread | {"device": device})
    table = pd.DataFrame(rows, columns=SCHEMA.names)
    twice = table[table.duplicated(["ctx", "batch", "method", "budget"])]
    if len(twice):
        raise ConfigError("RUNS_DIR", str(folders[-1]), f"{twice.iloc[0].method} at ctx={twice.iloc[0].ctx} is in two runs: name one for each length")
    return table.sort_values(["ctx", "batch"], kind="stable", ignore_index=True)


def _facts(folder: Path) -> dict:
    return json.loads((folder / "environment.json").read_text())


def main(arguments: list[str]) -> None:
    roots = [a for a in arguments if not a.startswith("out=")]
    folders = run_folders(*roots)
    if not folders:
        sys.exit("analysis.step_times: no runs below " + " ".join(roots))
    try:
        table = measured(folders)
        shown = table.assign(ms_p50=table.ms_p50.map("{:.2f}".format), ms_p90=table.ms_p90.map("{:.2f}".format))
        print(markdown(shown.astype(str)))
        facts = _facts(folders[0])
        for target in (a.removeprefix("out=") for a in arguments if a.startswith("out=")):
            write(table.to_dict("records"), Path(target), {key: facts.get(key) for key in ("command", "git", "device", "packages")}, SCHEMA)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
