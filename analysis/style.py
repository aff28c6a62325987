"""One look for all figures: readable in print, in grey and for colour-blind readers; and how they are captioned and saved."""

import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.records import Source
from macbench import stats
from macbench.cli import LONG_MODEL
from macbench.summary import REFERENCE

# Okabe and Ito's palette without its yellow. Lines also differ in marker and dashes, for print without colour.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = "osD^vP*X<>phd8H"
DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2))]
BLACK, GREY = "#000000", "0.45"
MAP = "cividis"  # even in grey and for colour-blind readers
WIDTH = 7.0  # inches, a page
_CAPTION_SIZE, _CAPTION_CHARACTERS, _TITLE = 6.5, 132, 0.22

plt.rcParams.update(
    {
        "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
        "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "grid.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False,
        "lines.linewidth": 1.2, "lines.markersize": 4, "legend.frameon": False, "savefig.dpi": 200,
    }
)  # fmt: skip


_words = True


@contextmanager
def wordless() -> Iterator[None]:
    """Figures without title and caption, for a page that sets both as text."""
    global _words
    _words = False
    try:
        yield
    finally:
        _words = True


@dataclass
class Drawn:
    """A finished figure or table.

    ``files``: all that was written; ``picture``: the PNG; ``frame``: the table as text; ``lack``: why there is nothing, in one line.
    """

    name: str
    title: str
    caption: str
    files: list[Path]
    picture: Path | None = None
    frame: pd.DataFrame | None = None
    lack: str = ""


def look(i: int) -> dict:
    """Colour, marker and dashes of the i-th line."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)]}


# Every method looks the same in all figures, whatever else is in them: full attention black and hollow, MAC alone a filled circle in its colour.
# What shares a colour differs in marker and dashes (quantised caches show their bits): index of COLOURS, marker, index of DASHES.
_METHODS = {
    "mac": (1, "o", 0), "quest": (5, "s", 0), "rocketkv": (0, "D", 0), "multipole": (3, "^", 0), "snapkv": (2, "v", 0), "streaming_llm": (4, "P", 2),
    "oracle_topk": (5, "*", 1), "oracle_topk_ideal": (0, "p", 1), "h2o": (3, "<", 1), "pyramidkv": (2, ">", 1), "tova": (4, "X", 1),
    "tidaldecode": (5, "d", 2), "int8": (0, "$8$", 2), "kivi": (2, "$4$", 2), "kivi_2bit": (3, "$2$", 2),
}  # fmt: skip
_OTHERS = [(colour, marker, 3) for colour, marker in zip((4, 0, 2, 3, 5), ("$a$", "$b$", "$c$", "$d$", "$e$"), strict=True)]


def methods(names: Iterable[str]) -> dict[str, dict]:
    """Colour, marker and dashes by method name. Those unknown here take what is left, in the order of their names."""
    names = set(names)
    known = {name: _METHODS[name] for name in names & set(_METHODS)}
    known |= zip(sorted(names - set(_METHODS) - {REFERENCE}), cycle(_OTHERS), strict=False)
    found = {name: {"color": COLOURS[colour], "marker": marker, "linestyle": DASHES[dash]} for name, (colour, marker, dash) in known.items()}
    return found | {REFERENCE: {"color": BLACK, "marker": "o", "markerfacecolor": "white", "linestyle": "-"}}


def shades(n: int) -> list[tuple[dict, ...]]:
    """Looks of n lines that have an order."""
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.82, n))
    return [{"color": c, "marker": MARKERS[i % len(MARKERS)]} for i, c in enumerate(colours)]


def made(sources: Iterable[Source], what: str) -> str:
    """Provenance: what was run, machine and commit; and where a probe in a model's place was, that its scores are its own."""
    sources = list(sources)
    devices, commits = (", ".join(dict.fromkeys(getattr(s, key) for s in sources)) for key in ("device", "commit"))
    asked = " Questions are not in the prefill: decode steps process them." if sources and all(s.question for s in sources) else ""
    probe = f" {LONG_MODEL} is a probe of reads and hits: its scores say nothing about SmolLM2."
    other = "".join(f" Its {adapter} is not the one that ships." for adapter in dict.fromkeys(s.adapter for s in sources) if adapter)
    return f"{what}. {devices}; commit {commits}.{asked}{probe if any(LONG_MODEL in s.path.parts for s in sources) else ''}{other}"


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean over texts or examples with its 95% bootstrap interval; NaN bounds of a single one."""
    values = np.asarray(list(values), float)
    return (float(values.mean()), *stats.bootstrap_interval([values], draws=2000))


def line(axes: Axes, x, triples, **options) -> None:
    """A line through means with their intervals as error bars."""
    mean, low, high = (np.array(part, float) for part in zip(*triples, strict=True))
    bars = np.nan_to_num(np.abs(np.stack([mean - low, high - mean])))
    axes.errorbar(x, mean, yerr=bars, elinewidth=0.8, capsize=1.8, **options)


def doubling(axes: Axes, values) -> None:
    """A logarithmic x axis with a tick at each of the values and no others; of values too near each other the first has one."""
    ticks: list[float] = []
    for value in values:
        if not ticks or value > 1.2 * ticks[-1]:
            ticks.append(value)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [tokens(v) for v in ticks])
    axes.minorticks_off()


def tokens(n: float) -> str:
    return f"{n / 1024:g}K" if n >= 1024 and n % 1024 == 0 else f"{n:g}"


def save(figure: Figure, out: Path, name: str, title: str, caption: str, paper: str, legend: Axes | None = None, legend_title: str = "") -> Drawn:
    """PNG and PDF with title above, below it the legend of the axes ``legend``, then the caption. ``paper``: what the paper reports."""
    whole = f"{caption} Paper: {paper}" if paper else caption
    text = textwrap.fill(whole, int(_CAPTION_CHARACTERS * figure.get_figwidth() / WIDTH)) if _words else ""
    room, head = ((text.count("\n") + 1) * _CAPTION_SIZE * 1.35 / 72 + 0.08, _TITLE) if _words else (0.04, 0.04)
    strip = 0.24 if legend is not None else 0
    whole_height = figure.get_figheight() + room + strip + head
    figure.set_figheight(whole_height)
    figure.get_layout_engine().set(rect=(0, (room + strip) / whole_height, 1, 1 - (room + strip + head) / whole_height))
    if legend is not None:
        handles, labels = legend.get_legend_handles_labels()
        if legend_title:
            handles, labels = [Line2D([], [], linestyle="none"), *handles], [legend_title, *labels]
        options = {"ncols": len(labels), "columnspacing": 1.2, "handletextpad": 0.4, "borderaxespad": 0}
        figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, room / whole_height), **options)
    figure.text(0.01, 0.04 / whole_height, text, fontsize=_CAPTION_SIZE, va="bottom", color="0.2", linespacing=1.25)
    figure.text(0.01, 1 - 0.05 / whole_height, title if _words else "", fontsize=9, va="top", fontweight="bold")
    files = [out / f"{name}.{kind}" for kind in ("png", "pdf")]
    for file in files[: 2 if _words else 1]:
        figure.savefig(file)
        figure.set_layout_engine("none")  # what the first file settled holds for the second
    plt.close(figure)
    return Drawn(name, title, whole, files, files[0])
