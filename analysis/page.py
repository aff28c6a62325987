"""One HTML page that needs no other file and no network: figures, tables, protocol cards, what is missing, and where the records lie."""

import base64
import html
import json
import os
import tempfile
from itertools import groupby
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import style
from analysis.figures import draw
from analysis.records import Missing, Records
from analysis.style import Drawn
from macbench.files import write_whole

_OPEN = 3  # pictures of a kind that stand open
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
a { color: #0060a0; }
figure { margin: 0; } img { width: 100%; max-width: var(--wide); height: auto; display: block; }
.picture { display: block; position: relative; overflow-x: auto; } .picture input { position: absolute; opacity: 0; }
.picture :focus-visible + img { outline: 2px solid #0060a0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .82rem; white-space: nowrap; }
th, td { padding: .25rem .45rem; text-align: left; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #555; white-space: normal; vertical-align: bottom; }
.caption { font-size: .85rem; color: #444; } .lack { background: #fff4e0; padding: .4rem .7rem; font-size: .85rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
 .scroll::before, .picture::before { content: "scroll sideways \\2192"; position: sticky; left: 0; font-size: .75rem; color: #666; }
 .picture::before { content: "tap the picture for its full size, and again"; }
 .picture :checked + img { width: var(--wide); }
}
details { margin: .4rem 0; } pre { overflow-x: auto; font-size: .75rem; background: #f5f5f5; padding: .5rem; } li { overflow-wrap: anywhere; }
"""


def write(roots: list[str], target: Path) -> Path:
    """Draw everything below ``roots`` and write the page."""
    records = Records(*roots)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, style.wordless():
        found = draw(records, Path(folder))
        body = [_folded(list(alike)) for _, alike in groupby(found, lambda d: (d.name.partition("-")[0], d.picture is not None and not d.lack))]
    nav = "".join(f'<li><a href="#{_id(d)}">{html.escape(d.title)}</a></li>' for d in found if not d.lack)
    page = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>macbench report</title><style>{_STYLE}</style></head><body><h1>macbench report</h1>",
        f"<p>Records: {html.escape(', '.join(map(str, roots)))}</p><details><summary>Contents</summary><ul>{nav}</ul></details>",
        *body,
        "<h2>Protocol cards</h2>",
        *(_card(records, run) for run in records.runs),
        "<h2>Records</h2><ul>",
        *(_link(path, target) for root in records.roots for path in sorted(root.rglob("*.parquet"))),
        "</ul></body></html>",
    ]
    write_whole(target, lambda file: file.write("\n".join(page).encode()))
    target.chmod(0o644)
    return target


def _id(drawn: Drawn) -> str:
    return html.escape(drawn.name, quote=True)


def _folded(alike: list[Drawn]) -> str:
    """Items of one kind below each other; of many pictures the one that holds most, as far as its size tells, above the others to be opened."""
    if len(alike) <= _OPEN or alike[0].picture is None:
        return "\n".join(map(_item, alike))
    first = max(alike, key=lambda drawn: drawn.picture.stat().st_size)
    others = [_item(drawn) for drawn in alike if drawn is not first]
    return "\n".join([_item(first), f"<details><summary>{len(others)} more pictures of this kind</summary>", *others, "</details>"])


def _item(drawn: Drawn) -> str:
    head = f'<h2 id="{_id(drawn)}">{html.escape(drawn.title)}</h2>'
    if drawn.lack:
        return f'{head}<p class="lack">missing: {html.escape(drawn.lack)}</p>'
    if drawn.frame is not None:
        return f'{head}<div class="scroll">{_table(drawn.frame)}</div><p class="caption">{html.escape(drawn.caption)}</p>'
    picture = drawn.picture.read_bytes()
    data, wide = base64.b64encode(picture).decode(), _rem(picture)
    return (
        f'{head}<figure><label class="picture"><input type="checkbox" aria-label="full size"><img style="--wide:{wide}rem" '
        f'alt="{html.escape(drawn.title, quote=True)}" src="data:image/png;base64,{data}"></label>'
        f'<figcaption class="caption">{html.escape(drawn.caption)}</figcaption></figure>'
    )


def _rem(png: bytes) -> int:
    """Width at which a figure of a page's width fills the text: from the PNG's header."""
    pixels = int.from_bytes(png[16:20], "big")
    return round(60 * pixels / (style.WIDTH * plt.rcParams["savefig.dpi"]))


def _table(frame: pd.DataFrame) -> str:
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in frame.columns)
    rows = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in frame.itertuples(index=False))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"


def _card(records: Records, run: Path) -> str:
    try:
        facts = records.source(run).facts
    except Missing as lack:
        return f'<p class="lack">{html.escape(str(lack))}</p>'
    summary = f"{run.parent.parent.parent.name}, {run.parent.parent.name}, ctx {run.parent.name}: {run.name}"
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(json.dumps(facts, indent=1))}</pre></details>"


def _link(path: Path, target: Path) -> str:
    href = os.path.relpath(path, target.parent)
    return f'<li><a href="{html.escape(href, quote=True)}">{html.escape(str(path))}</a> ({path.stat().st_size / 1e3:.0f} kB)</li>'
