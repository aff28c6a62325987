"""LongBench v2 as a task: three ways to ask each of its questions."""

import hashlib
from collections.abc import Iterable

import pandas as pd

from macbench.errors import ConfigError, choose
from macbench.models.chat import Chat
from macbench.sampling import Sampling
from macbench.tasks.base import Example, card
from macbench.tasks.longbench_v2 import data, protocol, scoring
from macbench.tasks.longbench_v2.truncate import Cut, Truncator

DEVIATIONS = (
    "truncation: where ctx does not hold 120,000 prompt tokens, the chat template and the answer, prompts are cut to what it holds",
    "sampling: greedy by default, and seeded per item with task.temperature=0.1; official runs have temperature 0.1 and no seed",
    "denominator: every item asked counts; official runs leave out items whose response stayed empty",
    "chain of thought: an empty first response is followed up like any other",
)
_END_OF_TEXT = "\n</text>\n\n"  # behind it is the question


class LongBenchV2:
    """The 503 questions, asked with the text (``zero_shot``), with reasoning first (``cot``, two calls), or without the text (``no_context``).

    ``chat``: tokenizer and chat template. ``ctx``: tokens of prompt and answer together. ``temperature``: 0 is greedy, 0.1 official.
    ``data_path``: folder with the official data.json, or such a file; None is the hub. ``data_sha256``: what the items must hash to.
    """

    name, version = "longbench_v2", 2

    def __init__(
        self,
        chat: Chat,
        ctx: int,
        seed: int = 42,
        subtasks: Iterable[str] | None = ("zero_shot",),
        temperature: float = 0.0,
        data_path: str | None = None,
        data_sha256: str | None = None,
    ):
        wanted = [subtasks] if isinstance(subtasks, str) else list(protocol.SUBTASKS if subtasks is None else subtasks)
        if not wanted:
            raise ConfigError("task.subtasks", "[]", f"must name some of {', '.join(protocol.SUBTASKS)}")
        self.subtasks = tuple(dict.fromkeys(choose("task.subtasks", subtask, protocol.SUBTASKS) for subtask in wanted))
        self.chat, self.ctx, self.seed = chat, ctx, seed
        self.sampling = Sampling(temperature=temperature)
        self.truncator = Truncator(chat)
        self._most("cot" if "cot" in self.subtasks else "zero_shot")
        self.items = data.load(data_path, data_sha256)

    def size(self, subtask: str) -> int:
        return len(self.items)

    def _most(self, prompt: str) -> int:
        """Tokens of a raw prompt, BOS included."""
        room = self.ctx - protocol.MAX_NEW_TOKENS[prompt] - self.truncator.overhead
        if room < 2:
            spent = protocol.MAX_NEW_TOKENS[prompt] + self.truncator.overhead
            raise ConfigError("ctx", self.ctx, f"{prompt} takes {spent} tokens for the chat template and the answer alone")
        return min(protocol.MAX_PROMPT_TOKENS, room)

    def example(self, subtask: str, index: int) -> Example:
        """Item ``index`` asked in one of the ways."""
        item = self.items.item(index)
        facts = {name: item[name] for name in ("domain", "sub_domain", "difficulty", "length", "answer")}
        return self._example(subtask, subtask, index, item, {"item": item["_id"], **facts})

    def _example(self, subtask: str, prompt: str, index: int, item: dict, meta: dict, reasoning: str = "") -> Example:
        cut = self._cut(prompt, item, reasoning)
        meta = meta | {"truncated": cut.truncated}
        stream = hashlib.sha256(f"{self.name}/{self.seed}/{prompt}/{item['_id']}".encode()).digest()
        sampling = Sampling(self.sampling.temperature, seed=int.from_bytes(stream[:6]))
        rendered, limit = self.chat.render(cut.text), protocol.MAX_NEW_TOKENS[prompt]
        _, found, question = rendered.rpartition(_END_OF_TEXT)
        asked = len(self.chat.encode_piece(question)) if found else 0
        return Example(subtask, str(index), rendered, cut.ids, [item["answer"]], limit, meta, sampling, question=asked)

    def _cut(self, prompt: str, item: dict, reasoning: str) -> Cut:
        """The prompt, truncated so that it fits together with its answer."""
        parts = fill(prompt, item, reasoning)
        most, limit = self._most(prompt), protocol.MAX_NEW_TOKENS[prompt]
        while True:
            if len(parts) == 3:
                cut = self.truncator.around(item["_id"], *parts, most, self._most("zero_shot"))
            else:
                cut = self.truncator.plain(parts[0], most)
            excess = len(cut.ids) + limit - self.ctx
            if excess <= 0:
                return cut
            most -= excess  # the decoded text has become a few tokens longer
            if most < 2:
                raise ConfigError("ctx", self.ctx, f"does not hold item {item['_id']}")

    def follow_up(self, example: Example, text: str) -> Example | None:
        """After the reasoning, the call that asks for its conclusion."""
        if example.subtask != "cot" or example.meta.get("call") == 2:
            return None
        index = int(example.example_id)
        return self._example("cot", "cot_answer", index, self.items.item(index), example.meta | {"call": 2}, reasoning=text.strip())

    def score(self, example: Example, text: str) -> float:
        """1 if the response names the right letter in the official words, else 0."""
        return float(scoring.extract(text) == example.references[0])

    def tables(self, samples: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
        if samples.empty:
            return []
        letter = scoring.best_letter(self.items.facts[int(i)].answer for i in samples.example_id.unique())
        return [(f"accuracy in percent over all items asked; constant: always {letter}; chance 25", scoring.groups(samples))]

    @staticmethod
    def guesses(samples: pd.DataFrame) -> dict[str, float]:
        return scoring.guesses(samples)

    def protocol(self) -> dict:
        """What it takes to repeat the numbers."""
        return card(self, protocol.SOURCE, protocol.template_hash()) | {
            "truncation": "middle of the raw prompt",
            "max_prompt_tokens": self._most(self.subtasks[0]),
            "max_new_tokens": {p: protocol.MAX_NEW_TOKENS[p] for p in (*self.subtasks, *(["cot_answer"] if "cot" in self.subtasks else []))},
            "temperature": self.sampling.temperature,
            "chat_template": self.chat.template,
            "chat_template_sha256": hashlib.sha256(f"{self.chat.head}\0{self.chat.tail}".encode()).hexdigest(),
            "bos_count": self.chat.bos_count,
            "data": self.items.source,
            "data_sha256": self.items.sha256,
            "items": len(self.items),
            "whole_text_tokenization": not self.truncator.exact,
            "deviations": list(DEVIATIONS),
        }


def fill(prompt: str, item: dict, reasoning: str = "") -> list[str]:
    """A prompt with an item's fields in place: [before the text, the text, after it], or [all] where there is no text.

    As officially, placeholders are replaced one after the other in everything that is there by then, and fields are stripped.
    """
    before, found, after = protocol.PROMPTS[prompt].partition(protocol.FIELDS[0][0])
    parts = [before, item["context"].strip(), after] if found else [before]
    for placeholder, field in protocol.FIELDS[1:]:
        parts = [part.replace(placeholder, item[field].strip()) for part in parts]
    return [part.replace(protocol.REASONING, reasoning) for part in parts] if prompt == "cot_answer" else parts
