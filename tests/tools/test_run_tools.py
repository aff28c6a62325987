"""status, verify and merge on real runs of a tiny model."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from macbench import environment, merge, pack, report, status, verify
from macbench.errors import ConfigError, ending
from macbench.leases import Leases
from macbench.models import fingerprint
from macbench.records import SCHEMAS, part_name, read_table
from tests import kills
from tests.tools.conftest import first, rewrite

# -- verify -----------------------------------------------------------------------------------------------------------


def test_a_run_verifies_and_its_examples_come_out_again(run, tool):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    code, out, err = tool(verify, run, "examples=2", "device=cpu")
    assert code == 0, out + err
    assert "as it should be" in out and out.count("niah_single_1 ") == 2
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


@pytest.mark.parametrize(
    ("table", "change", "said"),
    [
        ("samples", lambda rows: rows[0].update(tokens_log=rows[0]["tokens_log"] - 1), "tokens_log of"),
        ("samples", lambda rows: rows[0].update(score=0.123), "summary.json does not follow"),
        ("samples", lambda rows: rows.append(rows[0]), "recorded twice"),
        ("samples", lambda rows: rows.pop(), "rows are missing"),
        ("samples", lambda rows: [row.update(example_id="7") for row in rows], "rows of another example"),
        ("samples", lambda rows: [row.update(run_id="mac-00000000") for row in rows], "rows of another run"),
        ("samples", lambda rows: rows[0].update(error="RuntimeError: no"), "carry an error"),
        ("steps", lambda rows: rows.pop(), "is not the sum of its steps"),
        ("layers", lambda rows: rows[0].update(bytes_kv=0), "bytes_kv of"),
    ],
)
def test_what_is_wrong_is_found(run, tool, table, change, said):
    rewrite(first(run, table), change)
    code, out, _ = tool(verify, run, "examples=0")
    assert code == 1 and "WRONG" in out and said in out


def test_a_flipped_bit_is_found(run):
    """Anywhere in the column of texts: either nothing that is read changes (statistics in a header), or the page's checksum tells."""
    part = first(run, "samples")
    whole, table = part.read_bytes(), pq.read_table(part)
    column = pq.read_metadata(part).row_group(0).column(SCHEMAS["samples"].names.index("text"))
    start = column.dictionary_page_offset or column.data_page_offset
    told = 0
    for place in range(start, start + column.total_compressed_size, column.total_compressed_size // 12):
        content = bytearray(whole)
        content[place] ^= 1
        part.write_bytes(content)
        found = verify.verify(run)
        assert found.wrong or pq.read_table(part).equals(table), place
        told += bool(found.wrong)
    assert told > 3


def test_changed_identity_and_schema_are_found(run, tool):
    facts = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(facts | {"identity": facts["identity"] | {"seed": 43}}))
    assert "is not the hash" in tool(verify, run, "examples=0")[1]
    part = first(run, "steps")
    pq.write_table(pq.read_table(part).drop_columns(["chain_max"]), part)
    assert "another schema" in tool(verify, run, "examples=0")[1]


def test_an_earlier_schema_is_checked_by_its_own_columns(run, tool):
    """As before columns were added, and before a run kept what it was asked; a column that was always there may not be missing."""
    for table, names in (("samples", ["question_steps", "bytes_pre", "rho_page", "output_error"]), ("layers", ["output_error"])):
        for path in (run / table).iterdir():
            pq.write_table(pq.read_table(path).drop_columns(names), path)
    (run / "asked.json").unlink()
    code, out, _ = tool(verify, run, "examples=2", "device=cpu")
    assert code == 0 and "layers were written under an earlier schema, without output_error" in out and "made again" in out, out
    rewrite(first(run, "samples"), lambda rows: rows[0].update(tokens_phys=1))
    assert tool(verify, run, "examples=0")[0] == 1


