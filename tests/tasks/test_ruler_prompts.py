"""Lengths and tokens of RULER prompts, against tokenising the whole prompt."""

import numpy as np
import pytest

from macbench.errors import ConfigError
from macbench.models.chat import Chat
from macbench.tasks.ruler import SUBTASKS, Ruler, protocol
from macbench.tasks.ruler.pieces import CUTS, Pieces, WholeTexts, exact_cuts
from tests.tasks.conftest import chat_of

# Contexts in which the fixed parts of a task leave room with every tokenizer here, tokens. Those of the tests' own are coarse.
SMALL = {"vt": 2048, "cwe": 3000, "fwe": 1024, "qa_1": 2048, "qa_2": 5000}
MIDDLE = {"cwe": 8192, "qa_2": 8192}


def tokens_of(chat: Chat, text: str) -> list[int]:
    """Independent of encode_piece and of anything cached: special tokens in the text count, one BOS in front."""
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = chat.tokenizer.bos_token_id
    wants_bos = chat.tokenizer("a")["input_ids"][0] == bos
    return ids if not wants_bos or ids[0] == bos else [bos, *ids]


def check(task: Ruler, chat: Chat, subtask: str, index: int, ctx: int):
    example = task.example(subtask, index)
    assert example.max_new_tokens == protocol.WORDING[subtask].tokens_to_generate
    assert example.input_ids == tokens_of(chat, example.prompt)
    assert len(example.input_ids) + example.max_new_tokens <= ctx
    return example


def check_full(task: Ruler, chat: Chat, subtask: str, index: int, ctx: int):
    """One more unit of haystack would not fit, or there is no more."""
    example = check(task, chat, subtask, index, ctx)
    generator = task._generator(subtask)
    draft = generator.draft(index)
    units = example.meta["haystack_units"]
    assert generator.pieces.text(draft.parts(units)) == example.prompt
    if units < draft.largest:
        more = generator.pieces.text(draft.parts(units + 1))
        assert len(tokens_of(chat, more)) + example.max_new_tokens > ctx


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_input_ids_are_the_tokens_of_the_prompt_and_fill_the_context(any_chat, made_data, subtask):
    for index, ctx in ((0, SMALL.get(subtask, 800)), (3, MIDDLE.get(subtask, 4096))):
        check_full(Ruler(any_chat, ctx, data_path=str(made_data)), any_chat, subtask, index, ctx)


@pytest.mark.parametrize("subtask", SUBTASKS)
@pytest.mark.parametrize("ctx", [4096, 32768])
def test_longer_contexts_with_all_data(chat, ruler_folder, subtask, ctx):
    check_full(Ruler(chat, ctx, data_path=str(ruler_folder)), chat, subtask, 5, ctx)


@pytest.mark.parametrize("template", ["base", "meta-llama3"])
@pytest.mark.parametrize("subtask", SUBTASKS)
def test_other_templates(made_data, template, subtask):
    chat = Chat(chat_of("llama3_like").tokenizer, template)
    example = check(Ruler(chat, 8192, data_path=str(made_data)), chat, subtask, 1, 8192)
    assert example.input_ids.count(chat.tokenizer.bos_token_id) == 1
    assert example.prompt.startswith(chat.head) and example.prompt.count(chat.tail or "\0") == (bool(chat.tail) and 1 + (subtask == "cwe"))


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_one_bos_and_an_untouched_chat_template(made_data, subtask):
    chat = chat_of("llama3_like")
    example = Ruler(chat, 8192, data_path=str(made_data)).example(subtask, 0)
    assert example.input_ids[0] == chat.tokenizer.bos_token_id
    assert example.input_ids.count(chat.tokenizer.bos_token_id) == 1
    assert example.prompt.startswith("<s><|system|>\nYou are a model. Some answers are all short.<|end|>\n<|user|>\n")


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_too_small_a_context_is_one_line(chat, made_data, subtask):
    for ctx in (1, 60, 200):
        with pytest.raises(ConfigError) as caught:
            Ruler(chat, ctx, data_path=str(made_data)).example(subtask, 0)
        message = str(caught.value)
        assert message.startswith(f"ctx={ctx}: {subtask} needs at least ") and "\n" not in message
    needed = int(message.split("at least ")[1].split()[0])
    generator = Ruler(chat, needed, data_path=str(made_data))._generator(subtask)
    if subtask not in ("cwe", "fwe"):  # their units depend on ctx
        assert generator.example(0).meta["haystack_units"] >= 1
        with pytest.raises(ConfigError):
            Ruler(chat, needed - 1, data_path=str(made_data)).example(subtask, 0)


def test_kinds_of_cut_are_told_apart():
    everything = frozenset(CUTS)
    assert exact_cuts(chat_of("smollm2")) == everything
    assert exact_cuts(chat_of("llama3_like")) == everything
    assert exact_cuts(chat_of("gpt2_like")) == everything - {"digits", "uuid"}
    assert exact_cuts(chat_of("metaspace")) == {"space"}
    assert not exact_cuts(chat_of("llama2_like"))


def test_whole_texts_are_used_where_cuts_fail(made_data):
    def whole(name: str) -> set[str]:
        return set(Ruler(chat_of(name), 4096, data_path=str(made_data)).protocol()["whole_text_tokenization"])

    assert whole("smollm2") == whole("llama3_like") == set()
    assert whole("gpt2_like") == {"niah_multikey_2", "niah_multikey_3"}
    assert whole("metaspace") >= {"niah_single_1", "niah_multikey_2", "niah_multikey_3", "qa_1", "qa_2"}
    assert whole("llama2_like") == set(SUBTASKS)


def test_a_cut_that_fails_on_the_data_only_is_noticed(chat, made_data, monkeypatch):
    monkeypatch.setattr(Pieces, "_gather", lambda self, entries: np.zeros(len(entries), np.int32))
    task = Ruler(chat, 1024, data_path=str(made_data), subtasks=["niah_single_2"])
    assert isinstance(task._generator("niah_single_2").pieces, WholeTexts)
    check(task, chat, "niah_single_2", 0, 1024)


def test_documents_are_tokenised_like_other_texts(chat, made_data):
    texts = ["One two three.\n\nDocument", " Begins odd and  has two spaces", "Title\nText, 1 2 3 \n\nDocument", "x"]
    pieces = Pieces(chat)
    assert pieces.ids([pieces.add_documents(texts)]).tolist() == [token for text in texts for token in chat.encode_piece(text)]
