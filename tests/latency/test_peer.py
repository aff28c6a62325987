"""The peer's clock on a network that takes the time it is told to, and prompts of essays by a tokenizer of single characters."""

import json

import pytest
import torch

from macbench.latency import peer
from macbench.latency.prompts import ASK, essays


@pytest.mark.parametrize("skip", [0, 2])
def test_steps_are_those_after_the_skipped_ones(monkeypatch, skip):
    """The prompt's own call of the streamer is no token; the first token comes 7 s after the start, the others after one step each."""
    now, asked, steps = [100.0], {}, [50.0, 20.0, 3.0, 5.0, 4.0]

    class Network:
        def generate(self, ids, streamer, **options):
            asked.update(options, ids=ids)
            streamer.put(ids)
            for seconds in (7.0, *steps):
                now[0] += seconds
                streamer.put(torch.tensor([1]))
            streamer.end()

    monkeypatch.setattr(peer, "perf_counter", lambda: now[0])
    ids = torch.arange(5)[None]
    assert peer.generate(Network(), ids, 6, skip) == {"seconds": steps[skip:], "first": 7.0}
    assert asked["ids"] is ids and asked["cache_implementation"] == "static" and not asked["do_sample"]
    assert asked["max_new_tokens"] == asked["min_new_tokens"] == 6 and asked["eos_token_id"] is None


class Letters:
    """A chat whose tokens are characters."""

    def render(self, text):
        return f"[{text}]"

    def encode(self, text):
        return [ord(c) for c in text]

    encode_piece = encode

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_each_request_continues_another_place(tmp_path):
    text = "".join(f"{i:05d}," for i in range(2000))  # no two places look alike
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": text}))
    made = essays(Letters(), str(tmp_path))(16, 400)
    bodies = [Letters().decode(ids).removeprefix(f"[{ASK}").removesuffix("]") for ids in made]
    starts = [text.find(body) for body in bodies]
    assert len(set(starts)) == 16 and min(starts) == 0
    assert all(380 < len(ids) <= 400 and len(body) == len(ids) - len(ASK) - 2 for ids, body in zip(made, bodies, strict=True))
    assert starts[1] - starts[0] > 400  # and the first two share nothing
