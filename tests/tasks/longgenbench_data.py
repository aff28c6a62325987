"""Small orders in LongGenBench's official layout; the words are ours."""

import json
from pathlib import Path

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "longgenbench"
NUMBERS = {"Week": 3, "Menu Week": 4, "Floor": 5, "Block": 2}


def item(type_: str = "Floor", serial: int = 0, **changes) -> dict:
    prefix = f"#*# {type_} 1:"
    facts = {
        "prompt": f"Describe {NUMBERS.get(type_, 3)} of them (order {serial}). End with '*** finished'. *** started ***\n{prefix}",
        "checks_once": {"2": "small library"},
        "checks_range": {"1": "Gardening festival", "2": "Gardening festival"},
        "checks_periodic": {"2": "café", "4": "café"},
        "type": type_,
        "prefix": prefix,
        "number": NUMBERS.get(type_, 3),
    }
    return facts | changes


def items() -> list[dict]:
    return [item(type_, serial) for serial in range(2) for type_ in NUMBERS]


def write(folder: Path, content: object = None) -> Path:
    text = content if isinstance(content, str) else json.dumps(items() if content is None else content)
    (folder / "Dataset_short.json").write_text(text, encoding="utf-8")
    return folder