def test_a_text_that_no_model_wrote_is_found(run, tool):
    """Consistent in itself; only making the example again shows it."""
    for part in (run / "samples").iterdir():
        rewrite(part, lambda rows: rows[0].update(text=rows[0]["text"] + "!"))
    assert tool(verify, run, "examples=0")[0] == 0
    code, out, _ = tool(verify, run, "examples=1", "device=cpu")
    assert code == 1 and "made again differs in text" in out


# -- two versions of the code, other weights --------------------------------------------------------------------------


def test_two_versions_of_the_code_on_one_run(run, again, macbench, tool, monkeypatch):
    monkeypatch.setattr(environment, "commit", lambda: {"commit": "f" * 40, "dirty": False})
    code, _, err = macbench(*again, "limit=5")
    assert code == 0 and "the run was begun with" in err and "now ffffffffff" in err
    code, out, _ = tool(verify, run, "examples=0")
    assert code == 0 and "made by 2 versions" in out and "(4 examples)" in out and "ffffffffff" in out and "(1 examples)" in out


def test_other_weights_are_another_run(run, again, macbench):
    facts = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(facts | {"weights_sha256": "0" * 64}))
    code, _, err = macbench(*again, "limit=5")
    assert code == 2 and "other weights" in err and err.count("\n") == 1


def test_another_configuration_or_tokenizer_is_another_run(run, again, macbench, made, tmp_path):
    """The weights are the same; what they mean is not. A folder elsewhere with the same files is the same model."""
    shutil.copytree(made[0].parent / "model", tmp_path / "model")
    model = OmegaConf.create({"path": str(tmp_path / "model")})
    facts = json.loads((run / "environment.json").read_text())
    before = {key: facts[key] for key in ("weights_sha256", "model_sha256")}
    assert fingerprint.hashes(model) == before
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        content = (tmp_path / "model" / name).read_text()
        (tmp_path / "model" / name).write_text(content + "\n")
        after = fingerprint.hashes(model)
        assert after["weights_sha256"] == before["weights_sha256"] and after["model_sha256"] != before["model_sha256"]
        (tmp_path / "model" / name).write_text(content)
    (run / "environment.json").write_text(json.dumps(facts | after))
    code, _, err = macbench(*again, "limit=5")
    assert code == 2 and "tokenizer" in err and err.count("\n") == 1


# -- status -----------------------------------------------------------------------------------------------------------


def test_status_counts_what_is_done_failed_running_and_missing(run, tool):
    asked = json.loads((run / "asked.json").read_text())
    asked["examples"]["niah_single_1"] = 9
    (run / "asked.json").write_text(json.dumps(asked))
    rewrite(first(run, "samples"), lambda rows: rows[0].update(error="RuntimeError: no"))
    worker = Leases(run)
    assert worker.claim(part_name("niah_single_1", "5")) and worker.claim(part_name("niah_single_1", "6"))
    (run / "leases" / f"{part_name('niah_single_1', '7')}.0").symlink_to("worker-that-died")
    for part in (run / "samples").iterdir():  # an hour from when the worker began to the newest
        os.utime(part, (worker._file and part.stat().st_atime, status.datetime.now().timestamp() + 3600))
    found = status.status(run)
    assert [found[k] for k in ("examples", "done", "failed", "running", "missing")] == [9, 3, 1, 2, 3]
    assert found["per hour"] == "4" and found["left"].startswith("1:1") and found["workers"].endswith(f":{os.getpid()}")
    code, out, _ = tool(status, run.parents[3])
    assert code == 0 and run.name in out
    worker.close()
    assert status.status(run)["running"] == 0 and status.status(run)["per hour"] == "-"


