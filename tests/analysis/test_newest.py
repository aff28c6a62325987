"""Which records count where the same was measured twice, and that two places of the question are never one curve."""

import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from analysis import contexts, fig7, methods, style, table1
from analysis.records import Records
from macbench.cli import load_option
from tests.analysis import test_contexts
from tests.analysis.test_numbers import REFERENCE, rows


def copy(source, target, facts: dict, **columns) -> None:
    """A parquet file with other facts, and with other values of some columns."""
    table = pq.read_table(source)
    known = json.loads(table.schema.metadata[b"macbench"]) | facts
    for name, change in columns.items():
        place = table.schema.get_field_index(name)
        changed = [None if x is None else change(x) for x in table[name].to_pylist()]
        table = table.set_column(place, table.schema.field(name), pa.array(changed, table.schema.field(name).type))
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({b"macbench": json.dumps(known).encode()}), target)


@pytest.mark.parametrize("newest", ["a", "b"])
def test_the_newest_of_two_benchmarks_counts(newest, tmp_path):
    """Whatever their names: twice the time, or half of it."""
    decode, step = REFERENCE / "h200/decode/llama31_8b.parquet", REFERENCE / "h100/attention/methods.parquet"
    for name in "ab":
        facts = {"started": "2031-01-01" if name == newest else "2030-01-01", "device": "NVIDIA X1"}
        factor = 2.0 if name == "a" else 0.5
        longer = {key: lambda x, f=factor: x * f for key in ("tpot_p50_ms", "attention_ms", "products_ms", "rest_ms")}
        copy(decode, tmp_path / f"decode/{name}.parquet", facts, **longer)
        copy(step, tmp_path / f"attention/{name}.parquet", facts, time_ms=lambda x, f=factor: x * f)
    factor = 2.0 if newest == "a" else 0.5
    numbers, sources = fig7.numbers(Records(tmp_path))
    before = [r["tpot_p50_ms"] for r in rows(decode) if r["backend"] != "generate"]
    assert [s.path.stem for s in sources] == [newest] and sorted(numbers.tpot_p50_ms) == pytest.approx(sorted(factor * x for x in before))
    numbers, sources = methods.numbers(Records(tmp_path))
    before = [r["time_ms"] for r in rows(step) if r["error"] is None]
    assert [s.path.stem for s in sources] == [newest] and sorted(numbers.time_ms.dropna()) == pytest.approx(sorted(factor * x for x in before))


def test_a_speed_up_never_divides_times_of_two_runs(tmp_path):
    """A newer file of full attention alone, twice as slow, changes nothing."""
    decode = REFERENCE / "h200/decode/llama31_8b.parquet"
    copy(decode, tmp_path / "decode/a.parquet", {"started": "2030-01-01"})
    expected = fig7.numbers(Records(tmp_path))[0].speedup.tolist()
    copy(decode, tmp_path / "decode/b.parquet", {"started": "2031-01-01"}, tpot_p50_ms=lambda x: 2 * x)
    table = pq.read_table(tmp_path / "decode/b.parquet")
    pq.write_table(table.filter(pc.equal(table["method"], "full")), tmp_path / "decode/b.parquet")
    numbers, sources = fig7.numbers(Records(tmp_path))
    assert numbers.speedup.tolist() == expected and [s.path.stem for s in sources] == ["a"]


def test_methods_without_a_knob_have_no_budget(tmp_path):
    """And are there all the same, once, from the newest of two files with budgets of their own; times are divided within a file."""
    made = REFERENCE / "h100/attention/methods.parquet"
    for name, factor in (("a", 1), ("b", 3)):
        blank = {"budget": lambda x, f=factor: f * x, "time_ms": lambda x, f=factor: f * x}
        copy(made, tmp_path / f"attention/{name}.parquet", {"started": f"203{factor}-01-01"}, **blank)
    numbers, _ = methods.numbers(Records(tmp_path))
    before = {r["method"]: r for r in rows(made)}
    assert before["kivi_2bit"]["knobs"].startswith("bits=2 ") and before["kivi"]["knobs"].startswith("bits=4 ")
    bare = [name for name, r in before.items() if r["budget"] is None]
    assert "full" in bare and sorted(numbers.method) == sorted(2 * [name for name in before if name not in bare] + bare)
    for found in numbers.itertuples():
        assert found.over_full == pytest.approx(before[found.method]["time_ms"] / before["full"]["time_ms"])


