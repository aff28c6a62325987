"""A model's own chat template, which is a program: it is run in a process of its own that has little time and memory."""

import os
import resource
import select
import signal
from pathlib import Path
from time import monotonic

from macbench.errors import one_line

_SECONDS = 5  # of work; a template takes a millisecond
_PATIENCE = 9  # seconds until then on a machine that is busy with other things
_MEMORY = 256 << 20  # bytes above what this process has already
_MOST = 1 << 16  # characters of a prompt's frame


def render(tokenizer, turns: list[dict]) -> str:
    """``apply_chat_template`` with the answer opened. ValueError: the template fails, or takes too long or too much."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        _child(tokenizer, turns, writable)
    os.close(writable)
    try:
        answer = _read(readable)
    finally:
        os.close(readable)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if answer[:1] not in (b"+", b"-") or answer[-1:] != b"\0":
        raise ValueError(f"the chat template takes more than {_SECONDS} s or {_MEMORY >> 20} MiB")
    text = answer[1:-1].decode("utf-8", "surrogatepass")
    if answer[:1] == b"-":
        raise ValueError(f"the chat template fails: {text}")
    return text


def _child(tokenizer, turns: list[dict], out: int) -> None:
    """Write + and the text, or - and what is wrong, and a zero byte."""
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        answer = "+" + tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if len(answer) > _MOST:
            raise ValueError(f"makes {len(answer)} characters of a short text")
    except Exception as error:  # whatever a foreign program makes jinja2 raise
        answer = "-" + one_line(error)
    finally:
        content = answer.encode("utf-8", "surrogatepass") + b"\0"
        while content:
            content = content[os.write(out, content) :]
        os._exit(0)


def _read(file: int) -> bytes:
    """All that comes within the time."""
    content, end = b"", monotonic() + _PATIENCE
    while select.select([file], [], [], max(0.0, end - monotonic()))[0]:
        piece = os.read(file, 1 << 16)
        if not piece:
            break
        content += piece
    return content
