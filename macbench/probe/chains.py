"""Several chains of variables in one noise, and a question about each: variable tracking that cannot be answered by listing every variable."""

import string

import numpy as np

from macbench.probe.sequence import Dialogue, Sequence, shifted
from macbench.tasks.ruler import protocol
from macbench.tasks.ruler.vt import chain

MOST_CHAINS = 8


def make(dialogue: Dialogue, length: int, rng: np.random.Generator) -> Sequence:
    """2 to ``MOST_CHAINS`` chains of five variables, asked one after the other in random order, in at most ``length`` tokens."""
    count = int(rng.integers(2, min(MOST_CHAINS, max(length // 512, 2)) + 1))
    names = _names(rng, count * (protocol.VT_HOPS + 1))
    chains = [names[i::count] for i in range(count)]
    values = [str(value) for value in rng.choice(np.arange(10000, 99999), count, replace=False)]
    wording = protocol.VARIABLE_TRACKING
    before, after = wording.template.split("{context}")
    turns = []
    for i, which in enumerate(rng.permutation(count).tolist()):
        value, named = values[which], chains[which]
        question = after.replace("{query}", value) + dialogue.tail + wording.answer_prefix.format(num_v=len(named), query=value)
        opening = question.removeprefix("\n") if i == 0 else dialogue.between + question.removeprefix("\n")
        turns.append((opening, " " + " ".join(named)))
    lines = [chain(named, value) for named, value in zip(chains, values, strict=True)]
    # Each chain's lines keep their order; which chain comes next is random.
    order = rng.permutation(np.repeat(np.arange(count), protocol.VT_HOPS + 1)).tolist()
    remaining = [iter(own) for own in lines]
    written = [next(remaining[which]) for which in order]
    # White space before a newline is a token of its own where a word follows, but not at the end of a text: so newlines are encoded apart.
    texts = [" ", "\n", dialogue.head + before.removesuffix("\n"), protocol.NOISE + "\n", *map(str.rstrip, written)]
    space, newline, head, noise, *encoded = dialogue.encode(*texts)
    encoded = [np.concatenate([ids, space[: line.endswith(" ")], newline]) for ids, line in zip(encoded, written, strict=True)]
    head = np.concatenate([np.array(dialogue.bos, np.int32), head, newline])
    parts, answers = dialogue.turns(turns)
    room = length - len(head) - sum(map(len, encoded)) - sum(map(len, parts))
    units = max(room // len(noise), 0)
    context, last = [head], 0
    for ids, place in zip(encoded, np.sort(rng.integers(0, units + 1, len(encoded))).tolist(), strict=True):
        context += [noise] * (place - last) + [ids]
        last = place
    context += [noise] * (units - last)
    return Sequence("chains", np.concatenate([*context, *parts]), shifted(answers, sum(map(len, context))))


def _names(rng: np.random.Generator, n: int) -> list[str]:
    found: dict[str, None] = {}
    letters = np.array(list(string.ascii_uppercase))
    while len(found) < n:
        found["".join(rng.choice(letters, protocol.VT_NAME))] = None
    return list(found)
