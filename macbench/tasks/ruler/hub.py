"""SQuAD and HotpotQA from the Hugging Face hub, rebuilt into the layout of the original files."""

from macbench.tasks.hub import Unreachable, rows

SQUAD_REPO, HOTPOT_REPO = "rajpurkar/squad_v2", "hotpotqa/hotpot_qa"

__all__ = ["Unreachable", "hotpot", "squad"]


def squad() -> tuple[list[dict], str]:
    """SQuAD v2 validation as the ``data`` of dev-v2.0.json: articles of paragraphs of questions, in file order."""
    found = rows(SQUAD_REPO, None, "validation")
    articles: dict[str, dict[str, list]] = {}
    for row in found:
        texts = [{"text": text} for text in row["answers"]["text"]]
        qa = {"question": row["question"], "answers": texts, "is_impossible": not texts}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(qa)
    content = [
        {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs.items()]}
        for title, paragraphs in articles.items()
    ]
    return content, f"huggingface.co/datasets/{SQUAD_REPO} validation"


def hotpot() -> tuple[list[dict], str]:
    """HotpotQA distractor validation as in hotpot_dev_distractor_v1.json: ``context`` is a list of [title, sentences]."""
    found = rows(HOTPOT_REPO, "distractor", "validation")
    content = [
        {
            "question": row["question"],
            "answer": row["answer"],
            "context": [list(pair) for pair in zip(row["context"]["title"], row["context"]["sentences"], strict=True)],
        }
        for row in found
    ]
    return content, f"huggingface.co/datasets/{HOTPOT_REPO} distractor validation"
