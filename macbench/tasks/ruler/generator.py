"""What the five families of generators share: their tools, and the way from a draft to an example of exactly known length."""

from dataclasses import dataclass
from functools import cached_property

from macbench.models.chat import Chat
from macbench.tasks.base import Example
from macbench.tasks.ruler import protocol
from macbench.tasks.ruler.data import Data
from macbench.tasks.ruler.fit import Draft, largest_fit, too_small
from macbench.tasks.ruler.pieces import Pieces, WholeTexts, exact_cuts
from macbench.tasks.ruler.rng import Rng

# How questions begin, on a line of their own behind the context.
_QUESTIONS = ("What are ", "What is ", "Question: ")


@dataclass
class Kit:
    """One set of tools for all subtasks of a run. ``ctx``: prompt plus generated tokens."""

    chat: Chat
    ctx: int
    seed: int
    data: Data

    @cached_property
    def exact(self) -> frozenset[str]:
        """Kinds of cut that this tokenizer allows (see pieces.py)."""
        return exact_cuts(self.chat)

    @cached_property
    def bos(self) -> list[int]:
        """The BOS that ``chat.encode`` puts before a prompt; empty if there is none or the chat template spells it out."""
        return self.chat.encode(self.chat.head or "a")[: self.chat.bos_count]

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces(self.chat)

    @cached_property
    def whole(self) -> WholeTexts:
        return WholeTexts(self.chat)

    def uncut(self) -> "Kit":
        """The same tools without any trust in cuts."""
        kit = Kit(self.chat, self.ctx, self.seed, self.data)
        kit.exact = frozenset()
        return kit


class Generator:
    """One subtask. A subclass says in ``draft(index)`` what a sample is, whatever its size; ``cuts`` are the kinds of cut it makes."""

    def __init__(self, name: str, kit: Kit, cuts: set[str]):
        self.name, self.kit, self.chat = name, kit, kit.chat
        self.wording = protocol.WORDING[name]
        self.pieces = kit.pieces if cuts <= kit.exact else kit.whole
        self.room = kit.ctx - self.wording.tokens_to_generate - len(kit.bos)  # tokens for the prompt without its BOS

    def draft(self, index: int) -> Draft:
        raise NotImplementedError

    def load(self) -> None:
        """Read the data that samples need, so that ``Data.sources`` tells all of it."""

    def adds_up(self) -> bool:
        """Whether a small prompt of this task, put together from pieces, is the same as the prompt tokenised whole."""
        draft = self.draft(0)
        parts = draft.parts(max(min(draft.smallest + 16, draft.largest), draft.smallest))
        return self.pieces.ids(parts).tolist() == self.chat.encode_piece(self.pieces.text(parts))

    def rng(self, index: int) -> Rng:
        """The stream of one sample: nothing but task, seed and index decides its random choices."""
        return Rng("ruler", self.name, self.kit.seed, index)

    def example(self, index: int) -> Example:
        draft = self.draft(index)
        fit = largest_fit(draft, self.pieces.count, self.room)
        if fit is None:
            spare = self.kit.ctx - self.room
            raise too_small(self.name, self.kit.ctx, self.pieces.count(draft.parts(draft.smallest)) + spare)
        units, parts = fit
        prompt = self.pieces.text(parts)
        input_ids = self.kit.bos + self.pieces.ids(parts).tolist()
        if len(input_ids) + self.wording.tokens_to_generate > self.kit.ctx:
            raise AssertionError(f"{self.name} {index}: {len(input_ids)} prompt tokens do not leave room to generate in {self.kit.ctx}")
        meta = {"index": index, "haystack_units": units, **draft.meta(units)}
        limit, question = self.wording.tokens_to_generate, self._question(prompt)
        return Example(self.name, str(index), prompt, input_ids, draft.references, limit, meta, question=question)

    def _question(self, prompt: str) -> int:
        """Tokens of the last line that asks something, and of everything after it."""
        start = max(prompt.rfind("\n" + opening) for opening in _QUESTIONS) + 1
        return len(self.chat.encode_piece(prompt[start:]))
