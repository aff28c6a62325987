"""What a decode step of every method takes, from runs that had the card to themselves, for the tables at equal bytes.

    python -m analysis.step_times RUNS_DIR [RUNS_DIR ...] [out=runs/reference/h100/step_times.parquet]

A run for this is short, and one process makes it: the times of processes that share a card say nothing of a method. A row per request, with the mean
time of its steps (tpot_ms of the samples): the requests of a batch decode in step, so a step is a token of each of them. Compiling and capturing come
before the first step.
"""

import json
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa

from analysis.load import BUDGET, run_folders, samples, swept
from analysis.table import markdown
from macbench import parts
from macbench.attention.table import write
from macbench.errors import ConfigError
from macbench.untrusted import configuration

_TEXT, _INT = pa.string(), pa.int64()
_KEY = [("ctx", _INT), ("batch", _INT), ("method", _TEXT), ("budget", _TEXT), ("subtask", _TEXT), ("example_id", _TEXT)]
SCHEMA = pa.schema([*_KEY, ("steps", _INT), ("ms", pa.float64()), ("device", _TEXT)])


def measured(folders: list[Path]) -> pd.DataFrame:
    """A row of ``SCHEMA`` per request, ``ms`` being the mean of its steps and ``budget`` text ('' of what runs as it is). Sweeps are left out."""
    found = []
    for folder in folders:
        frame = samples(folder)
        if not swept(frame):
            budget = frame.variant.str.extract(BUDGET, expand=False).fillna("")
            found.append(frame.assign(batch=configuration(folder).get("batch") or 1, budget=budget, steps=frame.decode_steps, ms=frame.tpot_ms))
    table = pd.concat(found)[SCHEMA.names] if found else pd.DataFrame(columns=SCHEMA.names)
    twice = table[table.duplicated([name for name, _ in _KEY])]
    if len(twice):
        raise ConfigError("RUNS_DIR", str(folders[-1]), f"{twice.iloc[0].method} at ctx={twice.iloc[0].ctx} is in two runs: name one for each length")
    return table.sort_values(["ctx", "batch"], kind="stable", ignore_index=True)


def medians(table: pd.DataFrame) -> pd.Series:
    """Median over the requests, ms, by ctx, method and budget, in the table's order."""
    return table.groupby(["ctx", "method", "budget"], sort=False).ms.median()


def recorded(pattern: str) -> pd.Series | None:
    """``medians`` of the first file that matches; None without one."""
    files = sorted(Path().glob(pattern))
    return medians(parts.read(files[0]).to_pandas()) if files else None


def main(arguments: list[str]) -> None:
    roots = [a for a in arguments if not a.startswith("out=")]
    folders = run_folders(*roots)
    if not folders:
        sys.exit("analysis.step_times: no runs below " + " ".join(roots))
    try:
        table = measured(folders)
        print(markdown(medians(table).map("{:.2f}".format).reset_index().astype(str)))
        facts = json.loads((folders[0] / "environment.json").read_text())
        for target in (a.removeprefix("out=") for a in arguments if a.startswith("out=")):
            write(table.to_dict("records"), Path(target), {key: facts.get(key) for key in ("command", "git", "device", "packages")}, SCHEMA)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
