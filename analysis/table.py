"""Tables as markdown and LaTeX, with the caption that says what was run and what the paper reports."""

from pathlib import Path

import pandas as pd

from analysis.style import Drawn

MISSING = "–"
_ESCAPES = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "±": r"$\pm$", "–": "--", "≥": r"$\geq$"}
_ESCAPES |= {"{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$", "µ": r"$\mu$"}


def markdown(frame: pd.DataFrame) -> str:
    """A pipe table; the frame holds text alone."""
    rows = [list(frame.columns), ["---"] * frame.shape[1], *frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows)


def latex(frame: pd.DataFrame, caption: str) -> str:
    """A table by booktabs, no wider than the text by graphicx."""

    def escape(text: object) -> str:
        return "".join(_ESCAPES.get(c, c) for c in str(text))

    rows = [" & ".join(map(escape, row)) + r" \\" for row in [frame.columns, *frame.itertuples(index=False)]]
    fit = r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%"
    head = [
        "% needs booktabs and graphicx",
        r"\begin{table}",
        r"\centering\small",
        fit,
        r"\begin{tabular}{" + "l" * frame.shape[1] + "}",
        r"\toprule",
    ]
    tail = [r"\bottomrule", r"\end{tabular}}", rf"\caption{{{escape(caption)}}}", r"\end{table}"]
    return "\n".join([*head, rows[0], r"\midrule", *rows[1:], *tail]) + "\n"


def save(frame: pd.DataFrame, out: Path, name: str, title: str, caption: str, paper: str) -> Drawn:
    """Both forms on disk."""
    whole = f"{caption} Paper: {paper}" if paper else caption
    files = [out / f"{name}.md", out / f"{name}.tex"]
    files[0].write_text(f"# {title}\n\n{markdown(frame)}\n\n{whole}\n")
    files[1].write_text(latex(frame, f"{title}. {whole}"))
    return Drawn(name, title, whole, files, frame=frame)
