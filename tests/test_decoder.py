"""One step in place: the same tokens and counts captured or eager, alone or in a batch, for one prompt after the other."""

import pytest
import torch
from macbench_kernels import kernels

from macbench.decoder import Preparation
from macbench.engine import Engine, Request
from macbench.methods.full import Full
from macbench.methods.mac import MAC
from tests.conftest import DEVICE
from tests.models.tiny import tiny

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# No token comes twice within 97: in the first layer equal tokens have equal queries, and rounding would choose among equally near ones.
TEXTS = [torch.randperm(97, generator=torch.Generator().manual_seed(n)).tolist() * 2 for n in (70, 40, 95, 9, 60)]
PROMPTS = [text[:n] for text, n in zip(TEXTS, (70, 40, 95, 9, 60), strict=True)]
# A quarter of the first one's heads hit, and 70% of the other's, in float32 and in bfloat16.
TAU = {"llama": 1.0, "qwen3": 0.8}
METHODS = {"full": lambda network: Full(), "mac": lambda network: MAC(min_context=0, window=32, band=8, tau=TAU[network.config.model_type])}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def network(request):
    return tiny(request.param, DTYPE, head_dim=64, num_attention_heads=6, num_key_value_heads=2)


def generations(network, method, groups, graph, steps=24):
    """Counts and most likely next tokens along all texts, decoded group by group by one engine; the first of a group goes on for longest."""
    engine = Engine(network, kernels("auto", DEVICE), 128, page_size=4, batch=max(map(len, groups)), graph=graph)
    made = []
    for group in groups:
        prompts = [engine.prefill(PROMPTS[i], method.prompt_queries) for i in group]
        requests = [Request(p, steps + 16 - 4 * i, feed=TEXTS[i][len(PROMPTS[i]) :]) for i, p in zip(group, prompts, strict=True)]
        best = []
        done = engine.decode_batch(requests, method, watch=lambda step, logits, best=best: best.append(logits.argmax(-1).tolist()))
        made += [(g.counts, [row[i] for row in best[: len(g.step_seconds)]]) for i, g in enumerate(done)]
        for prompt in prompts:
            prompt.free()
    assert engine.pool.free_pages == engine.pool.pages
    return made


@pytest.mark.parametrize("name", METHODS)
def test_captured_and_batched_steps_give_the_same(network, name):
    """On a CPU nothing is captured; there the second way shows that an engine keeps no trace of what it decoded before."""
    want = generations(network, METHODS[name](network), [[0], [1], [2], [3], [4]], graph=False)
    assert [len(tokens) for _, tokens in want] == [39, 35, 31, 27, 23] and len(set(want[0][1])) > 5
    hits, tried = (sum(counts[key].sum() for counts, _ in want) for key in ("hits", "match_heads"))
    assert name == "full" or 0.1 < hits / tried < 0.9
    for groups, graph in (([[i] for i in range(5)], True), ([[0, 1, 2], [3, 4]], True), ([[0, 1, 2], [3, 4]], False)):
        for (counts, tokens), (expected, said) in zip(generations(network, METHODS[name](network), groups, graph), want, strict=True):
            assert tokens == said
            for key, numbers in expected.items():
                assert (counts[key] == numbers).all(), key


@pytest.mark.parametrize("name", METHODS)
def test_batches_of_other_sizes_in_between_change_nothing(network, name):
    """Three requests, one alone, three again, by one engine: a captured step finds its memory where it was."""
    method = METHODS[name](network)
    engine = Engine(network, kernels("auto", DEVICE), 128, page_size=4, batch=3)
    made, where = [], []
    for group in (PROMPTS[:3], PROMPTS[3:4], PROMPTS[:3], PROMPTS[2:4]):
        prompts = [engine.prefill(ids, method.prompt_queries) for ids in group]
        made.append([g.tokens for g in engine.decode_batch([Request(p, 12) for p in prompts], method)])
        where.append([t.data_ptr() for t in method._buffers.values()])
        for prompt in prompts:
            prompt.free()
    assert made[0] == made[2]
    assert where[0] == where[2] == where[3]
    engine.release()
    assert not engine._decoders and not hasattr(method, "shape")


@pytest.mark.parametrize("name", METHODS)
def test_a_prepared_method_decodes_again(network, name):
    """The second time around on one preparation: tokens and counts of the first."""
    engine, method = Engine(network, kernels("auto", DEVICE), 128, page_size=4, batch=3), METHODS[name](network)
    prompts = [engine.prefill(ids, method.prompt_queries) for ids in PROMPTS[:3]]
    requests = [Request(p, 20) for p in prompts]
    made, preparation = [], Preparation()
    for again in (requests, [Request(p, 5, feed=[1] * 5) for p in prompts], requests):
        made.append(engine.decode_batch(again, method, preparation=preparation))
    first, fed, third = made
    for one, other in zip(first, third, strict=True):
        assert one.tokens == other.tokens
        assert all((other.counts[key] == counts).all() for key, counts in one.counts.items())
    assert [g.tokens for g in fed] == [[1] * 5] * 3


def test_what_is_fed_is_what_is_processed(network):
    """Tokens fed to full attention: the logits of each step are those of one forward pass over prompt and fed tokens."""
    engine = Engine(network, kernels("auto", DEVICE), 128, page_size=4)
    feed, seen = PROMPTS[1][:20], []
    prompt = engine.prefill(PROMPTS[0])
    request = Request(prompt, len(feed) + 1, feed=feed)
    made = engine.decode_batch([request], Full(), watch=lambda step, logits: seen.append(logits[0].float().cpu()))[0]
    assert made.tokens[:-1] == feed
    with torch.inference_mode():
        want = network(torch.tensor([PROMPTS[0] + feed], device=DEVICE)).logits[0, len(PROMPTS[0]) :].float().cpu()
    error = (torch.stack(seen) - want).norm() / want.norm()
    assert error < (1e-5 if torch.float32 == DTYPE else 2e-2)
