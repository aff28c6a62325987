"""LongGenBench's protocol as data: where the items are, sampling, limits, separators and the judge's question, verbatim.

Source: https://github.com/mozhu621/LongGenBench at commit 62c0e86, files Evalution/inference.py, Evalution/eval.py and
Evalution/results/static.ipynb. The repository has no licence file; the strings below are facts of its protocol, and its prompts are
not here: they come with the data, which is fetched from its publisher (data card: cc-by-nd-4.0).
"""

import hashlib
import json
from dataclasses import asdict, dataclass

SOURCE = "https://github.com/mozhu621/LongGenBench@62c0e86"
_DATA = "https://raw.githubusercontent.com/mozhu621/LongGenBench/f06aa89d143af1a3e8e22816eeecab34d41dabbc/Dataset/"


@dataclass(frozen=True)
class Split:
    """``max_new_tokens``: official limit. ``checks``: how many the official file has; ``sha256``: of that file."""

    file: str
    max_new_tokens: int
    checks: int
    sha256: str

    @property
    def url(self) -> str:
        return _DATA + self.file


SPLITS = {
    "16k": Split("Dataset_short.json", 16_000, 6205, "3cf98c4badc330a93d1010f57f6658b09f2ebc2e6428a3df083b652d902d96e8"),
    "32k": Split("Dataset_long.json", 32_000, 8215, "f61048da5ecfb1b717584af8b2dc5999198459e9b95aceedde2dcc6f5cdd35e7"),
}
# An item's type, which numbers its parts ("Menu Week 7"), and the scenario it belongs to.
TYPES = {
    **{"Week": "diary", "Day": "diary", "Menu Week": "menu", "Menu Day": "menu"},
    **{"Floor": "skyscraper", "Block": "urban"},
}
SCENARIOS = ("diary", "menu", "skyscraper", "urban")
KINDS = ("once", "range", "periodic")

TEMPERATURE, TOP_P, SEED = 0.95, 0.95, 6211027  # vLLM seeds every request with the same number
STOP = "*** finished"
SEPARATOR = "#*#"
# "Len." is the mean number of words of texts with more pieces and more words than these.
LEN_PIECES, LEN_WORDS = 40, 2000
MOST_DIGITS = 6  # of a part's number; orders are for fewer than a thousand parts

# {block}: the part that was ordered; {event}: what should be in it. Asked as a raw prompt.
QUESTION = "Context: {block}### Instruction: Does this context include the {event}? Please answer with 'yes' or 'no' only."
YES = "yes"  # anywhere in the answer, in any case; everything else is a no
JUDGE = {"judge": "llm", "model": "llama31_8b", "temperature": 0.95, "top_p": 0.95, "max_tokens": 50, "seed": 42}


def template_hash() -> str:
    """sha256 of everything above that can change a number."""
    parts = [{name: asdict(split) for name, split in SPLITS.items()}, TYPES, KINDS, TEMPERATURE, TOP_P, SEED, STOP, SEPARATOR, QUESTION, YES]
    return hashlib.sha256(json.dumps([parts, LEN_PIECES, LEN_WORDS, JUDGE], sort_keys=True).encode()).hexdigest()
