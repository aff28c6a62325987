"""Tokenizers trained here in a second, each with another pre-tokenization, so that nothing rests on the default model's."""

import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tasks import ruler_data

# The expression of Llama-3's tokenizer: digits in threes, newlines glued to the punctuation before them.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# A system prompt with the words that a needle task makes singular, and a BOS that the template spells out.
TEMPLATE = "<s><|system|>\nYou are a model. Some answers are all short.<|end|>\n<|user|>\n{{ messages[0]['content'] }}<|end|>\n<|assistant|>\n"
SPECIAL = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def _corpus() -> list[str]:
    rng = random.Random(0)
    texts = [ruler_data.paragraph(rng) for _ in range(150)]
    texts += [f"One of the special magic numbers for big-dog is: {rng.randrange(10**6, 10**7)}.\n" for _ in range(300)]
    texts += [f" {i}. word VAR XYZ = {i}\nThe grass is green. Here we go." for i in range(300)]
    return texts


def _trained(pre_tokenizer, decoder, alphabet) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def _fast(tokenizer: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=10**9)
    fast.chat_template = chat_template
    return fast


def llama3_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits in threes, a chat template with a literal BOS."""
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    stages = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return _fast(_trained(stages, decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()), TEMPLATE)


def gpt2_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges digits as it likes; no chat template, a BOS from the post-processor."""
    stages = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _fast(_trained(stages, decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()), None)


def metaspace() -> PreTrainedTokenizerFast:
    """A space is part of the word after it, and the first word of any text gets one: only cuts before spaces hold."""
    stages = pre_tokenizers.Metaspace(prepend_scheme="always")
    return _fast(_trained(stages, decoders.Metaspace(prepend_scheme="always"), _characters()), TEMPLATE)


def llama2_like() -> PreTrainedTokenizerFast:
    """No pre-tokenization, and a space before every text: no cut holds."""
    tokenizer = _trained(pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace(), _characters())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _fast(tokenizer, TEMPLATE.removeprefix("<s>"))


def _characters() -> list[str]:
    return sorted({character for text in _corpus() for character in text} | {chr(i) for i in range(33, 127)} | {"\n"})
