"""A judge behind an OpenAI-compatible HTTP interface: retries, rate limit, several questions at once."""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from tqdm import tqdm

from macbench.errors import ConfigError, choose
from macbench.judging.base import Verdict

_BACKOFF = 1.0  # seconds before the second try; doubles with every further one
_LONGEST = 60.0  # seconds between tries
_REFUSED = (401, 403, 404)  # whatever is asked
_REJECTED = (400, 413, 414, 422)  # this question, however often: longer than the server's model takes, for example


@dataclass
class ApiJudge:
    """``endpoint``: completions sends the raw prompt, chat sends it as a user turn. ``key_env``: the environment variable with the key;
    null sends none. ``per_minute``: most requests a minute; ``parallel``: most at a time. ``timeout``: seconds per try.

    A question that fails in all its ``tries`` gets an error. If the server could not be reached in the last of them, the others get it at once.
    """

    model: str = "meta-llama/Llama-3.1-8B-Instruct"
    base_url: str = "http://localhost:8000/v1"
    endpoint: str = "completions"
    key_env: str | None = "OPENAI_API_KEY"
    temperature: float = 0.95
    top_p: float = 0.95
    max_tokens: int = 50
    seed: int = 42
    parallel: int = 8
    per_minute: int = 600
    tries: int = 5
    timeout: float = 60.0

    name = "api"

    def __post_init__(self):
        choose("judge.endpoint", self.endpoint, ("completions", "chat"))
        for key in ("parallel", "per_minute", "tries", "max_tokens"):
            if not isinstance(getattr(self, key), int) or getattr(self, key) < 1:
                raise ConfigError(f"judge.{key}", getattr(self, key), "must be an integer of at least 1")
        if not isinstance(self.timeout, int | float) or not self.timeout > 0:
            raise ConfigError("judge.timeout", self.timeout, "must be a number of seconds above 0")
        for key, high in (("temperature", float("inf")), ("top_p", 1.0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
                raise ConfigError(f"judge.{key}", value, "must be a number of at least 0" + (" and at most 1" if high == 1 else ""))
        try:
            good = str(self.base_url).startswith(("http://", "https://")) and urllib.parse.urlsplit(str(self.base_url)).port != 0
        except ValueError:  # a port that is none
            good = False
        if not good:
            raise ConfigError("judge.base_url", self.base_url, "must be an http or https address, such as http://localhost:8000/v1")
        self._lock, self._next, self._over = threading.Lock(), 0.0, threading.Event()
        self._gone: str | None = None  # why the server cannot be reached

    def prepare(self) -> None:
        if self.key_env is not None and not os.environ.get(self.key_env):
            raise ConfigError("judge.key_env", self.key_env, "is not set; export it, or judge.key_env=null for a server that needs no key")

    def facts(self) -> dict:
        names = ("model", "base_url", "endpoint", "temperature", "top_p", "max_tokens", "seed")
        return {"judge": self.name} | {name: getattr(self, name) for name in names}

    def ask(self, questions, device, settled):
        self.prepare()
        self._over.clear()
        self._gone = None
        pool = ThreadPoolExecutor(self.parallel)
        try:
            waiting = {pool.submit(self._answer, question.prompt): index for index, question in enumerate(questions)}
            for done in tqdm(as_completed(waiting), total=len(waiting), unit="question", desc="judge", dynamic_ncols=True):
                yield waiting[done], done.result()
        finally:
            self._over.set()  # nobody waits for further tries
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, prompt: str) -> Verdict:
        error, pause, reached = "", _BACKOFF, False
        for attempt in range(self.tries):
            if attempt:
                self._over.wait(min(pause, _LONGEST))
                pause *= 2
            if self._gone:
                return Verdict(None, self._gone)
            self._wait_for_turn()
            if self._over.is_set():
                return Verdict(None, "interrupted")
            reached = True
            try:
                return Verdict(self._request(prompt))
            except urllib.error.HTTPError as failure:
                error = f"HTTP {failure.code}"
                if failure.code in _REFUSED:
                    raise ConfigError("judge.base_url", self._url, f"refuses: HTTP {failure.code} {failure.reason}") from None
                if failure.code in _REJECTED:
                    return Verdict(None, f"HTTP {failure.code} {failure.reason}")
                pause = max(pause, _seconds(failure.headers.get("Retry-After")))
            except urllib.error.URLError as failure:  # before any answer: refused, no such host, no route
                reason = failure.reason
                error, reached = f"{self._url} cannot be reached: {getattr(reason, 'strerror', None) or reason}", False
            except TimeoutError:
                error = f"no answer in {self.timeout:g} s"
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as failure:
                error = f"{type(failure).__name__}: {getattr(failure, 'reason', None) or failure}"
        error = f"{error}, {self.tries} tries"
        if not reached:
            self._gone = error
        return Verdict(None, error)

    @property
    def _url(self) -> str:
        return f"{self.base_url.rstrip('/')}/{'chat/completions' if self.endpoint == 'chat' else 'completions'}"

    def _request(self, prompt: str) -> str:
        body = {"model": self.model, "temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens, "seed": self.seed}
        chat = self.endpoint == "chat"
        body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        headers = {"Content-Type": "application/json"}
        if self.key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.key_env]}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            choice = json.load(reply)["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        if not isinstance(text, str):
            raise ValueError("a reply without text")
        return text

    def _wait_for_turn(self) -> None:
        """Requests leave at least 60 / per_minute seconds apart."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + 60 / self.per_minute
        self._over.wait(max(0.0, turn - time.monotonic()))


def _seconds(header: str | None) -> float:
    try:
        return float(header or 0)
    except ValueError:
        return 0.0
