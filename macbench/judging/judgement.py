"""Judge the texts of a run, from its sample rows alone.

<run>/judgements/<judge>-<hash8>/    # hash of everything that can change an answer
    verdicts.jsonl   every answer by the hash of its question
    checks.parquet   a row per check: where, what, whether its part exists, the answer, yes or no, or an error
    summary.json     the table          judge.json  what the judge is
"""

import json
import sys
from pathlib import Path

import pandas as pd

from macbench import settings
from macbench.files import write_whole
from macbench.judging.base import Judge, Verdict
from macbench.judging.cache import Answers
from macbench.records import config_hash
from macbench.redact import redact
from macbench.tables import format_frame

_SHOWN = ("method", "variant", "scenario", "texts", "completion", "stic_1", "stic_2", "stic_2_se", "weighted", "length", "impossible", "unjudged")


def build(node) -> Judge | None:
    """The judge of a ``conf/judge`` node; None for judge=none."""
    return settings.build(node, "judge") if "_target_" in node else None


def prepare(node) -> None:
    """Raise a ConfigError now for what would stop the judge after hours of generating."""
    judge = build(node)
    if judge is not None:
        judge.prepare()


def judge_run(run: Path, task, samples: pd.DataFrame, node, device: str) -> int:
    """Judge, record and print. ``task``: the task or its class. Returns how many checks got no verdict."""
    judge = build(node)
    if judge is None or samples.error.isna().sum() == 0:
        return 0
    texts, checks, questions = task.checks(samples)
    facts = judge.facts()
    folder = run / "judgements" / f"{judge.name}-{config_hash(facts)}"
    verdicts = _ask(judge, questions, folder, device, task.verdict)
    asked = [verdicts[i] if i >= 0 else Verdict(None) for i in checks.question]
    checks = checks.drop(columns="question").assign(
        answer=[v.answer for v in asked],
        yes=pd.array([None if v.answer is None else task.verdict(v.answer) for v in asked], dtype="boolean"),
        error=[v.error for v in asked],
    )
    official = all(facts.get(key) == value for key, value in task.official_judge.items()) and facts.get("path") is None
    table = task.judged(texts, checks)
    write_whole(folder / "checks.parquet", lambda file: checks.to_parquet(file, index=False))
    _write(folder / "summary.json", table.to_json(orient="records", indent=1))
    _write(folder / "judge.json", json.dumps(facts | {"official": official}, indent=1) + "\n")
    shown = [column for column in _SHOWN if column in table and (column != "unjudged" or table[column].any())]
    print(f"\njudged by {describe(facts)}{'' if official else ', which is not the official judge'}; in percent")
    print(format_frame(table[shown].round(1)))
    print(f"judgements: {folder}")
    errors = checks.error.value_counts()
    if len(errors):
        said = f"{errors.sum()} check(s) could not be judged ({errors.index[0]})"
        print(f"macbench: {said}; the same command, or python -m macbench.judge, asks again", file=sys.stderr)
    return int(errors.sum())


def _ask(judge: Judge, questions: list, folder: Path, device: str, settled) -> list[Verdict]:
    answers = Answers(folder / "verdicts.jsonl")
    try:
        verdicts = [Verdict(answers.get(question.prompt)) for question in questions]
        missing = [i for i, verdict in enumerate(verdicts) if verdict.answer is None]
        if missing:
            for place, verdict in judge.ask([questions[i] for i in missing], device, settled):
                verdicts[missing[place]] = verdict
                if verdict.answer is not None:
                    answers.add(questions[missing[place]].prompt, verdict.answer)
    finally:
        answers.close()
    return verdicts


def describe(facts: dict) -> str:
    return " ".join([facts["judge"], *(f"{key}={value}" for key, value in facts.items() if key != "judge")])


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(redact(text).encode()))
