"""Where the question begins: the part of a prompt that question_in_prefill=false leaves to decoding."""

import pytest

from macbench.tasks.longbench_v2 import LongBenchV2
from macbench.tasks.ruler import Ruler
from tests import real
from tests.tasks import longbench_v2_data, ruler_data

BEGINS = {
    "niah_single_1": "What is the special magic number for ",
    "niah_multikey_3": "What is the special magic uuid for ",
    "niah_multiquery": "What are all the special magic numbers for ",
    "vt": "Question: Find all variables that are assigned the value ",
    "cwe": "Question: What are the 10 most common words",
    "fwe": "Question: Do not provide any explanation.",
    "qa_1": "Question: ",
    "qa_2": "Question: ",
}


@pytest.mark.parametrize("subtask", BEGINS)
def test_questions_of_ruler(subtask, tmp_path):
    example = Ruler(real.chat(), 4096, subtasks=[subtask], data_path=str(ruler_data.write(tmp_path))).example(subtask, 0)
    question = real.chat().tokenizer.decode(example.input_ids[-example.question :])
    assert question.startswith(BEGINS[subtask]) and example.prompt.endswith(question)
    assert "\n" not in question.partition("<|im_end|>")[0]  # one line


@pytest.mark.parametrize(("subtask", "asked"), [("zero_shot", True), ("cot", True), ("no_context", False)])
def test_questions_of_longbench_v2(subtask, asked, tmp_path):
    example = LongBenchV2(real.chat(), 2000, subtasks=[subtask], data_path=str(longbench_v2_data.folder(tmp_path))).example(subtask, 0)
    if asked:
        question = real.chat().tokenizer.decode(example.input_ids[-example.question :])
        assert question.startswith("What is the correct answer to this question: ") and example.prompt.endswith(question)
    else:
        assert example.question == 0