def test_what_others_wrote_commands_no_terminal(run, tool):
    worker = run / "leases" / "worker-0123456789ab"
    worker.parent.mkdir()
    worker.write_text('0\n{"host": "\\u001b[31mred\\n' + "x" * 1000 + '", "pid": 1}\n')
    (run / "leases" / f"{part_name('niah_single_1', '0')}.0").symlink_to(worker.name)
    code, out, _ = tool(status, run)
    assert code == 0 and "red" in out and "\x1b" not in out and max(map(len, out.splitlines())) < 600 and len(out.splitlines()) == 2
    rewrite(first(run, "samples"), lambda rows: rows[0].update(error="\x1b[31mred\nline"))
    code, out, _ = tool(verify, run, "examples=0")
    assert code == 1 and "[31mred line" in out and "\x1b" not in out


def test_a_configuration_with_a_value_missing_is_one_line(run, tool):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"(?m)^seed: .*", "seed: ???", text))
    code, _, err = tool(verify, run, "examples=1", "device=cpu")
    assert code == 2 and err.count("\n") == 1 and "seed" in err


@pytest.mark.parametrize("change", ["page_size: 0", "prefill_chunk: -5", "prefill_chunk: x"])
def test_a_configuration_with_numbers_out_of_range_is_one_line(run, tool, change):
    text, key = (run / "config.yaml").read_text(), change.partition(":")[0]
    (run / "config.yaml").write_text(re.sub(rf"(?m){key}: .*", change, text))
    code, _, err = tool(verify, run, "examples=1", "device=cpu")
    assert code == 2 and err.count("\n") == 1 and f"engine.{key}=" in err


