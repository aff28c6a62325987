"""Judges: what they ask, what they answer, what is kept, and what happens when they cannot."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pandas as pd
import pytest
from omegaconf import OmegaConf

from macbench import cli
from macbench.errors import ConfigError
from macbench.judging import api, build, judge_run, lexical, prepare
from macbench.judging.api import ApiJudge
from macbench.judging.cache import Answers
from macbench.judging.lexical import LexicalJudge
from macbench.tasks.base import Question
from macbench.tasks.longgenbench import LongGenBench, protocol
from tests.tasks.test_longgenbench import sample


def question(event: str, context: str = "We went to the libraries and attended a big gardening festival in Rome.") -> Question:
    return Question(context, event, protocol.QUESTION.format(block=context, event=event))


def asked(judge, questions) -> dict[int, object]:
    return dict(judge.ask(questions, "cpu", LongGenBench.verdict))


# -- lexical ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "answer"),
    [
        ("library", "yes"),
        ("Gardening Festivals featuring Rome", "yes"),
        ("Attend a gardening festival", "yes"),
        ("gardening festival in Oslo Norway", "no"),
        ("sports complex", "no"),
        ("the", "no"),  # nothing to look for
    ],
)
def test_lexical(event, answer):
    assert asked(LexicalJudge(), [question(event)])[0].answer == answer


def test_lexical_settings():
    assert asked(LexicalJudge(share=0.5), [question("gardening in Oslo")])[0].answer == "yes"
    with pytest.raises(ConfigError, match=r"judge\.share=2"):
        LexicalJudge(share=2)
    assert lexical.stem("parties") == "parti" and lexical.stem("bed") == "bed"


# -- a run's texts ----------------------------------------------------------------------------------------------------


class Counting(LexicalJudge):
    """Counts what it is asked; answers with an error about cafés if told so."""

    seen: ClassVar[list] = []
    broken = False

    def ask(self, questions, device, settled):
        for index, verdict in super().ask(questions, device, settled):
            self.seen.append(questions[index].prompt)
            if self.broken and "include the café" in questions[index].prompt:
                verdict = api.Verdict(None, "no answer in 1 s, 2 tries")
            yield index, verdict


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setattr(Counting, "seen", [])
    monkeypatch.setattr(Counting, "broken", False)
    return OmegaConf.create({"_target_": "tests.test_judging.Counting", "name": "lexical", "share": 0.75})


def frame() -> pd.DataFrame:
    other = " a gardening festival #*# Floor 2: gardens; a festival; a small library and a café"
    rows = [sample(), sample(method="mac", text=other), sample(index="1", error="OutOfMemoryError: x")]
    return pd.DataFrame(rows)


def test_a_run_is_judged_recorded_and_never_asked_twice(counting, tmp_path, capsys):
    assert judge_run(tmp_path, LongGenBench, frame(), counting, "cpu") == 0
    out = capsys.readouterr().out
    assert "judged by lexical share=0.75 rule=1, which is not the official judge" in out and "stic_2" in out
    (folder,) = (tmp_path / "judgements").iterdir()
    table = {row["method"]: row for row in json.loads((folder / "summary.json").read_text()) if row["scenario"] == "all"}
    # full: the first Floor 2 has a small library and no festival, and no café is written with an accent; the text that failed counts as empty.
    # mac: no Floor 4.
    assert (table["full"]["yes"], table["full"]["present"], table["full"]["checks"]) == (2, 5, 10)
    assert (table["mac"]["yes"], table["mac"]["present"], table["mac"]["checks"]) == (4, 4, 5)
    assert table["mac"]["stic_1"] == 100 and table["mac"]["stic_2"] == 80 and table["mac"]["completion"] == 40
    checks = pd.read_parquet(folder / "checks.parquet")
    assert len(checks) == 15 and checks.yes.isna().sum() == 1 + 5 and not checks.error.notna().any()
    assert len(Counting.seen) == len(set(Counting.seen)) == 5 + 4
    before = len(Counting.seen)
    assert judge_run(tmp_path, LongGenBench, frame(), counting, "cpu") == 0
    assert len(Counting.seen) == before


def test_what_has_no_verdict_is_a_row_and_is_asked_again(counting, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Counting, "broken", True)
    assert judge_run(tmp_path, LongGenBench, frame(), counting, "cpu") == 3
    (folder,) = (tmp_path / "judgements").iterdir()
    checks = pd.read_parquet(folder / "checks.parquet")
    assert checks.error.dropna().tolist() == ["no answer in 1 s, 2 tries"] * 3
    assert "unjudged" in capsys.readouterr().out
    monkeypatch.setattr(Counting, "broken", False)
    Counting.seen.clear()
    assert judge_run(tmp_path, LongGenBench, frame(), counting, "cpu") == 0
    assert len(Counting.seen) == 3
    assert pd.read_parquet(folder / "checks.parquet").error.isna().all()


def test_answers_survive_an_interrupted_write(tmp_path):
    answers = Answers(tmp_path / "a" / "verdicts.jsonl")
    answers.add("one", "yes")
    answers.add("two\n", "no, because\n...")
    answers.close()
    path = tmp_path / "a" / "verdicts.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key": "12')
    again = Answers(path)
    assert (again.get("one"), again.get("two\n"), again.get("three")) == ("yes", "no, because\n...", None)
    again.add("three", "no")
    again.close()
    assert len(Answers(path).known) == 3
    path.write_text("what\n")
    with pytest.raises(ConfigError, match="is damaged"):
        Answers(path)


def test_no_judge(tmp_path):
    node = cli.load_option("judge", "none")
    assert build(node) is None and judge_run(tmp_path, LongGenBench, frame(), node, "cpu") == 0
    prepare(node)
    assert not list(tmp_path.iterdir())


def test_the_defaults_of_the_model_judge_are_official():
    judge = build(cli.load_option("judge", "llm"))
    assert judge.facts() == protocol.JUDGE
    with pytest.raises(ConfigError, match="did you mean smollm2"):
        build(OmegaConf.merge(cli.load_option("judge", "llm"), {"model": "smollm"}))


def test_a_model_judge_that_cannot_be_had_is_one_line(monkeypatch):
    node = OmegaConf.merge(cli.load_option("judge", "llm"), {"path": "no/such-model"})
    with pytest.raises(ConfigError) as caught:
        prepare(node)
    assert str(caught.value).startswith("judge.model=no/such-model: ") and "judge=lexical" in str(caught.value)


# -- over HTTP --------------------------------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """Answers by script: each entry is a status, or a text, or a number of seconds to wait, or a raw reply."""

    script: ClassVar[list] = []
    got: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.got.append((self.path, body, self.headers.get("Authorization"), time.monotonic()))
        step = self.script.pop(0) if self.script else "no"
        if isinstance(step, float):
            time.sleep(step)
            step = "late"
        if isinstance(step, bytes):  # sent as it is, and no more
            self.wfile.write(step)
            self.close_connection = True
            return
        if isinstance(step, int):
            self.send_response(step)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        text = {"message": {"content": step}} if "chat" in self.path else {"text": step}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{" if step == "garbage" else json.dumps({"choices": [text]}).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Server, "script", [])
    monkeypatch.setattr(Server, "got", [])
    monkeypatch.setattr(api, "_BACKOFF", 0.01)
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    running.server_close()


def test_api_sends_the_official_prompt(server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    Server.script[:] = [" Yes."]
    found = asked(ApiJudge(base_url=server, key_env="SOME_KEY"), [question("library")])
    assert found[0].answer == " Yes."
    ((path, body, key, _),) = Server.got
    assert (path, key) == ("/v1/completions", "Bearer secret")
    assert body["prompt"] == question("library").prompt and (body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (
        0.95,
        0.95,
        50,
        42,
    )
    Server.script[:] = ["no"]
    assert asked(ApiJudge(base_url=server, endpoint="chat", key_env=None), [question("library")])[0].answer == "no"
    assert Server.got[-1][0] == "/v1/chat/completions" and Server.got[-1][2] is None
    assert Server.got[-1][1]["messages"] == [{"role": "user", "content": question("library").prompt}]


def test_api_tries_again(server):
    Server.script[:] = [429, 500, "garbage", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", b"nonsense\r\n\r\n", "yes"]
    assert asked(ApiJudge(base_url=server, key_env=None, tries=6), [question("library")])[0].answer == "yes"
    assert len(Server.got) == 6


def test_api_gives_up_on_one_question_only(server):
    Server.script[:] = [503, 503, "yes"]
    judge = ApiJudge(base_url=server, key_env=None, tries=2, parallel=1)
    found = asked(judge, [question("library"), question("festival")])
    assert (found[0].answer, found[0].error, found[1].answer) == (None, "HTTP 503, 2 tries", "yes")
    Server.script[:] = [0.6]
    found = asked(ApiJudge(base_url=server, key_env=None, tries=1, timeout=0.2), [question("library")])
    assert found[0].error == "no answer in 0.2 s, 1 tries"
    found = asked(ApiJudge(base_url="http://127.0.0.1:9/v1", key_env=None, tries=1), [question("library")])
    assert found[0].answer is None and "refused" in found[0].error


def test_a_question_that_the_server_rejects_costs_no_other(server):
    Server.script[:] = [400, "yes"]
    found = asked(ApiJudge(base_url=server, key_env=None, tries=3, parallel=1), [question("library"), question("festival")])
    assert found[0].answer is None and found[0].error.startswith("HTTP 400") and found[1].answer == "yes" and len(Server.got) == 2


def test_api_that_refuses_or_has_no_key_is_one_line(server, monkeypatch):
    Server.script[:] = [401]
    with pytest.raises(ConfigError, match="refuses: HTTP 401"):
        asked(ApiJudge(base_url=server, key_env=None), [question("library")])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"judge\.key_env=OPENAI_API_KEY: is not set"):
        ApiJudge().prepare()
    for wrong in ({"endpoint": "chats"}, {"parallel": 0}, {"base_url": "localhost"}, {"timeout": 0}):
        with pytest.raises(ConfigError, match=f"judge.{next(iter(wrong))}="):
            ApiJudge(**wrong)


def test_a_server_that_cannot_be_reached_costs_the_tries_of_few_questions(monkeypatch, tmp_path, capsys):
    """Not of all: those that run at the time, and no more. The table is made, every check has its error, and one line says why."""
    monkeypatch.setattr(api, "_BACKOFF", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{free.getsockname()[1]}/v1"  # nobody listens there
    tried = []
    request = ApiJudge._request
    monkeypatch.setattr(ApiJudge, "_request", lambda self, prompt: tried.append(prompt) or request(self, prompt))
    judge = ApiJudge(base_url=base, key_env=None, parallel=2, tries=3, per_minute=100_000)
    found = dict(judge.ask([Question("", "", str(i)) for i in range(200)], "cpu", lambda answer: True))
    assert len(found) == 200 and all(v.answer is None and "cannot be reached: " in v.error for v in found.values())
    assert len(tried) <= 2 * 3 + 2
    node = OmegaConf.create({"_target_": "macbench.judging.api.ApiJudge", "name": "api", "base_url": base, "key_env": None, "tries": 1})
    assert judge_run(tmp_path, LongGenBench, frame(), node, "cpu") == 9
    captured = capsys.readouterr()
    assert "unjudged" in captured.out
    (line,) = [line for line in captured.err.splitlines() if line.startswith("macbench: ")]
    assert line.startswith(f"macbench: 9 check(s) could not be judged ({base}/completions cannot be reached: ")


def test_a_server_that_comes_back_is_asked_again(server):
    """What one call found out is not held against the next."""
    judge = ApiJudge(base_url="http://127.0.0.1:9/v1", key_env=None, tries=1)
    assert "cannot be reached" in dict(judge.ask([Question("", "", "a")], "cpu", bool))[0].error
    judge.base_url = server
    assert dict(judge.ask([Question("", "", "a")], "cpu", bool))[0].answer is not None


def test_api_keeps_to_its_rate(server):
    judge = ApiJudge(base_url=server, key_env=None, per_minute=1200, parallel=4)
    asked(judge, [question(f"festival {i}") for i in range(5)])
    times = sorted(t for *_, t in Server.got)
    assert times[-1] - times[0] >= 0.19  # four gaps of 50 ms, less the clock's grain
