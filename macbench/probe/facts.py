"""Questions over documents: invented facts about invented people, and sentences of the background text to be completed."""

import numpy as np

from macbench.probe.text import Background
from macbench.tasks.ruler.data import QuestionSet

# (what a document says of NAME, question, kind of the answer)
RELATIONS = (
    ("NAME was born in {}.", "Where was NAME born?", "place"),
    ("In the year {}, NAME moved to the coast for good.", "In what year did NAME move to the coast?", "year"),
    ("The mother of NAME was called {}.", "Who was the mother of NAME?", "person"),
    ("For most of a long life NAME worked as a {}.", "What was the profession of NAME?", "trade"),
    ("NAME is best known for a book about {}.", "What is the book of NAME about?", "thing"),
    ("{} taught NAME to read and to write.", "Who taught NAME to read?", "person"),
    ("The house of NAME, which stands in {}, can still be visited.", "In which town does the house of NAME stand?", "place"),
    ("At the age of {}, NAME crossed the mountains alone.", "How old was NAME when crossing the mountains?", "age"),
    ("NAME founded a school in {} and gave it all the money that was left.", "When did NAME found a school?", "year"),
    ("Friends remember that NAME could never resist {}.", "What could NAME never resist?", "thing"),
    ("After the war NAME was made governor of {}.", "Of what place was NAME made governor?", "place"),
    ("NAME married {}, a neighbour from childhood.", "Whom did NAME marry?", "person"),
)
TRADES = "carpenter baker sailor weaver printer surveyor gardener teacher doctor farmer painter mason miller lawyer tailor".split()
THINGS = "old maps|honey cakes|river birds|clock towers|stone bridges|salt trade|winter stars|garden walls|lost letters|wild horses".split("|")
_ONSETS, _RIMES = "B Br C D Dr F G Gr H K L M N P R S St T Th V W".split(), "ald en ick om urt ell and ost ir ane ole usk amb eth inn".split()
_ENDINGS = {"place": "ton ford bury holm wick stead mouth".split(), "person": "son er well man ley wright ard".split()}
DOCUMENTS = 1500


def question_set(text: Background, rng: np.random.Generator) -> QuestionSet:
    """``DOCUMENTS`` documents and a question about each, in the form of RULER's question sets."""
    docs, questions = [], []
    for i in range(DOCUMENTS):
        first, last = text.passage(rng, int(rng.integers(60, 160)))
        sentences = text.sentences[first:last]
        if i % 2:
            doc, question, answer = _completion(sentences, rng)
        else:
            doc, question, answer = _biography(sentences, rng)
        if answer:
            questions.append((question, [answer], [len(docs)], []))
        docs.append(doc)
    return QuestionSet(questions, docs)


def _biography(sentences: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    """A few facts about one person between other sentences; one of them is asked for."""
    name = f"{_invented(rng, 'person')} {_invented(rng, 'person')}"
    chosen = rng.choice(len(RELATIONS), int(rng.integers(3, 7)), replace=False)
    answers = [_answer(rng, RELATIONS[i][2]) for i in chosen]
    lines = [RELATIONS[i][0].replace("NAME", name).format(answer) for i, answer in zip(chosen, answers, strict=True)]
    for sentence in sentences[: int(rng.integers(0, 4))]:
        lines.insert(int(rng.integers(1, len(lines) + 1)), sentence)
    return " ".join(lines), RELATIONS[chosen[0]][1].replace("NAME", name), answers[0]


def _completion(sentences: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    """A passage; the question quotes the beginning of a sentence and the answer is how it goes on. No answer if every sentence is short."""
    doc = " ".join(sentences)
    long = [sentence.split() for sentence in sentences if len(sentence.split()) >= 10]
    if not long:
        return doc, "", ""
    words = long[int(rng.integers(len(long)))]
    cut = int(rng.integers(5, len(words) - 3))
    start = max(cut - 12, 0)
    return doc, f'How does the passage go on after "{" ".join(words[start:cut])}"?', " ".join(words[cut : cut + 6]).rstrip(".,;:")


def _answer(rng: np.random.Generator, kind: str) -> str:
    match kind:
        case "year":
            return str(rng.integers(1650, 1990))
        case "age":
            return str(rng.integers(18, 80))
        case "trade":
            return TRADES[rng.integers(len(TRADES))]
        case "thing":
            return THINGS[rng.integers(len(THINGS))]
        case "place":
            return _invented(rng, "place")
        case _:
            return f"{_invented(rng, 'person')} {_invented(rng, 'person')}"


def _invented(rng: np.random.Generator, kind: str) -> str:
    endings = _ENDINGS[kind]
    return _ONSETS[rng.integers(len(_ONSETS))] + _RIMES[rng.integers(len(_RIMES))] + endings[rng.integers(len(endings))]
