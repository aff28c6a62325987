"""From texts to parts, from parts and verdicts to the benchmark's numbers."""

import math
import re

import pandas as pd

from macbench.tasks.longgenbench import protocol


def pieces(text: str) -> list[str]:
    """What lies between the separators."""
    return text.split(protocol.SEPARATOR)


def parts(text: str, type_: str) -> dict[int, str]:
    """Numbered parts of a text: the first piece that says "<type> <number>" with a number is that part."""
    number = re.compile(rf"{type_} (\d+)")
    found: dict[int, str] = {}
    for piece in pieces(text):
        match = number.search(piece)
        if match and len(match.group(1)) <= protocol.MOST_DIGITS:  # a model may write digits without end
            found.setdefault(int(match.group(1)), piece)
    return found


def completion(found: dict[int, str], number: int) -> float:
    """Share of the parts 1 .. number that are there."""
    return sum(i in found for i in range(1, number + 1)) / number


def words(text: str) -> int:
    return len(text.split())


def numbers(texts: pd.DataFrame, checks: pd.DataFrame) -> dict:
    """The benchmark's numbers of some texts, in percent except for counts.

    ``texts``: a row per text with completion (0 to 1), pieces and words; ``checks``: a row per check with kind, present, impossible and
    yes (True, False, or None where a judge gave no verdict: such checks count as not fulfilled, and are counted in ``unjudged``).
    STIC-1 is yes / checks whose part exists, STIC-2 yes / all checks, impossible ones included, as officially. ``average`` is eval.py's
    plain mean of the three accuracies (yes / checks whose part exists, by kind), which the paper does not use.
    """
    yes, present = checks.yes.eq(True).fillna(False).astype(bool), checks.present
    long = texts[(texts.pieces > protocol.LEN_PIECES) & (texts.words > protocol.LEN_WORDS)]
    completion = texts.completion.mean()
    once, ranged, periodic = (_share(yes[checks.kind == k].sum(), present[checks.kind == k].sum()) for k in protocol.KINDS)
    stic_2 = _share(yes.sum(), len(checks))
    return {
        "texts": len(texts),
        "completion": 100 * completion,
        "stic_1": 100 * _share(yes.sum(), present.sum()),
        "stic_2": 100 * stic_2,
        "stic_2_se": 100 * _error(checks, yes),
        "weighted": 100 * completion * stic_2,
        "once": 100 * once,
        "range": 100 * ranged,
        "periodic": 100 * periodic,
        "average": 100 * (once + ranged + periodic) / 3,
        "length": long.words.mean() if len(long) else math.nan,
        "checks": len(checks),
        "present": int(present.sum()),
        "yes": int(yes.sum()),
        "impossible": int(checks.impossible.sum()),
        "unjudged": int((checks.present & checks.yes.isna()).sum()),
    }


def _error(checks: pd.DataFrame, yes: pd.Series) -> float:
    """One standard error of STIC-2 as a ratio of sums over texts: checks of one text stand or fall together."""
    by = yes.astype(float).groupby([checks.subtask, checks.example_id])
    total, count = by.sum(), by.count()
    n = len(total)
    if n < 2 or not count.sum():
        return math.nan
    residual = total - total.sum() / count.sum() * count
    return math.sqrt((residual**2).sum() / (n - 1) / n) / count.mean()


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
