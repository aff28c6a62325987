"""How fast and in how much memory the long tasks get ready: loading, tokenising and judging, without a model.

    python -m macbench.bench.task_speed longbench_v2=DIR longgenbench=DIR [megabytes=465] [methods=2] [outputs=400]

LongBench v2: the items of DIR are repeated with new ids up to ``megabytes`` in a temporary file. Tokenising is compared with the
official way (encode, truncate, decode, encode) done anew for each of ``methods``, on the items of DIR, at 120,000 tokens.
LongGenBench: ``outputs`` texts of about 16K tokens in all their parts, judged by words.
"""

import json
import random
import resource
import tempfile
from pathlib import Path
from time import perf_counter

import pandas as pd
from omegaconf import OmegaConf

DEFAULTS = {"longbench_v2": None, "longgenbench": None, "megabytes": 465, "methods": 2, "outputs": 400}


def peak_mb() -> float:
    """Most memory that this process ever held, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def loading(chat, folder: str, megabytes: int) -> None:
    from macbench.tasks.longbench_v2 import LongBenchV2, data

    items = data.load(folder)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "data.json"
        with path.open("w", encoding="utf-8") as file:
            file.write("[")
            number = 0
            while file.tell() < megabytes * 1e6:
                item = items.item(number % len(items)) | {"_id": f"{number:024d}"}
                file.write(("," if number else "") + json.dumps(item, indent=4))
                number += 1
            file.write("]")
        began = perf_counter()
        task = LongBenchV2(chat, 131_072, data_path=str(path))
        loaded = perf_counter() - began
        task.example("zero_shot", 0)
        print(f"longbench_v2: {path.stat().st_size / 1e6:.0f} MB, {number} items: checked and hashed in {loaded:.1f} s,", end=" ")
        print(f"first example after {perf_counter() - began:.1f} s, peak memory {peak_mb():.0f} MB")


# Items of the whole data set by length, to weigh a sample of it.
LENGTHS = {"short": 180, "medium": 215, "long": 108}


def tokenising(chat, folder: str, methods: int) -> None:
    from macbench.tasks.longbench_v2 import LongBenchV2
    from macbench.tasks.longbench_v2.task import fill

    task = LongBenchV2(chat, 131_072, data_path=folder)
    fast, slow = {name: [] for name in LENGTHS}, {name: [] for name in LENGTHS}
    for i, facts in enumerate(task.items.facts):
        began = perf_counter()
        ours = task.example("zero_shot", i).input_ids
        fast[facts.length].append(perf_counter() - began)
        prompt = "".join(fill("zero_shot", task.items.item(i)))
        began = perf_counter()
        theirs = task.truncator.plain(prompt, task._most("zero_shot")).ids
        slow[facts.length].append(methods * (perf_counter() - began))
        if ours != theirs:
            raise AssertionError(f"item {facts.id}: tokens are not the official ones")
    ours, theirs = (sum(map(sum, times.values())) for times in (fast, slow))
    print(f"longbench_v2: {len(task.items)} prompts tokenised in {ours:.1f} s, the official way for {methods} methods {theirs:.1f} s", end=" ")
    print(f"({theirs / ours:.1f}x), same tokens, peak memory {peak_mb():.0f} MB")
    if all(fast.values()):
        ours, theirs = (sum(LENGTHS[name] * sum(x) / len(x) for name, x in times.items()) for times in (fast, slow))
        print(f"  weighed to 503 items by length: {ours:.0f} s and {theirs:.0f} s ({theirs / ours:.1f}x)")


def judging(folder: str, outputs: int) -> None:
    from macbench.judging.lexical import LexicalJudge
    from macbench.tasks.longgenbench import LongGenBench, data

    items = [item for of in data.load("16k", folder).by_scenario.values() for item in of]
    words = "the city garden of a museum and shopping library on Friday restaurant with birthday sports music tower week".split()
    rng, rows = random.Random(0), []
    for i in range(outputs):
        item = items[i % len(items)]
        length = 12_000 // item.number  # words; 16K tokens are about 12,000
        text = "".join(f"#*# {item.type} {n}: {' '.join(rng.choices(words, k=length))}\n" for n in range(1, item.number + 1))
        meta = {"type": item.type, "prefix": item.prefix, "number": item.number, "checks": item.checks}
        key = {"method": "full", "variant": "", "subtask": item.scenario, "example_id": str(i), "error": None}
        rows.append(key | {"text": text.removeprefix(item.prefix), "meta": json.dumps(meta)})
    frame = pd.DataFrame(rows)
    began = perf_counter()
    texts, checks, questions = LongGenBench.checks(frame)
    answers = [verdict.answer for _, verdict in LexicalJudge().ask(questions, "cpu", LongGenBench.verdict)]
    yes = pd.array([None if q < 0 else LongGenBench.verdict(answers[q]) for q in checks.question], dtype="boolean")
    LongGenBench.judged(texts, checks.assign(yes=yes))
    print(f"longgenbench: {outputs} texts, {len(checks)} checks parsed and judged by words in {perf_counter() - began:.1f} s")


def main() -> None:
    from macbench.cli import load_option
    from macbench.models.weights import load_chat

    config = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli())
    chat = load_chat(load_option("model", "smollm2"))
    if config.longgenbench:
        judging(config.longgenbench, config.outputs)
    if config.longbench_v2:
        loading(chat, config.longbench_v2, config.megabytes)
        tokenising(chat, config.longbench_v2, config.methods)


if __name__ == "__main__":
    main()
