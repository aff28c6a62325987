"""A background text, a data mixture and a tiny network for the probe's tests."""

import random
from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from macbench.probe.mixture import Mixture
from macbench.probe.text import Background, read
from tests import real

_SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou"]
_WORDS = [a + b for a in _SYLLABLES for b in _SYLLABLES][::2]


def prose(sentences: int = 4000) -> str:
    rng = random.Random(0)
    return "\n".join(" ".join(rng.choices(_WORDS, k=rng.randrange(5, 15))).capitalize() + "." for _ in range(sentences))


def background(folder, held_out: bool = False) -> Background:
    path = folder / "prose.txt"
    path.write_text(prose())
    return read([str(path)], real.chat(), held_out)


@cache
def mixture(folder, seed: int = 0) -> Mixture:
    return Mixture(real.chat(), background(folder), seed)


def tiny_llama() -> LlamaForCausalLM:
    """Two layers with the tokenizer's vocabulary; weights large enough for attention to matter."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()