@pytest.mark.parametrize("table", ["samples", "steps", "layers"])
def test_a_flipped_bit_is_no_other_number(run, table):
    """What is read of a run is what was written, or the part is named."""
    part = first(run, table)
    whole, before = part.read_bytes(), read_table(run, table)
    told = 0
    for place in range(0, len(whole), len(whole) // 150):
        content = bytearray(whole)
        content[place] ^= 0x80
        part.write_bytes(content)
        try:
            pd.testing.assert_frame_equal(read_table(run, table, complete=True), before)
        except ConfigError as error:
            told += 1
            assert part.name in str(error)
    assert told > 50


def test_status_goes_on_past_a_damaged_run(run, tool):
    part = first(run, "samples")
    part.write_bytes(part.read_bytes()[:60])
    code, out, err = tool(status, run.parents[3])
    assert code == 0 and part.name in err and "no runs" in out


# -- merge ------------------------------------------------------------------------------------------------------------


def test_merged_shards_are_the_whole(made, tmp_path, macbench, tool):
    for i in (1, 2):
        args = [a if not a.startswith("runs_dir=") else f"runs_dir={tmp_path / f'machine-{i}'}" for a in made[1]]
        assert macbench(*args, f"shard={i}/2")[0] == 0
    code, out, err = tool(merge, tmp_path / "runs", tmp_path / "machine-1", tmp_path / "machine-2")
    assert code == 0, err
    assert out.count("2 taken, 0 kept") == 2
    merged, whole = kills.tables(tmp_path / "runs"), kills.tables(made[0])
    for table in SCHEMAS:
        pd.testing.assert_frame_equal(merged[table], whole[table])
    (run,) = (p.parent for p in (tmp_path / "runs").rglob("summary.json"))
    assert tool(verify, run, "examples=0")[0] == 0
    code, out, _ = tool(merge, tmp_path / "runs", tmp_path / "machine-2")
    assert code == 0 and "0 taken, 2 kept, 0 different" in out


def test_a_failed_example_is_replaced_by_a_good_one_and_never_the_other_way(run, made, tmp_path, tool):
    rewrite(first(run, "samples"), lambda rows: rows[0].update(error="RuntimeError: no"))
    code, out, _ = tool(merge, tmp_path / "runs", made[0])
    assert code == 0 and "1 taken, 3 kept" in out and tool(verify, run, "examples=0")[0] == 0
    rewrite(first(run, "samples"), lambda rows: rows[0].update(error="RuntimeError: no"))
    shutil.copytree(made[0], tmp_path / "good")
    assert "0 taken, 4 kept" in tool(merge, tmp_path / "good", tmp_path / "runs")[1]


def test_an_example_that_lacks_a_part_is_taken_and_a_damaged_one_is_named(run, made, tmp_path, tool):
    first(run, "steps").unlink()
    code, out, _ = tool(merge, tmp_path / "runs", made[0])
    assert code == 0 and "1 taken, 3 kept" in out and tool(verify, run, "examples=0")[0] == 0
    first(run, "samples").write_bytes(b"PAR1")
    code, _, err = tool(merge, tmp_path / "runs", made[0])
    assert code == 2 and f"TARGET={first(run, 'samples')}" in err


@pytest.mark.parametrize("change", ["protocol", "identity", "schema", "name", "rows", "run", "cut", "busy", "itself", "nothing"])
def test_only_the_same_protocol_merges(run, made, tmp_path, tool, change):
    args = [made[0], tmp_path / "runs"]
    copied = tmp_path / "target"
    shutil.copytree(made[0], copied)
    args[0], worker = copied, None
    if change in ("protocol", "identity"):
        facts = json.loads((run / "environment.json").read_text())
        facts[change] |= {"seed": 43}
        (run / "environment.json").write_text(json.dumps(facts))
    elif change == "schema":
        part = first(run, "samples")
        pq.write_table(pq.read_table(part).drop_columns(["kl_mean"]), part)
    elif change == "name":
        run.rename(run.with_name("mac-00000000"))
    elif change == "rows":  # of another example: taken under this name, they would be there twice
        shutil.copy(sorted((run / "layers").iterdir())[1], sorted((run / "layers").iterdir())[0])
    elif change == "run":
        rewrite(sorted((run / "steps").iterdir())[0], lambda rows: [row.update(run_id="mac-00000000") for row in rows])
    elif change == "cut":
        first(run, "samples").write_bytes(b"PAR1")
    elif change == "busy":
        worker = Leases(copied / run.relative_to(tmp_path / "runs"))
        assert worker.claim(part_name("niah_single_1", "0"))
    elif change == "itself":
        args[1] = run
    else:
        args[1] = tmp_path / "no-such-folder"
    if change in ("rows", "run"):
        shutil.rmtree(copied)
    before = {p: p.read_bytes() for p in copied.rglob("*.parquet")}
    code, _, err = tool(merge, *args)
    assert code == 2 and err.count("\n") == 1 and err.startswith("macbench: "), err
    assert before == {p: p.read_bytes() for p in copied.rglob("*.parquet")}
    if worker:
        worker.close()


# -- parts that are small on the disk ---------------------------------------------------------------------------------


def test_a_part_that_would_fill_the_memory_is_one_line(run, made, tmp_path, tool):
    """Every text of a row is the same half of a megabyte, in a file of less: whatever reads runs names it and its limit."""
    part, schema = first(run, "samples"), SCHEMAS["samples"]
    texts = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), 400), ["x" * 500_000])
    columns = [texts if kind == pa.string() else pa.nulls(400, kind) for kind in schema.types]
    pq.write_table(pa.Table.from_arrays(columns, names=schema.names), part, store_schema=False)
    assert part.stat().st_size < 300_000

    def reported():
        with ending():
            report.main([str(run)])

    for module, args, codes in (
        (verify, [run, "examples=0"], (1,)),
        (merge, [tmp_path / "other", run.parents[3]], (2,)),
        (merge, [run.parents[3], made[0]], (2,)),
        (pack, [tmp_path / "kept", run], (2,)),
        (SimpleNamespace(main=reported), [], (2,)),
        (status, [run.parents[3]], (0,)),
    ):
        code, out, err = tool(module, *args)
        (line,) = [line for line in (out + err).splitlines() if part.name in line]
        assert code in codes and "would take" in line and "a file of 0.2 MB may take 55" in line, (module, out, err)
