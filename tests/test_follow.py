"""Following full attention's text, against the model library in float64 with a mask that is the method."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from macbench_kernels import kernels

from macbench import generate
from macbench.engine import Engine
from macbench.methods.full import Full
from macbench.methods.streaming_llm import StreamingLLM
from macbench.models.weights import LoadedModel, load
from macbench.sampling import Sampling
from macbench.settings import Variant
from macbench.tasks.base import Example
from tests import real
from tests.models.tiny import tiny
from tests.tasks import longgenbench_data
from tests.test_cli import macbench, tiny_args, tiny_model  # noqa: F401

NEW, SINKS, RECENT = 12, 2, 9


class Plain:
    """A task with one call."""


def example(n: int, new: int, name: str, question: int = 0) -> Example:
    ids = [int(x) for x in torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n))]
    return Example("a", name, "", ids, [], new, {}, Sampling(), question=question)


@pytest.fixture(scope="module")
def setup():
    network = tiny("llama").cpu()
    return network, LoadedModel(network, real.chat(), frozenset())


def logits(network, ids: list[int], prompt: int, windowed: bool) -> torch.Tensor:
    """Of the library's own attention: generated tokens see sinks and a window if ``windowed``, everything else sees all before it."""
    n = len(ids)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    seen = j <= i
    if windowed:
        seen &= (i < prompt) | (j < SINKS) | (j >= i - RECENT)
    mask = torch.zeros(n, n, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)[None, None]
    with torch.inference_mode():
        return network(torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0].double()


@pytest.mark.parametrize(("steps", "questions"), [(5, (0, 0)), (100, (0, 0)), (100, (6, 17)), (3, (0, 1))])
def test_agreement_is_that_of_the_library_with_the_methods_mask(setup, tmp_path, steps, questions):
    """Two examples of different lengths in a batch with an idle row, the second one shorter than what is followed.

    Tokens of a question are part of the prompt for full attention, and of the decoding for the method.
    """
    network, model = setup
    wanted = [example(40, NEW, "0", questions[0]), example(55, 7, "1", questions[1])]
    variants = [Variant("streaming_llm", "", StreamingLLM(SINKS, RECENT)), Variant("full", "", Full())]
    engine = Engine(network, kernels("torch"), 256, batch=3)
    made = generate.answers(engine, model, Plain(), variants, wanted, tmp_path, lambda stage: lambda count: None, steps)
    for item, (answer, full) in zip(wanted, made, strict=True):
        prompt, asked, text = len(item.input_ids), item.question, full.generation.tokens
        ids = item.input_ids + text[:-1]
        # Predictions after generated tokens; the first token is the prefill's, or the last one of the question predicts it.
        first = prompt - (asked > 0)
        exact, other = (logits(network, ids, prompt - asked, w)[first : prompt + min(steps, len(text) - 1)] for w in (False, True))
        assert exact.argmax(-1).tolist() == text[asked == 0 :][: len(exact)]
        for generation in (answer.generation, full.generation):
            assert generation.question_steps == asked and len(generation.step_seconds) == asked + len(generation.tokens) - 1
            assert generation.positions.tolist() == list(range(prompt - asked, prompt + len(generation.tokens) - 1))
        free = answer.generation.tokens  # greedy along its own text, too
        own = logits(network, item.input_ids + free[:-1], prompt - asked, True)[prompt - 1 :].argmax(-1).tolist()
        assert free[asked == 0 :] == own[asked == 0 :]
        p, q = exact.log_softmax(-1), other.log_softmax(-1)
        assert answer.fidelity["kl_mean"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
        assert answer.fidelity["top1_agreement"] == (exact.argmax(-1) == other.argmax(-1)).double().mean().item()
        assert len(answer.layer_errors) == engine.shape.layers and all(0.01 < e < 10 for e in answer.layer_errors)
        assert answer.fidelity["output_error"] == pytest.approx(sum(answer.layer_errors) / engine.shape.layers)
        assert not full.fidelity and not full.layer_errors


def test_a_method_that_fails_to_follow_leaves_the_next_one_alone(setup, tmp_path, monkeypatch):
    network, model = setup
    variants = [Variant("a", "", StreamingLLM(1, 3)), Variant("streaming_llm", "", StreamingLLM(SINKS, RECENT)), Variant("full", "", Full())]

    def run():
        engine = Engine(network, kernels("torch"), 256)
        return generate.answers(engine, model, Plain(), variants, [example(40, NEW, "0")], tmp_path, lambda stage: lambda count: None, 8)

    whole, decode = run()[0], Engine.decode_batch

    def fails(self, requests, method, progress, watch=None, preparation=None):
        def broken(step, found):
            watch(step, found)
            if step == 3:
                raise RuntimeError("lost")

        return decode(self, requests, method, progress, broken if method is variants[0].measured else watch, preparation)

    monkeypatch.setattr(Engine, "decode_batch", fails)
    made = run()[0]
    assert not made[0].fidelity and made[0].text == whole[0].text
    assert made[1].fidelity == whole[1].fidelity and made[1].layer_errors == whole[1].layer_errors


def test_a_run_of_the_task(macbench, tiny_args, tmp_path):  # noqa: F811
    args = [*tiny_args, "task=fidelity", "task.steps=20", "method=streaming_llm", "method.recent=40", "compare=[tova]", "limit=2"]
    code, out, err = macbench(*args)
    assert code == 0, err
    assert "protocol: task fidelity" in err and "along full attention's text" in out and "relative error of attention outputs, by layer" in out
    (run,) = (tmp_path / "runs" / "fidelity").glob("tiny-llama*/512/streaming_llm-*")
    frames = {table: pd.concat(map(pd.read_parquet, sorted((run / table).glob("*.parquet")))) for table in ("samples", "layers")}
    samples = frames["samples"].set_index(["method", "example_id"])
    assert set(samples.index.levels[0]) == {"streaming_llm", "tova", "full"}
    errors = samples.sort_index().output_error
    assert (errors["streaming_llm"] > 0.01).all() and (errors["tova"] < 1e-5).all() and errors["full"].isna().all()  # tova keeps 1024 tokens
    means = frames["layers"].groupby(["method", "example_id"]).output_error.mean()
    pd.testing.assert_series_equal(means.drop("full"), errors.drop("full"))
    assert macbench(*args)[1] == out


def test_texts_may_go_on_past_their_end(macbench, tiny_args, tmp_path, monkeypatch):  # noqa: F811
    """Every token is a stop token here."""
    monkeypatch.setattr("macbench.run.load", lambda *args: replace(load(*args), stop_ids=frozenset(range(49152))))
    lengths = {}
    for value in ("false", "true"):
        runs = tmp_path / value
        more = ["task=fidelity", "method=streaming_llm", "limit=1", f"task.ignore_eos={value}", f"runs_dir={runs}"]
        assert macbench(*[a for a in tiny_args if not a.startswith("runs_dir")], *more)[0] == 0
        frame = pd.concat(map(pd.read_parquet, runs.rglob("samples/*.parquet")))
        lengths[value] = set(zip(frame.new_tokens, frame.finish_reason, strict=True))
    assert lengths == {"false": {(1, "stop")}, "true": {(128, "length")}}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["method=full"], "method=full: is what task=fidelity measures others against"),
        (["task.steps=0"], "task.steps=0: must be an integer of at least 1"),
        (["task.ignore_eos=2"], "task.ignore_eos=2: must be true or false"),
    ],
)
def test_wrong_settings_get_one_line(macbench, tiny_args, args, said):  # noqa: F811
    code, _, err = macbench(*tiny_args, "task=fidelity", "method=streaming_llm", *args)
    assert (code, err.count("\n")) == (2, 1) and said in err


