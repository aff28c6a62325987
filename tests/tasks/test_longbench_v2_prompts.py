"""LongBench v2's prompts and their truncation, against the official procedure written out."""

import pytest

from macbench.errors import ConfigError
from macbench.tasks.longbench_v2 import LongBenchV2, protocol
from macbench.tasks.longbench_v2.task import fill
from macbench.tasks.longbench_v2.truncate import PROBE, Truncator
from tests.tasks import longbench_v2_data as made

TEMPLATE_SHA256 = "c41172428be851c569fa77adf3df245d06e9957380c57c908244145c3f604b60"


def official(chat, prompt: str, most: int) -> tuple[str, list[int], bool]:
    """pred.py, then the chat endpoint: encode, keep both halves, decode, template, encode."""
    ids = chat.encode(prompt)
    if len(ids) > most:
        prompt = chat.tokenizer.decode(ids[: most // 2] + ids[-most // 2 :], skip_special_tokens=True)
    return prompt, chat.encode(chat.head + prompt + chat.tail), len(ids) > most


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(made.folder(tmp_path_factory.mktemp("longbench")))


def test_the_official_words_are_what_they_were():
    assert protocol.template_hash() == TEMPLATE_SHA256
    assert protocol.COT.endswith("Let\u2019s think step by step:")
    assert protocol.NO_CONTEXT.startswith("What is the correct") and "\n\nWhat is the single, most likely" in protocol.NO_CONTEXT
    assert "Based on the above, what is the single, most likely answer choice? Format" in protocol.COT_ANSWER


def test_fields_are_stripped_and_replaced_in_order():
    """A placeholder in a field that was put in earlier is replaced, as str.replace one after the other does it."""
    item = made.item(1, context=" say $Q$ \n")
    expected = protocol.ZERO_SHOT
    for placeholder, field in protocol.FIELDS:
        expected = expected.replace(placeholder, item[field].strip())
    assert "".join(fill("zero_shot", item)) == expected
    assert "What is Nothing. about 1?" in expected and "say What is Nothing. about 1?" in expected
    assert "think step by step: so A.\n\nBased" in fill("cot_answer", item, "so A.")[0]


@pytest.mark.parametrize("most", [150, 333, 1000, 1500, 10**6])
def test_truncation_is_the_official_one(any_chat, most):
    truncator = Truncator(any_chat)
    odd = made.item(1, context="A <|end|> special. " + made.item(1)["context"] + " \x15\n\n\x17 odd\r\n bytes 中文。\n中文 text <s> ")
    for item in (made.item(0), made.item(2), odd, made.item(3, context="中文没有空格" * 300)):
        for prompt in ("zero_shot", "cot"):
            parts = fill(prompt, item)
            cut = truncator.around(item["_id"] + item["context"][:3], *parts, most, max(most, 400))
            assert (cut.text, cut.ids, cut.truncated) == official(any_chat, "".join(parts), most)


def test_fast_tokenizers_are_found_fast(any_chat):
    """Byte-level tokenizers can be cut; the others are served the official way."""
    name = type(any_chat.tokenizer.backend_tokenizer.decoder).__name__
    assert Truncator(any_chat).exact == (name == "ByteLevel")


def test_only_the_ends_of_a_long_text_are_encoded(chat):
    truncator = Truncator(chat)
    text = made.item(2)["context"].strip() + "\n"
    ends = truncator.ends("x", text, 400)
    whole = chat.encode_piece(text)
    assert ends.tail is not None
    assert ends.head.tolist() == whole[: len(ends.head)] and ends.tail.tolist() == whole[-len(ends.tail) :]
    assert len(ends.head) + len(ends.tail) == 402 < len(whole)
    assert truncator.ends("x", "never read again", 300) is ends
    assert truncator.ends("y", PROBE, 10**6).tail is None


def test_a_context_is_tokenised_once_for_all_prompts(chat, folder, monkeypatch):
    task = LongBenchV2(chat, 4096, subtasks=None, data_path=folder)
    done = []
    encode = Truncator._encode
    monkeypatch.setattr(Truncator, "_encode", lambda self, text: done.append(len(text)) or encode(self, text))
    for subtask in task.subtasks:
        task.example(subtask, 2)
    assert sum(length > 3000 for length in done) <= 2 + 3  # two ends, or one whole; and what is left of each truncated prompt


@pytest.mark.parametrize("ctx", [700, 1500, 4096, 20000])
def test_prompts_fit(any_chat, folder, ctx):
    task = LongBenchV2(any_chat, ctx, subtasks=["zero_shot", "no_context"], data_path=folder)
    for subtask in task.subtasks:
        for index in range(3):
            example = task.example(subtask, index)
            assert len(example.input_ids) + 128 <= ctx and example.max_new_tokens == 128
            assert example.input_ids == any_chat.encode(example.prompt)
            assert "What is the correct answer to this question:" in example.prompt
            assert ("<text>" in example.prompt) == (subtask == "zero_shot")
            assert example.references == [made.item(index)["answer"]]


def test_the_middle_goes_and_both_ends_stay(chat, folder):
    example = LongBenchV2(chat, 1000, data_path=folder).example("zero_shot", 2)
    assert example.meta["truncated"] and "<text>\nTitle\n" in example.prompt
    assert example.prompt.index("(D) The 'fourth' one") > example.prompt.index("</text>")
    assert len(example.input_ids) + 128 > 1000 - 8


def test_reasoning_is_followed_by_a_call_for_the_answer(chat, folder):
    task = LongBenchV2(chat, 4096, subtasks="cot", temperature=0.1, data_path=folder)
    first = task.example("cot", 1)
    assert first.max_new_tokens == 1024 and first.prompt.count("think step by step:") == 1
    second = task.follow_up(first, "  It is B. ")
    assert "Let\u2019s think step by step: It is B.\n\nBased on" in second.prompt and "omitted here" in second.prompt
    assert (second.subtask, second.example_id, second.max_new_tokens, second.meta["call"]) == ("cot", "1", 128, 2)
    assert second.sampling.temperature == 0.1 and second.sampling.seed != first.sampling.seed
    assert task.follow_up(second, "x") is None
    assert LongBenchV2(chat, 4096, data_path=folder).follow_up(task.example("zero_shot", 0), "x") is None
    assert task.example("cot", 1) == first


def test_settings(chat, folder):
    with pytest.raises(ConfigError, match="did you mean zero_shot"):
        LongBenchV2(chat, 4096, subtasks=["zeroshot"], data_path=folder)
    with pytest.raises(ConfigError, match="chat template and the answer alone"):
        LongBenchV2(chat, 100, data_path=folder)
    with pytest.raises(ConfigError, match="temperature=-1"):
        LongBenchV2(chat, 4096, temperature=-1, data_path=folder)
    facts = LongBenchV2(chat, 200_000, data_path=folder).protocol()
    assert facts["max_prompt_tokens"] == 120_000 and facts["items"] == 8 and len(facts["data_sha256"]) == 64
    assert LongBenchV2(chat, 8192, data_path=folder).protocol()["max_prompt_tokens"] < 8192
