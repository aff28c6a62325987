"""transformers' own ``generate`` with a static cache and a compiled decode step, on the same weights and prompt."""

from time import perf_counter

import torch


class _Clock:
    """A streamer that notes when each token arrives."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, tokens) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def generate(network: torch.nn.Module, ids: torch.Tensor, new_tokens: int, skip: int) -> dict:
    """ids [B, n] -> seconds of each step after the first ``skip`` (which compile), and of the first token."""
    clock = _Clock()
    began = perf_counter()
    network.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
        eos_token_id=None, cache_implementation="static", streamer=clock if len(ids) == 1 else None,
    )  # fmt: skip
    # The first call of the streamer is the prompt.
    arrivals = clock.times[1:]
    steps = [b - a for a, b in zip(arrivals, arrivals[1:], strict=False)]
    return {"seconds": steps[skip:], "first": arrivals[0] - began if arrivals else None}