def test_a_run_whose_questions_are_decoded(macbench, tiny_args, tmp_path):  # noqa: F811
    args = [*tiny_args, "question_in_prefill=false", "method=streaming_llm", "method.recent=40", "compare=[full]", "limit=1"]
    code, out, err = macbench(*args)
    assert code == 0, err
    (run,) = (tmp_path / "runs").rglob("streaming_llm-*")
    samples, steps = (pd.read_parquet(next((run / table).glob("*.parquet"))).set_index("method") for table in ("samples", "steps"))
    asked = samples.question_steps["full"]
    assert asked > 10 and (samples.question_steps == asked).all()
    assert (samples.decode_steps == asked + samples.new_tokens - 1).all()
    first = samples.prompt_tokens["full"] - asked
    assert steps.loc["full"].position.tolist() == list(range(first, first + samples.decode_steps["full"]))
    late = steps.loc["streaming_llm"].query(f"step >= {asked}")
    assert f"{late.bytes_kv.sum() / late.bytes_full.sum():.4f}" in out.partition("generated tokens alone")[2]
    assert macbench(*args)[1] == out


def test_what_has_no_question_says_so(macbench, tiny_args, tmp_path):  # noqa: F811
    folder = longgenbench_data.write(tmp_path)
    args = [a for a in tiny_args if not a.startswith(("ctx", "task"))]
    args += ["task=longgenbench", f"task.data_path={folder}", "ctx=400", "question_in_prefill=false"]
    code, _, err = macbench(*args)
    assert (code, err.count("\n")) == (2, 1) and err.startswith("macbench: question_in_prefill=false: needs a task")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["method=kivi"], "method.group=32: must be a divisor of the model's head dimension 16"),
        (
            ["method=rocketkv", "method.window=400"],
            "method.budget=1024: leaves 384 prompt tokens at ctx=512 with method.max_new=128; must be at least",
        ),
        (["method=full", "compare=[kivi]"], "method.group=32: must be a divisor"),
    ],
)
def test_knobs_that_do_not_go_with_the_model_are_found_before_the_prefill(macbench, tiny_args, args, said):  # noqa: F811
    code, out, err = macbench(*tiny_args, *args)
    assert (code, err.count("\n"), out) == (2, 1, "") and said in err
