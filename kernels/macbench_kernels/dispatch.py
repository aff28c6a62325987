"""One interface, several backends: ``kernels("triton", device)`` returns the functions that a method calls."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

BACKENDS = ("auto", "torch", "triton")


class UnsupportedError(ValueError):
    """A backend cannot serve this device, dtype or shape; the message says which ones it can."""


@dataclass(frozen=True)
class Kernels:
    """What a backend offers; signatures and shapes are in torch_backend, summaries, prefill and mac.

    ``attend``: decode attention over spans. ``attend_selected``: over selected tokens or pages. ``full``: over every visible key.
    ``match``: ring match. ``causal``: prompt attention with lse. ``mac_step``: a whole MAC step. ``extend_bounds``, ``row_scores``,
    ``weigh_rows``, ``token_scores``: bounds of key channels, scores and weighted sums of summaries, scores of all tokens.
    """

    name: str
    attend: Callable
    attend_selected: Callable
    full: Callable
    match: Callable
    causal: Callable
    mac_step: Callable
    extend_bounds: Callable
    row_scores: Callable
    weigh_rows: Callable
    token_scores: Callable


def kernels(backend: str = "auto", device: str | torch.device = "cpu") -> Kernels:
    """The kernels of a backend; ``auto`` is triton on a GPU and torch elsewhere."""
    from macbench_kernels import prefill, summaries, torch_backend
    from macbench_kernels.mac import compose

    kind = torch.device(device).type
    if backend == "auto":
        backend = "triton" if kind == "cuda" else "torch"
    if backend == "torch":
        step = compose(torch_backend.match, torch_backend.attend)
        t, scores = torch_backend, (summaries.extend_bounds, summaries.row_scores, summaries.weigh_rows, summaries.token_scores)
        return Kernels("torch", t.attend, t.attend_selected, t.full, t.match, prefill.causal, step, *scores)
    if backend != "triton":
        raise UnsupportedError(f"backend={backend}: must be one of {', '.join(BACKENDS)}")
    if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnsupportedError(f"backend=triton on device {kind}: needs a CUDA device, or TRITON_INTERPRET=1 to interpret the kernels on a CPU")
    try:
        from macbench_kernels import triton_attend, triton_mac, triton_match, triton_selected, triton_summaries
    except ImportError as error:
        raise UnsupportedError(f"backend=triton: cannot import triton ({error})") from error
    t, s = triton_attend, triton_summaries
    scores = s.extend_bounds, s.row_scores, s.weigh_rows, s.token_scores
    return Kernels("triton", t.attend, triton_selected.attend_selected, t.full, triton_match.match, prefill.causal, triton_mac.mac_step, *scores)
