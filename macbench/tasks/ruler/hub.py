"""SQuAD and HotpotQA from the Hugging Face hub, rebuilt into the layout of the original files; imports ``datasets`` only when called."""

import contextlib

_TIMEOUT = 5  # seconds to answer, after which the hub counts as unreachable and only the local cache is asked
SQUAD_REPO, HOTPOT_REPO = "rajpurkar/squad_v2", "hotpotqa/hotpot_qa"


class Unreachable(Exception):
    """The data set is neither on the hub within reach nor in the local cache; ``str`` says so in one line."""


def squad() -> tuple[list[dict], str]:
    """SQuAD v2 validation as the ``data`` of dev-v2.0.json: articles of paragraphs of questions, in file order."""
    rows = _rows(SQUAD_REPO, None)
    articles: dict[str, dict[str, list]] = {}
    for row in rows:
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
    rows = _rows(HOTPOT_REPO, "distractor")
    content = [
        {
            "question": row["question"],
            "answer": row["answer"],
            "context": [list(pair) for pair in zip(row["context"]["title"], row["context"]["sentences"], strict=True)],
        }
        for row in rows
    ]
    return content, f"huggingface.co/datasets/{HOTPOT_REPO} distractor validation"


def _rows(repo: str, config: str | None):
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise Unreachable(f"fetching {repo} needs the package {error.name}") from None
    with contextlib.ExitStack() as stack:
        try:
            huggingface_hub.HfApi().dataset_info(repo, timeout=_TIMEOUT)
        except Exception:  # whatever keeps the hub out of reach, the cache may still have the data set
            # The client would retry for half a minute before it looks into its cache; offline it looks at once.
            stack.enter_context(_set(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(_set(datasets.config, "HF_HUB_OFFLINE", True))
        try:
            return datasets.load_dataset(repo, config, split="validation")
        except Exception as error:
            raise Unreachable(f"{repo} cannot be fetched from the Hugging Face hub ({type(error).__name__})") from None


@contextlib.contextmanager
def _set(module: object, name: str, value: object):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
