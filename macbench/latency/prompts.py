"""Real prompts of a given length: essays to be continued, each request from another place in the text."""

from collections.abc import Callable

ASK = "Here is the beginning of an essay. Continue it in the same style, at length.\n\n"


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
