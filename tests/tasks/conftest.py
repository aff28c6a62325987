"""Fixtures for tasks: tokenizers as chats, and folders of data in the official layouts."""

from functools import lru_cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from macbench.models.chat import Chat
from macbench.models.smollm2 import converted
from tests.tasks import ruler_data, tokenizers_made

REAL_DATA = Path(__file__).parents[2].parent / "shared" / "data" / "ruler"
TOKENIZERS = {
    "smollm2": lambda: AutoTokenizer.from_pretrained(converted()),
    "llama3_like": tokenizers_made.llama3_like,
    "gpt2_like": tokenizers_made.gpt2_like,
    "metaspace": tokenizers_made.metaspace,
    "llama2_like": tokenizers_made.llama2_like,
}


@lru_cache
def chat_of(name: str) -> Chat:
    return Chat(TOKENIZERS[name]())


@pytest.fixture(scope="session")
def chat() -> Chat:
    """The default model's tokenizer with its chat template."""
    return chat_of("smollm2")


@pytest.fixture(scope="session", params=TOKENIZERS)
def any_chat(request) -> Chat:
    return chat_of(request.param)


@pytest.fixture(scope="session")
def made_data(tmp_path_factory) -> Path:
    return ruler_data.write(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session", params=["made", "real"])
def ruler_folder(request, tmp_path_factory, made_data) -> Path:
    """Data made here, and the official files if they lie beside the checkout (else other data made here)."""
    if request.param == "made":
        return made_data
    return REAL_DATA if REAL_DATA.is_dir() else ruler_data.write(tmp_path_factory.mktemp("other"), seed=1)
