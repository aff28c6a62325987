"""What a training has learnt by its last 40%, from what it wrote: the share of questions answered exactly, by length and by family.

    python -m macbench.probe.learnt runs/reference/h200/probe/seed1 runs/reference/h200/probe/seed2

Each is the ``--out`` folder of a training. Every step's sequences are new and are answered before their weights are updated, so the shares
are of unseen sequences. By length: mean over steps (which are what varies independently) with its standard error; of two trainings also the
difference, second - first, with its 95% bootstrap interval. By family: first questions, asked as in an evaluation, of all folders together.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from macbench import stats
from macbench.errors import ConfigError
from macbench.probe.progress import ANSWERS, LOG

LAST = 0.6  # share of the plan from which on steps count


def read(folder: Path, name: str, columns: list[str]) -> pd.DataFrame:
    """Columns of a file that a training wrote."""
    try:
        return pd.read_json(folder / name, lines=True)[columns]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError("FOLDER", folder, f"must hold the {name} of a training, with {', '.join(columns)}") from error


def by_length(folders: list[Path]) -> pd.DataFrame:
    """A row per length (tokens): for every folder steps, share and standard error; of two also the difference and its interval."""
    logs = [read(folder, LOG, ["progress", "length", "exact"]) for folder in folders]
    logs = [log[log.progress >= LAST] for log in logs]
    rows = []
    for length in sorted(set().union(*(log.length for log in logs))):
        shares = [log.exact[log.length == length].to_numpy(float) for log in logs]
        row = {"length": int(length)}
        for i, share in enumerate(shares, 1):
            known = len(share) > 0
            row |= {f"steps {i}": len(share), f"exact {i}": share.mean() if known else np.nan}
            row |= {f"se {i}": stats.standard_error([share]) if known else np.nan}
        if len(shares) == 2 and all(len(share) > 1 for share in shares):
            # The mean over the strata x and -y is half of the difference of their means.
            low, high = stats.bootstrap_interval([shares[1], -shares[0]])
            row |= {"difference": shares[1].mean() - shares[0].mean(), "low": 2 * low, "high": 2 * high}
        rows.append(row)
    return pd.DataFrame(rows)


def by_family(folders: list[Path]) -> pd.DataFrame:
    """A row per family, a column per length (tokens): right first questions / first questions of the tables that begin in the last 40%."""
    found = pd.concat([read(folder, ANSWERS, ["since", "length", "family", "first_right", "first"]) for folder in folders])
    sums = found[found.since >= LAST].groupby(["family", "length"])[["first_right", "first"]].sum()
    cells = sums.first_right.astype(str) + "/" + sums["first"].astype(str)
    return cells.unstack("length").fillna("–").rename_axis(columns=None).reset_index()


def main(arguments: list[str]) -> int:
    folders = [Path(argument) for argument in arguments]
    if not folders:
        print("macbench: python -m macbench.probe.learnt FOLDER [FOLDER]: names what a training wrote to, --out", file=sys.stderr)
        return 2
    try:
        lengths, families = by_length(folders), by_family(folders)
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        return 2
    print(lengths.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    print(families.to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
