"""budget=: every method gets the knob for it, or one line says which floors are in the way. Small stand-ins have knobs and floors."""

import json
from dataclasses import dataclass, replace

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from macbench import budget, settings
from macbench.counting import Shape
from macbench.errors import ConfigError
from macbench.methods.base import Method
from macbench.methods.full import Full
from macbench.models.adapter import attention_shape
from macbench.models.weights import planned_shape
from macbench.settings import Variant
from macbench.tasks.base import Example
from tests.models.tiny import ARCHITECTURES, tiny
from tests.test_cli import macbench, samples, tiny_args, tiny_model  # noqa: F401


@dataclass
class Recent(Method):
    """Attends to the last ``size`` tokens: rho_bytes = size / L."""

    size: int = 256
    band: int = 1

    def fit(self, rho, tokens, shape, generated=1):
        if rho * tokens < 4:
            raise ConfigError("budget", rho, f"reads at least 4 tokens, {4 / tokens:.3g}")
        return replace(self, size=int(rho * tokens))

    def attend(self, layer, q_pre, q, cache):
        stop = cache.lengths[:, None].expand(-1, q.shape[1])
        spans = torch.stack([(stop - self.size).clamp(min=0), stop])[None]
        self.ledger.read(layer, spans)
        return self.kernels.attend(q, cache, layer, spans, self.shape.scale).out[0].to(q.dtype)


@dataclass
class Halved(Method):
    """Reads a half, whatever its knob."""

    bits: int = 8

    def fit(self, rho, tokens, shape, generated=1):
        if rho < 0.5:
            raise ConfigError("budget", rho, "halved stores 8 bits of 16: its floor is 0.5")
        return replace(self)


def config(**more):
    node = {"budget": 0.1, "grid": {}, "method": {"_target_": "tests.test_budget.Recent", "name": "recent"}}
    return OmegaConf.create(node | more)


@dataclass
class Lengths:
    """A task of examples with given (prompt tokens, limit, question tokens) by subtask."""

    lengths: dict
    reaches_limit: bool = False
    ignore_eos: bool = False

    @property
    def subtasks(self):
        return tuple(self.lengths)

    def size(self, subtask):
        return len(self.lengths[subtask])

    def example(self, subtask, index):
        prompt, limit, question = self.lengths[subtask][index]
        return Example(subtask, str(index), "", [0] * prompt, [], limit, question=question, ignore_eos=self.ignore_eos)


def steps(prompt: int, new: int, asked: int) -> list[tuple[int, int]]:
    """Visible and not prefilled tokens of every decode step, one by one."""
    first = prompt - asked
    return [(n, n - first) for n in range(first + 1, first + asked + new - (asked == 0) + 1)]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("how", ["reaches_limit", "ignore_eos", "expect"])
def test_expected_lengths_are_means_over_steps(how, apart):
    lengths = {"a": [(100, 7, 12), (60, 30, 5)], "b": [(500, 90, 40)]}
    task = Lengths(lengths, **({how: True} if how != "expect" else {}))
    tokens, generated = budget.expected(task, 20 if how == "expect" else None, not apart)
    every = [
        step
        for examples in lengths.values()
        for prompt, limit, asked in examples
        for step in steps(prompt, min(20, limit) if how == "expect" else limit, asked * apart)
    ]
    seen, new = zip(*every, strict=True)
    assert tokens == round(sum(seen) / len(seen)) and generated == pytest.approx(sum(new) / len(new))


def test_texts_that_may_end_at_any_time_are_taken_in_the_middle():
    """Of a limit of 128: between 1 and 64 generated tokens in the mean."""
    tokens, generated = budget.expected(Lengths({"a": [(1000, 128, 9)] * 9}), None, True)
    assert generated == (1 + 64) / 2 and tokens == 1032


def test_probes_do_not_follow_the_limit():
    """Examples behind the first few change nothing, so that more of them continue the same run."""
    few, many = ({"a": [(100, 9, 0)] * budget.PROBES + [(900, 9, 0)] * n} for n in (0, 50))
    assert budget.expected(Lengths(few), None, True) == budget.expected(Lengths(many), None, True)


SHAPE = Shape(layers=2, q_heads=3, kv_heads=1, head_dim=16, scale=0.25)
VARIANTS = [Variant("recent", "", Recent()), Variant("full", "", Full())]


def test_every_method_gets_its_knob():
    fitted, notes = budget.fit(config(), VARIANTS, 4096, SHAPE)
    assert [(v.label, v.budget, v.knobs) for v in fitted] == [("budget=0.1 size=409", 0.1, {"size": 409}), ("", None, {})]
    assert fitted[0].method.size == 409 and VARIANTS[0].method.size == 256
    assert notes == [] and budget.untouched(fitted) == "budget does not apply to full, without a knob for it"


def test_several_budgets_and_a_grid():
    variants = [Variant("recent", f"band={b}", Recent(band=b)) for b in (1, 2)] + VARIANTS[1:]
    fitted, _ = budget.fit(config(budget=[0.25, 0.5], grid={"band": [1, 2]}), variants, 1000, SHAPE)
    assert [v.label for v in fitted] == [f"band={b} budget={r} size={s}" for b in (1, 2) for r, s in ((0.25, 250), (0.5, 500))] + [""]


def test_a_floor_that_stops_the_method_itself_is_an_error():
    with pytest.raises(ConfigError) as error:
        budget.fit(config(budget=0.001), VARIANTS, 2000, SHAPE)
    assert str(error.value) == "budget=0.001: recent reads at least 4 tokens, 0.002"


