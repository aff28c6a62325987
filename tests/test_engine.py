"""The engine on SmolLM2 against transformers' own generate, token for token."""

import pytest
import torch
from macbench_kernels import kernels

from macbench.engine import Engine, Request
from macbench.methods.full import Full
from macbench.methods.h2o import H2O
from macbench.methods.mac import MAC
from macbench.methods.pyramidkv import PyramidKV
from macbench.methods.snapkv import SnapKV
from macbench.methods.tova import TOVA
from macbench.tasks.ruler import Ruler
from tests import real

NEW_TOKENS = 12
CASES = [
    ("niah_single_1", 512),
    ("fwe", 768),
    ("vt", 1024),
]


@pytest.mark.parametrize(("subtask", "ctx"), CASES)
def test_full_attention_equals_transformers_generate(subtask, ctx):
    network, chat = real.model().network, real.chat()
    ids = Ruler(chat, ctx, subtasks=[subtask]).example(subtask, 0).input_ids
    tensor = torch.tensor([list(ids)])
    with torch.inference_mode():
        want = network.generate(
            tensor,
            attention_mask=torch.ones_like(tensor),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    engine = Engine(network, kernels("torch"), len(ids) + NEW_TOKENS, chunk=400)
    prompt = engine.prefill(ids)
    torch.testing.assert_close(prompt.logits, want.logits[0][0].float(), atol=1e-4, rtol=0)
    seen = []
    made = engine.decode_batch([Request(prompt, NEW_TOKENS)], Full(), watch=lambda step, logits: seen.append(logits[0].clone()))[0]
    assert made.tokens == want.sequences[0, len(ids) :].tolist()
    for ours, theirs in zip(seen, want.logits[1:], strict=True):
        # Rounding of float32 over 30 layers, in units of the largest logit (about 20).
        assert (ours - theirs[0].float()).abs().max() < 1e-5 * theirs.abs().max()


def test_methods_share_one_prefill_and_leave_it_alone():
    """Decoding MAC in between does not change what full attention then makes of the same prompt."""
    network, chat = real.model().network, real.chat()
    ids = Ruler(chat, 896, subtasks=["vt"]).example("vt", 1).input_ids
    engine = Engine(network, kernels("torch"), 896)
    mac = MAC(min_context=0, window=128, band=32)
    prompt = engine.prefill(ids, mac.prompt_queries)
    first = engine.decode(prompt, Full(), 12)
    between = engine.decode(prompt, mac, 12)
    again = engine.decode(prompt, Full(), 12)
    assert first.tokens == again.tokens
    assert between.counts["hits"].sum() > 0
    prompt.free()
    assert engine.pool.free_pages == engine.pool.pages


def test_decoding_stops_at_a_stop_token_or_the_limit():
    network, chat = real.model().network, real.chat()
    ids = chat.encode(chat.render("Say hello."))
    engine = Engine(network, kernels("torch"), 200)
    prompt = engine.prefill(ids)
    free = engine.decode(prompt, Full(), 30)
    stop = free.tokens[3]
    stopped = engine.decode(prompt, Full(), 30, frozenset([stop]))
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert stopped.finish_reason == "stop"
    limited = engine.decode(prompt, Full(), 2)
    assert (limited.tokens, limited.finish_reason, len(limited.step_seconds)) == (free.tokens[:2], "length", 1)


def test_column_sums_of_a_prompt_do_not_depend_on_its_chunks():
    """Every query gives its KV head's tokens one unit of attention per query head; chunks only change the order of additions."""
    network, chat = real.model().network, real.chat()
    ids = chat.encode(chat.render("One, two, three, four, five, six, seven. " * 20))
    whole, chunked = (Engine(network, kernels("torch"), 400, chunk=chunk).prefill(ids, column_sums=True).queries for chunk in (1000, 37))
    group = network.config.num_attention_heads // network.config.num_key_value_heads
    for one, other in zip(whole, chunked, strict=True):
        assert one.column_sums.shape == (3, len(ids))
        torch.testing.assert_close(one.column_sums, other.column_sums, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(one.column_sums.sum(1), torch.full((3,), float(group * len(ids))), atol=1e-2, rtol=1e-4)
    assert Engine(network, kernels("torch"), 400).prefill(ids).queries[0].column_sums is None


def test_evicting_methods_with_room_for_everything_write_what_full_attention_writes():
    network, chat = real.model().network, real.chat()
    ids = chat.encode(chat.render("Continue: one, two, three, four, five, six, seven. " * 25))
    engine = Engine(network, kernels("torch"), len(ids) + 12)
    methods = [SnapKV(600), PyramidKV(600), TOVA(600), H2O(300, 300)]
    prompt = engine.prefill(ids, 32, column_sums=True)
    want = engine.decode(prompt, Full(), 12).tokens
    for method in methods:
        assert engine.decode(prompt, method, 12).tokens == want
    # The pyramid has another capacity in every layer.
    counts = engine.decode(prompt, PyramidKV(100), 3).counts
    rows = counts["tokens_phys"][0, :, 0] // engine.shape.kv_heads
    assert rows[0] > 170 and rows[-1] < 20 and rows.mean() == pytest.approx(101)
