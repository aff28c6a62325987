"""Methods at equal measured bytes: the tables of README.md and of docs/equal_bytes.md, from parquet.

python -m analysis.equal_bytes [RUNS_DIR ...]          a row per method, a column per context and budget
python -m analysis.equal_bytes --full [RUNS_DIR ...]   everything that a comparison measures, a table per context

Without folders, from the reference runs of task=ruler. Both are Markdown. ms/token is that of the reference's own short runs (analysis.step_times),
where there are any, since the processes that made the others shared a card; else, or for other folders, that of the runs.
"""

import sys
from pathlib import Path

import pandas as pd

from analysis.load import compared, run_folders
from analysis.sanity import RUNS
from analysis.table import markdown
from macbench import parts
from macbench.errors import ConfigError
from macbench.summary import REFERENCE, headline, summarise

REFERENCE_TIMES = "runs/reference/*/step_times.parquet"
FLOOR = "floor"  # a method that other budgets were found for cannot read so little


def measured(folders: list[Path]) -> dict[int, pd.DataFrame]:
    """By context length, a row per method and ``budget`` (text; '' of what runs as it is) over all subtasks: see ``summary.COLUMNS``."""
    return {ctx: headline(summarise(part, each=False)) for ctx, part in compared(folders).items()}


def short(folders: list[Path]) -> str:
    """Scores; below, those of methods that no budget was found for, with their ratios."""
    found = {ctx: table.set_index(["method", "variant"]) for ctx, table in measured(folders).items()}
    places = [(ctx, budget) for ctx, table in found.items() for budget in sorted({b for _, b in table.index if b}, key=float)]
    everyone = list(dict.fromkeys(method for table in found.values() for method, _ in table.index))
    fitted = [name for name in everyone if any((name, budget) in found[ctx].index for ctx, budget in places)]

    def score(name: str, ctx: int, budget: str) -> float:
        return found[ctx].score.get((name, budget), -1.0)

    fitted.sort(key=lambda name: [-score(name, *place) for place in reversed(places[: len(places) // len(found)])])
    cells = [[f"{s:.2f}" if (s := score(name, *place)) >= 0 else FLOOR for place in places] for name in fitted]
    columns = ["method", *(f"{ctx // 1024}K, {budget}" for ctx, budget in places)]
    lines = [markdown(pd.DataFrame([[name, *row] for name, row in zip(fitted, cells, strict=True)], columns=columns)), ""]
    for name in (name for name in everyone if name not in fitted):
        rows = {ctx: table.loc[(name, "")] for ctx, table in found.items() if (name, "") in table.index}
        said = ", ".join(f"{row.score:.2f} at {ctx // 1024}K ({row.rho_bytes:.2f})" for ctx, row in rows.items())
        lines.append(f"{name}: {said}" + ("" if name == REFERENCE else f"; next tokens {_shares(rows)}") + "  ")
    return "\n".join(lines)


def _shares(rows: dict) -> str:
    return ", ".join(f"{100 * row.top1_agreement:.1f}%" if pd.notna(row.top1_agreement) else "-" for row in rows.values())


def step_times() -> pd.DataFrame | None:
    """The reference's step times, by ctx, method and budget; None without."""
    files = sorted(Path().glob(REFERENCE_TIMES))
    return parts.read(files[0]).to_pandas().set_index(["ctx", "method", "budget"]).ms_p50 if files else None


def full(folders: list[Path], times: pd.Series | None = None) -> str:
    """Score with its interval against full attention, the three ratios, time per token and fidelity. ``times``: see ``step_times``."""
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
        print(full(folders, step_times() if roots == [RUNS] else None) if "--full" in arguments else short(folders))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