def test_steps_of_two_machines_stand_beside_each_other(tmp_path):
    for device in ("NVIDIA X1", "NVIDIA X2"):
        copy(REFERENCE / "h100/attention/methods.parquet", tmp_path / f"attention/{device[-2:]}.parquet", {"device": device})
    (drawn,) = methods.make(Records(tmp_path), tmp_path)
    assert drawn.frame.machine.value_counts().to_dict() == {"X1": len(drawn.frame) / 2, "X2": len(drawn.frame) / 2}


class Both(test_contexts.Made):
    """A run of either place of the question at every length; of ``other`` trainings, too."""

    other: dict | None = None  # identity of the model

    def __init__(self, *lengths: int):
        super().__init__(*lengths)
        self.runs = [self.runs[0].__class__(f"{place}/{run}") for run in self.runs for place in ("prefill", "decode")]

    def samples(self, run):
        return super().samples(run.name)

    def source(self, run):
        other = self.other if run.parent.name == "decode" else None
        identity = {"model": other or {}, "question_in_prefill": bool(other) or run.parent.name == "prefill"}
        return style.Source(run, test_contexts.FACTS | {"identity": identity})

    def headline(self, run):
        from macbench.summary import headline, summarise

        return headline(summarise(self.samples(run)))


def test_questions_outside_of_the_prefill_are_another_protocol():
    records = Both(4096, 8192, 16384)
    found = contexts.longest(records)
    assert {key[2]: {source.path.parent.name for _, source in runs.values()} for key, runs in found.items()} == {
        "": {"prefill"},
        "question not in prefill": {"decode"},
    }
    asked = {key[2]: style.made([source for _, source in runs.values()], "what") for key, runs in found.items()}
    assert "Questions are not in the prefill" in asked["question not in prefill"] and "Questions" not in asked[""]
    numbers, _, _ = table1.compared(Both(4096))
    assert table1.shown(numbers).benchmark.tolist() == ["ruler 4K", "ruler 4K, question not in prefill"]


@pytest.mark.parametrize(("sha256", "name"), [("58a0bfc9" + 56 * "0", "58a0bfc9"), (None, "unknown")])
def test_another_adapter_is_another_model(sha256, name, tmp_path):
    records = Both(4096, 8192, 16384)
    records.other = {"name": "smollm2_128k", "adapter": "a2.safetensors", "adapter_sha256": sha256}
    found = contexts.longest(records)
    assert {key[2]: {s.path.parent.name for _, s in runs.values()} for key, runs in found.items()} == {"": {"prefill"}, f"adapter {name}": {"decode"}}
    drawn = [d for d in contexts.make(records, tmp_path) if name in d.name]
    assert len(drawn) == 3 and all(f"adapter {name}" in d.title and "not the one that ships" in d.caption for d in drawn)
    records.other["adapter_sha256"] = load_option("model", "smollm2_128k").adapter_sha256
    assert {key[2] for key in contexts.longest(records)} == {""}


def test_a_mean_over_some_subtasks_says_so(monkeypatch):
    records = Both(4096)
    monkeypatch.setattr(test_contexts, "FACTS", {**test_contexts.FACTS, "protocol": {"subtasks": ["vt", "cwe", "fwe", "more"]}})
    assert table1.shown(table1.compared(records)[0]).benchmark.tolist()[0] == "ruler 4K, 3 of 4 subtasks"
