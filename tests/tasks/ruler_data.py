"""Small data in RULER's official layouts, with the awkward corners that the real files have: odd spaces, quotes, unanswerable questions."""

import json
import random
from pathlib import Path

WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one you".split()
NAMES = "Normandy Rollo Amalfi Edward Dyrrachium Sicily Naïveté O'Brien Zürich McDonald".split()


def sentence(rng: random.Random, length: int = 14) -> str:
    words = [rng.choice(WORDS + NAMES) for _ in range(length)]
    words[rng.randrange(length)] = rng.choice(["1066", "3.14", "(c. 911)", '"quoted"', "e.g.", "well—known", "20,000", "St. Clair"])
    return " ".join(words).capitalize() + rng.choice([".", ".", ".", "?", "!", ".)", '."'])


def paragraph(rng: random.Random) -> str:
    text = " ".join(sentence(rng) for _ in range(rng.randrange(3, 8)))
    return {0: " " + text, 1: text + " ", 2: text.replace(" and ", "  and ", 1), 3: f'"{text}"', 4: text + "\n"}.get(rng.randrange(12), text)


def essays(seed: int) -> dict:
    rng = random.Random(seed)
    lines = [sentence(rng) + rng.choice([" ", "\n", "\n\n", "  ", ""]) for _ in range(400)]
    return {"text": "".join(lines)}


def squad(seed: int, articles: int = 6) -> dict:
    rng = random.Random(seed)
    data = []
    for a in range(articles):
        paragraphs = []
        for p in range(10):
            qas = []
            context = paragraph(rng)
            for q in range(3):
                impossible = q == 1
                answers = [] if impossible else [{"text": text, "answer_start": 0} for text in context.split()[q : q + 1 + q]]
                qas.append({"question": f"Which {a}-{p}-{q}?", "id": f"{a}-{p}-{q}", "answers": answers, "is_impossible": impossible})
            paragraphs.append({"context": context, "qas": qas})
        data.append({"title": f"Article {a}", "paragraphs": paragraphs})
    return {"version": "v2.0", "data": data}


def hotpot(seed: int, items: int = 30) -> list:
    rng = random.Random(seed)
    return [
        {
            "_id": f"{i}",
            "question": f"Who is number {i}?",
            "answer": rng.choice(NAMES),
            "context": [[f"Title {i} {t}", [("" if s == 0 else " ") + sentence(rng) for s in range(2)]] for t in range(10)],
        }
        for i in range(items)
    ]


def write(folder: Path, seed: int = 0) -> Path:
    """All three files in ``folder``."""
    contents = {
        "PaulGrahamEssays.json": essays(seed),
        "dev-v2.0.json": squad(seed),
        "hotpot_dev_distractor_v1.json": hotpot(seed),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder
