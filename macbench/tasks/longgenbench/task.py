"""LongGenBench as a task: long texts to order, and the questions about them for a judge."""

import json
from collections.abc import Iterable

import pandas as pd

from macbench.errors import ConfigError, choose
from macbench.models.chat import Chat
from macbench.sampling import Sampling
from macbench.tasks.base import Example, Question, card
from macbench.tasks.longgenbench import data, protocol, scoring

DEVIATIONS = (
    "limit: where ctx does not hold the prompt and the official number of new tokens, the text is cut at what it holds",
    "sampling: with task.sampling=official the distribution and seed are official, the random numbers are not vLLM's",
    "score: the score of a sample is its completion rate, which needs no judge; STIC-1 and STIC-2 come from verdicts",
    "stic_2_se: the standard error is ours, over texts",
)
_NO_END = "stop: with task.ignore_eos=true every text goes on to its limit; its scores are not official, because models write on behind their end"


class LongGenBench:
    """400 orders for a long text: 100 each of diary, menu, skyscraper and urban planning.

    ``split``: 16k or 32k. ``sampling``: official (temperature 0.95, top-p 0.95) or greedy. ``max_new_tokens``: fewer than the official
    16,000 or 32,000, or None. ``ignore_eos``: neither end-of-sequence tokens nor the stop string end a text, so that all have the same length
    and drift can be measured; not official. Prompts go to the model raw, without a chat template.
    """

    version = 1
    reaches_limit = True  # what is ordered takes all of it
    official_judge = protocol.JUDGE

    def __init__(
        self,
        chat: Chat,
        ctx: int,
        seed: int = 42,
        split: str = "16k",
        subtasks: Iterable[str] | None = None,
        sampling: str = "official",
        max_new_tokens: int | None = None,
        ignore_eos: bool = False,
        data_path: str | None = None,
        data_sha256: str | None = None,
    ):
        choose("task.split", str(split), protocol.SPLITS)
        choose("task.sampling", sampling, ("official", "greedy"))
        if max_new_tokens is not None and (not isinstance(max_new_tokens, int) or max_new_tokens < 1):
            raise ConfigError("task.max_new_tokens", max_new_tokens, "must be null or an integer of at least 1")
        if not isinstance(ignore_eos, bool):
            raise ConfigError("task.ignore_eos", ignore_eos, "must be true or false")
        self.ignore_eos, self.stop = ignore_eos, () if ignore_eos else (protocol.STOP,)
        self.name, self.split, self.chat, self.ctx, self.seed = f"longgenbench_{split}", str(split), chat, ctx, seed
        self.limit = min(max_new_tokens or protocol.SPLITS[split].max_new_tokens, protocol.SPLITS[split].max_new_tokens)
        official = Sampling(protocol.TEMPERATURE, protocol.TOP_P, seed=protocol.SEED)
        self.sampling = official if sampling == "official" else Sampling()
        self.items = data.load(self.split, data_path, data_sha256)
        there = [scenario for scenario in protocol.SCENARIOS if self.items.by_scenario[scenario]]
        wanted = [subtasks] if isinstance(subtasks, str) else list(there if subtasks is None else subtasks)
        if not wanted:
            raise ConfigError("task.subtasks", "[]", f"must name some of {', '.join(there)}")
        self.subtasks = tuple(dict.fromkeys(choose("task.subtasks", subtask, there) for subtask in wanted))

    def size(self, subtask: str) -> int:
        return len(self.items.by_scenario[subtask])

    def example(self, subtask: str, index: int) -> Example:
        """Item ``index`` of a scenario."""
        item = self.items.by_scenario[subtask][index]
        ids = self.chat.encode(item.prompt)
        room = min(self.limit, self.ctx - len(ids))
        if room < 1:
            raise ConfigError("ctx", self.ctx, f"does not hold {subtask} {index}, whose prompt has {len(ids)} tokens, and an answer")
        meta = {"type": item.type, "prefix": item.prefix, "number": item.number, "checks": item.checks}
        return Example(subtask, str(index), item.prompt, ids, [], room, meta, self.sampling, self.stop, self.ignore_eos)

    def score(self, example: Example, text: str) -> float:
        """Completion rate, 0 to 1."""
        item = example.meta
        return scoring.completion(scoring.parts(item["prefix"] + text, item["type"]), item["number"])

    @staticmethod
    def checks(samples: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, list[Question]]:
        """What is judged in the texts of sample rows, which carry everything that this needs.

        Returns texts (a row per text: completion, pieces, words), checks (a row per check: kind, part, event, present, impossible, and
        question, an index or -1), and the questions. Texts that are the same in two rows share their questions.
        """
        texts, checks, questions = [], [], {}
        for row in samples.itertuples():
            item = json.loads(row.meta)
            whole = item["prefix"] + row.text if pd.isna(row.error) else ""  # an example that failed wrote nothing
            found = scoring.parts(whole, item["type"])
            key = {"method": row.method, "variant": row.variant, "subtask": row.subtask, "example_id": row.example_id}
            rate = scoring.completion(found, item["number"])
            texts.append(key | {"completion": rate, "pieces": len(scoring.pieces(whole)), "words": scoring.words(whole)})
            for kind, part, event in item["checks"]:
                present = part in found
                question = -1
                if present:
                    asked = (found[part], event)
                    question = questions.setdefault(asked, len(questions))
                facts = {"kind": kind, "part": part, "event": event, "present": present, "impossible": not 1 <= part <= item["number"]}
                checks.append(key | facts | {"question": question})
        asked = [Question(block, event, protocol.QUESTION.format(block=block, event=event)) for block, event in questions]
        return pd.DataFrame(texts), pd.DataFrame(checks), asked

    @staticmethod
    def verdict(answer: str) -> bool:
        """Whether a judge's answer is a yes."""
        return protocol.YES in answer.lower()

    @staticmethod
    def judged(texts: pd.DataFrame, checks: pd.DataFrame) -> pd.DataFrame:
        """The table of a judged run: a row per method variant and scenario, and one for all of them."""
        rows = []
        for (method, variant), mine in texts.groupby(["method", "variant"], sort=False):
            of = checks[(checks.method == method) & (checks.variant == variant)]
            for scenario in protocol.SCENARIOS:
                if (mine.subtask == scenario).any():
                    here = scoring.numbers(mine[mine.subtask == scenario], of[of.subtask == scenario])
                    rows.append({"method": method, "variant": variant, "scenario": scenario} | here)
            rows.append({"method": method, "variant": variant, "scenario": "all"} | scoring.numbers(mine, of))
        return pd.DataFrame(rows)

    def protocol(self) -> dict:
        """What it takes to repeat the numbers."""
        return card(self, protocol.SOURCE, protocol.template_hash()) | {
            "truncation": "none",
            "max_new_tokens": self.limit,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "sampling_seed": self.sampling.seed,
            "stop": "none, nor end of sequence (not official)" if self.ignore_eos else protocol.STOP,
            "chat_template": "none (raw prompt)",
            "bos_count": len(self.chat.encode("")),
            "data": self.items.source,
            "data_sha256": self.items.sha256,
            "data_official": self.items.official,
            "checks": self.items.checks,
            "deviations": [*DEVIATIONS, *([_NO_END] if self.ignore_eos else [])],
        }
