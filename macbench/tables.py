"""Numbers as plain text: the tables that a run prints. What does not apply is a dash; columns that say nothing are left out."""

import textwrap

import pandas as pd

from macbench.summary import headline

_FORMATS = {
    "score": "{:.3f}",
    "score_se": "{:.3f}",
    "difference": "{:+.3f}",
    "mcnemar_p": "{:.3f}",
    "rho_log": "{:.4f}",
    "rho_phys": "{:.4f}",
    "rho_page": "{:.4f}",
    "rho_bytes": "{:.4f}",
    "hit_rate": "{:.4f}",
    "top1_agreement": "{:.4f}",
    "kl_mean": "{:.4f}",
    "output_error": "{:.4f}",
    "ms_per_token": "{:.1f}",
    "prefill_s": "{:.2f}",
}
_BY_SUBTASK = [
    *("method", "variant", "subtask", "examples", "errors", "score", "score_se", "difference", "p"),
    *("rho_log", "rho_phys", "rho_bytes", "hit_rate", "steps", "ms_per_token", "prefill_s"),
]
_WIDTH = 150  # characters of a line of text
_FEW = 4  # limits by subtask that the protocol's line names one by one
# What the columns of the comparison mean, printed below it.
_LEGEND = {
    "score ± se": "score: mean over subtasks, with one standard error",
    "vs full [95%]": "vs full: mean difference to full attention on the same examples, with its paired bootstrap interval",
    "W/L/T": "W/L/T: examples that score higher, lower, the same",
    "p": "p: exact McNemar test of right/wrong scores",
    "n(1pt)": "n(1pt): examples it takes to find a difference of 0.01 (two-sided 5%, power 80%)",
    "rho_log": "rho: read / full attention's, per query head, per stored row, per page of 16 rows (along that text), in bytes",
    "top1": "top1, KL: same next token, and nats between the predictions, along full attention's text",
    "err": "err: relative error of attention outputs along that text, mean over layers",
}


def protocol_card(facts: dict) -> str:
    """One line of what a reader must know to repeat the numbers; environment.json has all of it."""

    def short(value: object) -> str:
        if isinstance(value, dict):  # limits, by subtask
            few = len(value) <= _FEW
            return ", ".join(f"{n} ({name})" for name, n in value.items()) if few else f"{min(value.values())} to {max(value.values())}"
        return f"{value[:12]}..." if isinstance(value, str) and len(value) > 60 else str(value)

    def brief(value: object) -> bool:
        return bool(value) and all(isinstance(n, int) for n in value.values()) if isinstance(value, dict) else not isinstance(value, list)

    return "protocol: " + ", ".join(f"{key} {short(value)}" for key, value in facts.items() if brief(value))


def format_table(table: pd.DataFrame) -> str:
    """A row per method variant and subtask."""
    shown = table.assign(p=_p_values(table))[_BY_SUBTASK]
    for column in shown.columns.intersection(list(_FORMATS)):
        shown[column] = _texts(table, column)
    for column, nothing in (("variant", ""), ("errors", 0), ("difference", "-"), ("p", "-"), ("hit_rate", "-")):
        if (shown[column] == nothing).all():
            shown = shown.drop(columns=column)
    return shown.to_string(index=False)


def format_comparison(table: pd.DataFrame) -> str:
    """A row per method variant, over all subtasks: what to quote. Scores that take no reading stand below the methods'."""
    rows = headline(table)
    columns = {
        "method": list(rows.method),
        "variant": list(rows.variant),
        "n": [f"{n:.0f}" for n in rows.examples],
        "score ± se": [f"{x} ± {se}" if se != "-" else x for x, se in zip(_texts(rows, "score"), _texts(rows, "score_se"), strict=True)],
        "vs full [95%]": [_interval(row) for row in rows.itertuples()],
        "W/L/T": [f"{r.wins:.0f}/{r.losses:.0f}/{r.ties:.0f}" if pd.notna(r.wins) else "-" for r in rows.itertuples()],
        "p": _p_values(rows),
        "n(1pt)": [f"{n:.0f}" if pd.notna(n) else "-" for n in rows.examples_needed],
        **{name: _texts(rows, name) for name in ("rho_log", "rho_phys", "rho_page", "rho_bytes", "hit_rate")},
        "ms/token": _texts(rows, "ms_per_token"),
        "top1": _texts(rows, "top1_agreement"),
        "KL": _texts(rows, "kl_mean"),
        "err": _texts(rows, "output_error"),
        "steps": [f"{n}" if n else "-" for n in rows.steps],
    }
    shown = {name: values for name, values in columns.items() if set(values) - {"-", ""}}
    legend = "; ".join(text for name, text in _LEGEND.items() if name in shown)
    return f"{pd.DataFrame(shown).to_string(index=False)}\n{textwrap.fill(legend, _WIDTH)}"


def format_summary(table: pd.DataFrame) -> str:
    """By subtask, then, if there is more than one method variant, side by side."""
    return "\n\n".join([format_table(table)] + [format_comparison(table)] * (len(headline(table)) > 1))


def format_frame(frame: pd.DataFrame) -> str:
    """A task's own table, scores in percent."""
    shown = frame.loc[:, [c for c in frame if not (frame[c] == "").all()]].copy()
    for column in shown:
        if pd.api.types.is_float_dtype(shown[column]):
            form = "{:.1f}" if column.startswith("score") else _FORMATS.get(column, "{:.1f}")
            shown[column] = [form.format(x) if pd.notna(x) else "-" for x in shown[column]]
    return shown.to_string(index=False)


def _texts(table: pd.DataFrame, column: str) -> list[str]:
    return [_FORMATS.get(column, _FORMATS["score"]).format(x) if pd.notna(x) else "-" for x in table[column]]


def _p_values(table: pd.DataFrame) -> list[str]:
    return ["<0.001" if p < 0.001 else text for p, text in zip(table.mcnemar_p, _texts(table, "mcnemar_p"), strict=True)]


def _interval(row) -> str:
    if pd.isna(row.difference):
        return "-"
    if not row.wins + row.losses:
        return f"{row.difference:+.3f}, none differs"  # an interval without width would say too much
    bounds = f" [{row.difference_low:+.3f}, {row.difference_high:+.3f}]" if pd.notna(row.difference_low) else ""
    return f"{row.difference:+.3f}{bounds}"
