"""Small items in LongBench v2's official layout: quotes, backslashes, braces and lines as real texts have them."""

import json
import random
from pathlib import Path

from tests.tasks import ruler_data

DOMAINS = ("Single-Document QA", "Multi-Document QA", "Code Repository Understanding")
REAL = Path(__file__).parents[2].parent / "shared" / "data" / "longbench_v2"


def item(index: int, **changes) -> dict:
    rng = random.Random(index)
    lines = [ruler_data.paragraph(rng) for _ in range(40 + 60 * (index % 3))]
    lines[3] = 'printf("{\\"a\\": [1, 2}\\n"); // \\\\ {'
    facts = {
        "_id": f"66ec{index:020d}",
        "domain": DOMAINS[index % 3],
        "sub_domain": "Legal",
        "difficulty": ("easy", "hard", "hard")[index % 3],
        "length": ("short", "medium", "long", "short")[index % 4],
        "question": f"What is $C_A$ about {index}? ",
        "choice_A": " Nothing.",
        "choice_B": "Something",
        "choice_C": "All of {it}",
        "choice_D": "The 'fourth' one",
        "answer": "BCDC"[index % 4],
        "context": "\n  Title\n" + "\n".join(lines) + "\n\n",
    }
    return facts | changes


def items(count: int = 8) -> list[dict]:
    return [item(i) for i in range(count)]


def write(path: Path, content: object, **how) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content, **how), encoding="utf-8")
    return path


def folder(target: Path, content: object = None) -> Path:
    """A folder with data.json as the hub has it: indented, characters escaped."""
    write(target / "data.json", items() if content is None else content, indent=4)
    return target
