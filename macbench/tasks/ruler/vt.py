"""Variable tracking: one chain of assignments among noise; which variables hold the value at its head?"""

import re
import string
from functools import cached_property
from itertools import pairwise

import numpy as np

from macbench.tasks.ruler import protocol
from macbench.tasks.ruler.fit import Draft, largest_fit
from macbench.tasks.ruler.generator import Generator, Kit
from macbench.tasks.ruler.rng import Rng

_EXAMPLE_VALUE = "12345"


def chain(names: list[str], value: str) -> list[str]:
    """The lines that give ``value`` to the first name and pass it on; a space ends every line but the first, as in RULER."""
    return [f"VAR {names[0]} = {value}"] + [f"VAR {to} = VAR {source} " for source, to in pairwise(names)]


def variable_names(rng: Rng, letters: int) -> list[str]:
    """Different names for the variables of a chain; VAR, which would read like an assignment, is not one of them."""
    names = rng.letters(string.ascii_uppercase, letters, protocol.VT_HOPS + 2)
    return [name for name in names if name != "VAR"][: protocol.VT_HOPS + 1]


class VariableTracking(Generator):
    """As variable_tracking.py with one chain of four hops in noise, after one worked example in the same user turn.

    The worked example is one for all samples of a seed, about 500 tokens; each sample gets new names and a new value in it.
    """

    def __init__(self, name: str, kit: Kit):
        super().__init__(name, kit, {"space"})
        self.before, self.after = self.wording.template.split("{context}")

    @cached_property
    def _between(self) -> np.ndarray:
        """A line of noise without its first word, and the newline and first word after it: the next line's, noise or assignment."""
        rest = protocol.NOISE.partition(" ")[2]
        return self.pieces.add([f" {rest}\nThe", f" {rest}\nVAR"])

    @cached_property
    def _example(self) -> tuple[str, list[str]]:
        """Text and names of the worked example, sized as in RULER: as much noise as 500 tokens hold, without a chat template."""
        rng = Rng("ruler", self.name, self.kit.seed, "example")
        names = variable_names(rng, protocol.VT_EXAMPLE_NAME)

        def text(lines: int) -> str:
            places = sorted(rng.child("places", lines).sample(lines, len(names)))
            return self._plain(places, lines, names)

        draft = Draft([], lambda n: [text(n)], len(names), protocol.VT_EXAMPLE_TOKENS)
        fit = largest_fit(draft, self.pieces.count, protocol.VT_EXAMPLE_TOKENS)
        plain = text(fit[0] if fit else len(names))  # RULER goes no lower, whatever the tokens
        return f"{plain} {' '.join(names)}\n", names

    def _plain(self, places: list[int], lines: int, names: list[str]) -> str:
        noise: list[str] = [protocol.NOISE] * lines
        for offset, (place, line) in enumerate(zip(places, chain(names, _EXAMPLE_VALUE), strict=True)):
            noise.insert(place + offset, line)
        task = self.wording.template + self.wording.answer_prefix
        return task.format(context="\n".join(noise), query=_EXAMPLE_VALUE, num_v=len(names))

    def draft(self, index: int) -> Draft:
        rng = self.rng(index)
        names = variable_names(rng, protocol.VT_NAME)
        value = str(rng.below(99999 - 10000) + 10000)
        example, old = self._example
        new = variable_names(rng, protocol.VT_EXAMPLE_NAME)
        change = dict(zip(old, new, strict=True)) | {_EXAMPLE_VALUE: str(rng.below(99999 - 10000) + 10000)}
        example = re.sub(r"\b(?:" + "|".join(change) + r")\b", lambda match: change[match[0]], example)
        prefix = self.wording.answer_prefix.format(num_v=len(names), query=value)
        tail = self.after.replace("{query}", value) + self.chat.tail + prefix
        # The answer of the example has two spaces in a row, so it stays whole; everything before it is taken word by word.
        question, answer, named = example.partition(self.wording.answer_prefix.partition(":")[0])
        first, space, rest = question.partition(" ")
        head = [self.chat.head + first, self.pieces.add_words(space + rest)]
        middle = answer + named + "\n" + self.before
        lines = chain(names, value)
        noise_then_noise, noise_then_var = self._between

        def places(n: int) -> list[int]:
            return sorted(rng.child("places", n).sample(n, len(lines)))

        def parts(n: int) -> list:
            # A text is cut before the first space of each line: newlines stay between the words around them.
            where = places(n)
            noise = np.full(n, noise_then_noise)
            noise[[place - 1 for place in where if place > 0]] = noise_then_var
            result, last = [*head, middle + ("VAR" if where[0] == 0 else "The")], 0
            for place, line in zip(where, lines, strict=True):
                result += [noise[last:place], line.removeprefix("VAR") + "\nThe"]  # places differ, so noise follows
                last = place
            return [*result, noise[last : n - 1], " " + protocol.NOISE.partition(" ")[2] + tail]

        tokens = np.arange(self.kit.ctx + 1) * self.pieces.lengths(self._between[:1]) if self.pieces.additive else None
        return Draft(names, parts, len(lines), self.kit.ctx, tokens, lambda n: {"assignment_units": places(n), "value": value})
