"""Draw what the records hold: ``python -m analysis.figures [RUNS_DIR ...]`` (``make figures``) writes figures/*.png and *.pdf.

One picture per benchmark, model and context: score against KV bytes read, per method variant, bars of one standard error.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from analysis.load import run_folders, samples
from macbench.summary import summarise

OUT = Path("figures")
# Okabe and Ito's palette, told apart by colour-blind readers; markers differ too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vP*X"


def accuracy_against_bytes(frame: pd.DataFrame, name: str) -> list[Path]:
    """One figure from the sample rows of one (task, model, ctx); returns the files."""
    table = summarise(frame)
    whole = table[table.subtask == "all"] if (table.subtask == "all").any() else table
    figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for i, (method, group) in enumerate(whole.groupby("method", sort=False)):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 6, "linewidth": 1}
        group = group.sort_values("rho_bytes")
        axes.errorbar(group.rho_bytes, group.score, yerr=group.score_se.fillna(0), capsize=3, label=method, **style)
        for row in group.itertuples():
            if row.variant:
                axes.annotate(row.variant, (row.rho_bytes, row.score), textcoords="offset points", xytext=(6, 4), fontsize=7)
    axes.set(xlabel="KV bytes read / full attention (rho_bytes)", ylabel="score", ylim=(-0.03, 1.03))
    axes.set_xlim(left=0, right=max(1.1, 1.05 * whole.rho_bytes.max()))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    first = frame.iloc[0]
    examples = frame.groupby(["subtask", "example_id"]).ngroups
    shown = f"{first.task} {first.model} ctx {first.ctx}: {frame.subtask.nunique()} subtasks, {examples} examples"
    axes.set_title(f"{shown}\n{first.device}, commit {first.commit}, {int(frame.decode_steps.sum())} decode steps", fontsize=8, loc="left")
    files = [OUT / f"{name}.{kind}" for kind in ("png", "pdf")]
    for file in files:
        figure.savefig(file, dpi=200)
    plt.close(figure)
    return files


def main(roots: list[str]) -> int:
    folders = run_folders(*roots)
    if not folders:
        print(f"figures: no runs below {', '.join(roots)}", file=sys.stderr)
        return 2
    OUT.mkdir(exist_ok=True)
    for folder in folders:
        frame = samples(folder)
        if frame.empty:
            print(f"figures: {folder} has no finished example", file=sys.stderr)
            continue
        first = frame.iloc[0]
        files = accuracy_against_bytes(frame, f"{first.task}-{first.model}-{first.ctx}-{folder.name}")
        print(*files)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["runs"]))
