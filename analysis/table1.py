"""Table 1: accuracy, hit rate and KV reads saved, models x benchmarks; and table 4, the same for a mixture of experts."""

from pathlib import Path

import pandas as pd

from analysis import style, table
from analysis.load import swept
from analysis.records import Missing, Records, Source
from analysis.style import Drawn
from macbench.summary import REFERENCE

NAME = "table1"
TITLE = "Table 1: accuracy, hit rate and KV reads saved"
PAPER = "up to 99% fewer KV reads at the accuracy of full attention (second-hand)."
# What the paper measures and nothing here does: model, benchmark.
PAPERS = [
    (model, benchmark)
    for model in ("Llama-3.1-8B", "Llama-3.1-70B", "Qwen2.5-7B", "Mistral-7B")
    for benchmark in ("RULER 120K", "LongBench v2", "LongGenBench 16K")
]
_OF_MAC = ["difference", "difference_low", "difference_high", "wins", "losses", "hit_rate", "rho_log", "rho_phys", "rho_bytes"]
WHY = "weights need an account or a hub; +experiment=table1 scale=paper runs them"


def compared(records: Records) -> tuple[pd.DataFrame, list[Source], list[str]]:
    """The headline rows of full attention and MAC of every run that has both (a GPU's where there is one), their sources, and what is missing."""
    found, lacks = {}, []
    for run in records.runs:
        try:
            source, frame = records.source(run), records.samples(run)
        except Missing as lack:
            lacks.append(str(lack))
            continue
        if {REFERENCE, "mac"} <= set(frame.method) and not swept(frame):
            first = frame.iloc[0]
            key = (first.model, first.task, first.ctx, source.apart)
            rank = ("NVIDIA" in source.device, len(frame[frame.method == "mac"]), source.facts.get("started", ""))
            if key not in found or rank > found[key][0]:
                found[key] = (rank, records.headline(run), source, source.part(set(frame.subtask)))
    rows = []
    for (model, task, ctx, apart), (_, both, source, part) in sorted(found.items()):
        full, mac = (both[both.method == m].iloc[0] for m in (REFERENCE, "mac"))
        row = {"model": model, "task": task, "ctx": ctx, "examples": int(mac.examples), "steps": int(mac.steps), "device": source.device}
        row |= {"full": full.score, "full_se": full.score_se, "mac": mac.score, "mac_se": mac.score_se}
        rows.append(row | {"apart": apart, "part": part} | mac[_OF_MAC].to_dict())
    return pd.DataFrame(rows), [source for _, _, source, _ in found.values()], lacks


def scored(mean: float, error: float) -> str:
    """A score with its standard error, if it has one."""
    return f"{mean:.3f}" if pd.isna(error) else f"{mean:.3f} ± {error:.3f}"


def differing(row) -> str:
    """A difference to full attention with its interval, if it has one; none without width, which would say too much."""
    interval = "" if pd.isna(row.difference_low) else f" [{row.difference_low:+.3f}, {row.difference_high:+.3f}]"
    return f"{row.difference:+.3f}{interval if row.wins + row.losses else ', none differs'}"


def shown(found: pd.DataFrame) -> pd.DataFrame:
    """As text."""
    rows = []
    for r in found.itertuples():
        benchmark = ", ".join(filter(None, [f"{r.task} {style.tokens(r.ctx)}", r.part, r.apart]))
        row = {"model": r.model, "benchmark": benchmark, "n": str(r.examples), "full": scored(r.full, r.full_se)}
        row |= {"MAC": scored(r.mac, r.mac_se), "difference [95%]": differing(r), "hit rate": f"{r.hit_rate:.3f}"}
        saved = {
            f"{name} saved": f"{100 * (1 - getattr(r, rho)):.1f}%"
            for name, rho in (("tokens", "rho_log"), ("rows", "rho_phys"), ("bytes", "rho_bytes"))
        }
        rows.append(row | saved | {"steps": f"{r.steps:,}"})
    return pd.DataFrame(rows)


def make(records: Records, out: Path) -> list[Drawn]:
    found, sources, lacks = compared(records)
    if found.empty:
        raise Missing("; ".join(lacks) or "no run has both full attention and MAC; python -m macbench.run +experiment=table1 scale=cpu makes one")
    frame = shown(found)
    blank = [{"model": model, "benchmark": benchmark} for model, benchmark in PAPERS]
    whole = pd.concat([frame, pd.DataFrame(blank)]).fillna(table.MISSING)
    what = "MAC with tau 0.45, window 512, band 256 unless a run says otherwise; saved: 1 - rho of query heads' tokens, KV rows, bytes"
    text = f"{style.made(sources, what)} {table.MISSING} not run: {WHY}."
    return [table.save(whole, out, NAME, TITLE, " ".join([text, *lacks]), PAPER)]
