"""Which letter a response chose, and the scores of a run by difficulty, length and domain."""

import json
import math
from collections import Counter

import pandas as pd

from macbench.tasks.longbench_v2 import protocol


def extract(text: str) -> str | None:
    """The letter that a response names in the official words, or None."""
    text = text.replace("*", "")
    return next((found.group(1) for pattern in protocol.PATTERNS if (found := pattern.search(text))), None)


def groups(samples: pd.DataFrame) -> pd.DataFrame:
    """Scores in percent over every item that was asked: an item that failed, or whose response names no letter, is wrong.

    ``compensated``: with 25% for each response that names no letter. ``constant``: what the best single letter scores in this group, best
    over the items of this table. ``chance``: 25. ``score_se``: one standard error.
    """
    rows = []
    for (method, variant, prompt), part in samples.groupby(["method", "variant", "subtask"], sort=False):
        items = pd.DataFrame([json.loads(meta) for meta in part.meta])
        chosen = [extract(text) if isinstance(text, str) else None for text in part.text]
        items = items.assign(right=[float(c == a) for c, a in zip(chosen, items.answer, strict=True)], none=[c is None for c in chosen])
        letter = best_letter(items.answer)
        for name, group in _parts(items):
            n = len(group)
            rows.append(
                {
                    **{"method": method, "variant": variant, "prompt": prompt, "group": name, "items": n},
                    "score": _percent(group.right.mean()),
                    "score_se": _percent(group.right.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
                    "compensated": _percent((group.right + protocol.COMPENSATION * group.none).mean()),
                    "no_answer": int(group.none.sum()),
                    "constant": _percent((group.answer == letter).mean()),
                    "chance": _percent(protocol.CHANCE),
                }
            )
    return pd.DataFrame(rows)


def best_letter(answers) -> str:
    """The answer that is right most often (of equals the later letter); over all 503 items that is C."""
    counts = Counter(answers)
    return max(protocol.LETTERS, key=lambda letter: (counts[letter], letter))


def guesses(samples: pd.DataFrame) -> dict[str, float]:
    """Chance and the best single letter, 0 to 1, over the items that were asked: 0.25 and, of all 503 items, C with 0.294."""
    answers = [json.loads(meta)["answer"] for meta in samples.drop_duplicates("example_id").meta]
    letter = best_letter(answers)
    return {"chance": protocol.CHANCE, f"always {letter}": answers.count(letter) / len(answers)}


def _parts(items: pd.DataFrame):
    yield "overall", items
    for column, names in (("difficulty", protocol.DIFFICULTIES), ("length", protocol.LENGTHS), ("domain", sorted(set(items.domain)))):
        for name in names:
            group = items[items[column] == name]
            if len(group):
                yield name, group


def _percent(share: float) -> float:
    return round(100 * share, 1)