def test_floors_of_other_methods_are_said():
    """One that reaches some budgets runs at those; one that reaches none runs as it is."""
    variants = [*VARIANTS, Variant("halved", "", Halved())]
    fitted, notes = budget.fit(config(budget=[0.1, 0.6]), variants, 2000, SHAPE)
    assert [v.label for v in fitted if v.name == "halved"] == ["budget=0.6"]
    assert notes == ["budget=[0.1, 0.6]: halved at 0.1 stores 8 bits of 16: its floor is 0.5"]
    fitted, notes = budget.fit(config(), variants, 2000, SHAPE)
    assert [v.label for v in fitted if v.name == "halved"] == [""]
    assert notes == ["budget=0.1: halved stores 8 bits of 16: its floor is 0.5; it runs as it is"]


@pytest.mark.parametrize("more", [{"grid": {"size": [1, 2]}}, {"method": {"name": "recent", "size": 64}}])
def test_a_knob_that_the_user_chose_is_not_overruled(more):
    with pytest.raises(ConfigError, match=r"budget=0.1: chooses method\.size itself"):
        budget.fit(config(**more), VARIANTS, 4096, SHAPE)


def test_measured_ratios_off_the_budget_are_said():
    fitted, _ = budget.fit(config(), [Variant("recent", "", Recent()), Variant("halved", "", Halved())][:1], 4096, SHAPE)
    rows = {"method": ["recent", "full"], "variant": [fitted[0].label, ""], "subtask": ["vt", "vt"]}
    assert budget.misses(pd.DataFrame(rows | {"rho_bytes": [0.109, 1.0]}), fitted) == []
    assert budget.misses(pd.DataFrame(rows | {"rho_bytes": [None, 1.0]}), fitted) == []
    (line,) = budget.misses(pd.DataFrame(rows | {"rho_bytes": [0.125, 1.0]}), fitted)
    assert line.startswith("recent (budget=0.1 size=409) has a measured rho_bytes of 0.1250, wanted 0.1")


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_planned_shape_is_that_of_the_loaded_model(kind, tmp_path):
    network = tiny(kind)
    network.save_pretrained(tmp_path)
    spec = OmegaConf.create({"path": str(tmp_path), "gguf": None})
    shape = planned_shape(spec, network.dtype, str(network.device), 512)
    assert replace(shape, max_tokens=0, device=network.device) == attention_shape(network)
    assert shape.max_tokens == 512


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["budget=0"], ["budget=0", "at most 1"]),
        (["budget=1.5"], ["budget=1.5", "at most 1"]),
        (["budget=true"], ["budget=True"]),
        (["budget=much"], ["budget=much"]),
        (["budget=[]"], ["budget=[]"]),
        (["budget=[0.1,7]"], ["budget=[0.1, 7]"]),
        (["budget=0.1", "expect=0"], ["expect=0", "null or an integer of at least 1"]),
        (["budgt=0.1"], ["did you mean budget?"]),
        (["task=attention", "budget=0.1"], ["budget=0.1", "task=attention"]),
        (["method._target_=tests.test_budget.Recent", "method.name=recent", "budget=0.001", "ctx=512"], ["budget=0.001: recent reads at least 4"]),
    ],
)
def test_wrong_budgets_get_one_clear_line(macbench, tiny_args, args, said):  # noqa: F811
    code, out, err = macbench(*[a for a in tiny_args if "attention" not in str(args) or "subtasks" not in a], "method=full", *args)
    assert (code, err.count("\n")) == (2, 1), err
    for text in said:
        assert text in err
    assert out == ""


def test_a_run_at_two_budgets(macbench, tiny_args, tmp_path):  # noqa: F811
    method = ["method=full", "method._target_=tests.test_budget.Recent", "method.name=recent"]
    code, out, err = macbench(*tiny_args, *method, "compare=[full]", "budget=[0.1,0.5]", "limit=1")
    assert code == 0, err
    frame = samples(tmp_path).set_index(["method", "variant"])
    assert sorted(frame.index) == [("full", ""), ("recent", "budget=0.1 size=40"), ("recent", "budget=0.5 size=201")]
    assert frame.prefill_s.nunique() == 1
    assert "vs full [95%]" in out and "budget=0.5 size=201" in out
    assert "budget does not apply to full" in err
    for label, wanted in (("budget=0.1 size=40", 0.1), ("budget=0.5 size=201", 0.5)):
        off = abs(frame.rho_bytes["recent", label] / wanted - 1) > 0.1
        assert (f"recent ({label}) has a measured" in err) == off
    (folder,) = (tmp_path / "runs").rglob("recent-*")
    assert {row["variant"] for row in json.loads((folder / "summary.json").read_text())} == {"", "budget=0.1 size=40", "budget=0.5 size=201"}
    assert macbench(*tiny_args, *method, "compare=[full]", "budget=0.1", "limit=1")[0] == 0
    assert len(list((tmp_path / "runs").rglob("recent-*"))) == 2


def test_a_method_without_a_fit_has_no_knob():
    assert not budget.has_knob(Full()) and budget.has_knob(Recent())
    with pytest.raises(ConfigError, match=r"budget=0\.1: does not apply to full"):
        Full().fit(0.1, 4096, SHAPE)
    assert settings.budgets(OmegaConf.create({"budget": [0.1, 0.1, 0.2]})) == [0.1, 0.2]
