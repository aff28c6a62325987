"""Prompts as token ids: the chat template of a model around one user turn, with exactly one BOS.

Tasks see only this object; they never touch a tokenizer's own template functions.
"""

from dataclasses import dataclass

from macbench.errors import choose
from macbench.models import template

# RULER's template for Llama-3 (scripts/data/template.py, Apache-2.0). Its literal BOS is left out: `encode` adds the single BOS.
META_LLAMA3 = (
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
)
TEMPLATES = ("chat", "base", "meta-llama3")
_FEW = 8  # texts for which waking threads costs more than they save
_SENTINEL = "\x00user\x00"


@dataclass
class Chat:
    """Renders and encodes prompts.

    ``template``: ``chat`` is the model's own chat template (``base`` if it has none), ``base`` is the bare text and
    ``meta-llama3`` is the one used for RULER's published Llama-3 numbers.
    ``head`` and ``tail`` are the texts before and after the user turn; whatever follows ``tail`` continues the assistant turn.
    """

    tokenizer: object
    template: str = "chat"

    def __post_init__(self):
        choose("model.template", self.template, TEMPLATES)
        self.head, self.tail = self._halves()
        bos = self.tokenizer.bos_token_id
        # A tokenizer that puts BOS in front of plain text wants one; a template that spells it out has it already.
        plain = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        self._bos = [bos] if bos is not None and plain and plain[0] == bos else []

    def _halves(self) -> tuple[str, str]:
        if self.template == "meta-llama3":
            return META_LLAMA3
        if self.template == "base" or not self.tokenizer.chat_template:
            return "", ""
        turn = [{"role": "user", "content": _SENTINEL}]
        text = template.render(self.tokenizer, turn)
        head, found, tail = text.partition(_SENTINEL)
        if not found:
            raise ValueError("the chat template leaves out what the user says")
        return head, tail

    def render(self, user: str, answer_prefix: str = "") -> str:
        """The whole prompt as text; ``answer_prefix`` opens the assistant's answer."""
        return self.head + user + self.tail + answer_prefix

    def encode_piece(self, text: str) -> list[int]:
        """Token ids of a piece of a prompt: special tokens in the text are recognised, none is added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_pieces(self, texts: list[str]) -> list[list[int]]:
        """``encode_piece`` of many texts; straight from the Rust tokenizer, where there is one, for half the time or less."""
        rust = getattr(self.tokenizer, "backend_tokenizer", None)
        if rust is None:
            return [self.encode_piece(text) for text in texts]
        if len(texts) < _FEW:
            return [rust.encode(text, add_special_tokens=False).ids for text in texts]
        return [encoding.ids for encoding in rust.encode_batch_fast(texts, add_special_tokens=False)]

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt, with exactly one BOS if the tokenizer uses one."""
        ids = self.encode_piece(text)
        return ids if ids[:1] == self._bos else self._bos + ids

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def bos_count(self) -> int:
        """Tokens that ``encode`` adds in front of a text that has no BOS of its own (0 or 1)."""
        return len(self._bos) if self.encode_piece(self.head)[:1] != self._bos else 0
