"""Sequences from the harness's own generators of variable tracking, common words, frequent words and questions over documents.

The generators get other words, texts and questions than RULER's, and a seed that no run of the harness can have: it is no number.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from macbench.probe import facts
from macbench.probe.sequence import Dialogue, Sequence
from macbench.probe.text import Background
from macbench.tasks.ruler import protocol
from macbench.tasks.ruler.cwe import CommonWords
from macbench.tasks.ruler.data import QuestionSet
from macbench.tasks.ruler.fwe import FrequentWords
from macbench.tasks.ruler.generator import Generator, Kit
from macbench.tasks.ruler.qa import QuestionAnswering
from macbench.tasks.ruler.vt import VariableTracking
from macbench.tasks.ruler.words import WordLists

WORKED_EXAMPLES = 32  # of variable tracking: a seed of RULER's has one, whose places must not be learnt
GENERATORS: dict[str, type[Generator]] = {"vt": VariableTracking, "cwe": CommonWords, "fwe": FrequentWords, "qa_1": QuestionAnswering}


@dataclass
class OtherData:
    """What the generators read, made of the background text instead of RULER's files."""

    text: Background
    seed: str
    sources: dict = field(default_factory=dict)
    english_words: tuple = ()

    @cached_property
    def words(self) -> WordLists:
        return WordLists(self.text.words, [], [], {}, "background")

    @cached_property
    def squad(self) -> QuestionSet:
        return facts.question_set(self.text, np.random.default_rng(list(self.seed.encode())))


class Official:
    """Makes single questions of the ``GENERATORS`` in the harness's prompts. ``seed``: any text."""

    def __init__(self, dialogue: Dialogue, text: Background, seed: str):
        self.dialogue, self.data, self.seed = dialogue, OtherData(text, seed), seed
        self._kits: dict[tuple[int, str], Kit] = {}
        self._generators: dict[tuple[str, int, str], Generator] = {}

    def make(self, name: str, length: int, rng: np.random.Generator) -> Sequence:
        """A prompt that fills ``length`` tokens with RULER's room for the answer, and the answer."""
        seed = f"{self.seed} {rng.integers(WORKED_EXAMPLES)}" if name == "vt" else self.seed
        generator = self._generator(name, length, seed)
        many = len(self.data.squad.questions) if name.startswith("qa") else 2**31
        limit = protocol.WORDING[name].tokens_to_generate
        while True:
            example = generator.example(int(rng.integers(many)))
            answer = self.dialogue.encode(answer_text(name, example.references))[0]
            if len(answer) < limit:
                break
        answer = np.append(answer, np.int32(self.dialogue.eos))
        start = len(example.input_ids)
        return Sequence(name, np.concatenate([np.array(example.input_ids, np.int32), answer]), [(start, start + len(answer))])

    def _generator(self, name: str, length: int, seed: str) -> Generator:
        if (length, seed) not in self._kits:
            kit = Kit(self.dialogue.chat, length, seed, self.data)
            if first := next(iter(self._kits.values()), None):  # one table of tokens for all lengths
                kit.pieces, kit.exact = first.pieces, first.exact
            self._kits[length, seed] = kit
        if (name, length, seed) not in self._generators:
            self._generators[name, length, seed] = GENERATORS[name](name, self._kits[length, seed])
        return self._generators[name, length, seed]


def answer_text(name: str, references: list[str]) -> str:
    """The answer that the model is trained to give, as it follows the answer prefix."""
    if name == "cwe":
        return " " + " ".join(f"{i}. {word}" for i, word in enumerate(references, 1))
    # A space after the prefix's own: so does RULER's worked example write the variables.
    return " " + " ".join(references) if name in ("vt", "fwe") else f" {references[0]}"
