"""Methods at equal measured bytes: the tables of README.md and of docs/equal_bytes.md, from parquet.

python -m analysis.equal_bytes [RUNS_DIR ...]          a row per method, a column per context and budget: score [95% interval against full attention]
python -m analysis.equal_bytes --full [RUNS_DIR ...]   everything that a comparison measures, a table per context

Without folders, from the reference runs of task=ruler. Both are Markdown. ms/token is that of the reference's own short runs (analysis.step_times),
where there are any, since the processes that made the others shared a card; else, or for other folders, that of the runs.
"""

import sys
from pathlib import Path

import pandas as pd

from analysis.load import RUNS, measured, run_folders
from analysis.step_times import recorded
from analysis.table import MISSING, markdown
from macbench.errors import ConfigError

REFERENCE_TIMES = "runs/reference/*/step_times.parquet"
FLOOR = "floor"  # a method that other budgets were found for cannot read so little


def short(folders: list[Path]) -> str:
    """Scores with the interval of their difference to full attention; below, methods that no budget was found for, at their own ratios."""
    found = {ctx: table.set_index(["method", "variant"]) for ctx, table in measured(folders).items()}
    places = [(ctx, budget) for ctx, table in found.items() for budget in sorted({b for _, b in table.index if b}, key=float)]
    everyone = list(dict.fromkeys(method for table in found.values() for method, _ in table.index))
    fitted = [name for name in everyone if any((name, budget) in found[ctx].index for ctx, budget in places)]

    def at(name: str, ctx: int, budget: str = "") -> pd.Series | None:
        return found[ctx].loc[(name, budget)] if (name, budget) in found[ctx].index else None

    def rank(name: str) -> list[float]:
        rows = (at(name, *place) for place in reversed(places[: len(places) // len(found)]))
        return [1.0 if row is None else -row.score for row in rows]

    budgets = pd.DataFrame({"method": sorted(fitted, key=rank)})
    for ctx, budget in places:
        budgets[f"{ctx // 1024}K, {budget}"] = [_score(at(name, ctx, budget), 2) for name in budgets.method]
    own = pd.DataFrame({"at its own ratio": [name for name in everyone if name not in fitted]})
    for ctx in found:
        rows = [at(name, ctx) for name in own.iloc[:, 0]]
        own[f"rho_bytes, {ctx // 1024}K"] = [_number(row, "rho_bytes", ".2f") for row in rows]
        own[f"score, {ctx // 1024}K"] = [_score(row, 3) for row in rows]
        own[f"next tokens, {ctx // 1024}K"] = [_number(row, "top1_agreement", ".1%") for row in rows]
    return "\n\n".join(markdown(table) for table in (budgets, own) if len(table))


def _score(row: pd.Series | None, digits: int) -> str:
    if row is None:
        return FLOOR
    ends = (row.difference_low, row.difference_high)
    return f"{row.score:.{digits}f}" + (" [{:+.2f}, {:+.2f}]".format(*ends) if pd.notna(ends[0]) else "")


def _number(row: pd.Series | None, name: str, form: str) -> str:
    return MISSING if row is None or pd.isna(row[name]) else format(row[name], form)


def full(folders: list[Path], times: pd.Series | None = None) -> str:
    """Score with its interval against full attention, the three ratios, time per token and fidelity. ``times``: ms by ctx, method and budget."""
    names = ["method", "budget", "score", "vs full [95%]", "W/L/T", "n(1pt)", "rho_log", "rho_phys", "rho_bytes", "ms/token", "top1", "KL", "err"]
    parts = []
    for ctx, table in measured(folders).items():
        if times is not None:
            table = table.assign(ms_per_token=[times.get((ctx, row.method, row.variant)) for row in table.itertuples()])
        rows = pd.DataFrame([_cells(row) for row in table.itertuples()], columns=names)
        parts.append(f"## {ctx // 1024}K, {int(table.examples.max())} examples\n\n{markdown(rows)}")
    return "\n\n".join(parts)


def interval(row) -> str:
    """The difference to full attention with its interval, where there are any."""
    if pd.isna(row.difference):
        return "-"
    return f"{row.difference:+.3f}" + (f" [{row.difference_low:+.3f}, {row.difference_high:+.3f}]" if pd.notna(row.difference_low) else "")


def _cells(row) -> list[str]:
    against = pd.notna(row.difference)
    numbers = [(row.rho_log, ".3f"), (row.rho_phys, ".3f"), (row.rho_bytes, ".3f"), (row.ms_per_token, ".2f")]
    numbers += [(row.top1_agreement, ".3f"), (row.kl_mean, ".3f"), (row.output_error, ".3f")]
    return [
        *(row.method, row.variant, f"{row.score:.3f} ± {row.score_se:.3f}", interval(row)),
        f"{row.wins:.0f}/{row.losses:.0f}/{row.ties:.0f}" if against else "-",
        f"{row.examples_needed:.0f}" if pd.notna(row.examples_needed) else "-",
        *(format(value, form) if pd.notna(value) else "-" for value, form in numbers),
    ]


def main(arguments: list[str]) -> None:
    roots = [a for a in arguments if a != "--full"] or [RUNS]
    folders = run_folders(*roots)
    if not folders:
        sys.exit("analysis.equal_bytes: no runs below " + " ".join(map(str, roots)))
    try:
        print(full(folders, recorded(REFERENCE_TIMES) if roots == [RUNS] else None) if "--full" in arguments else short(folders))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
