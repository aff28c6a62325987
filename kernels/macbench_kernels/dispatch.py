"""One interface, several backends: ``kernels("triton", device)`` returns the functions that a method calls."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

BACKENDS = ("auto", "torch", "triton", "flashinfer")


class UnsupportedError(ValueError):
    """A backend cannot serve this device, dtype or shape; the message says which ones it can."""


@dataclass(frozen=True)
class Kernels:
    """What a backend offers; signatures and shapes are in torch_backend, summaries, prefill, mac, quantised, scores and select.

    ``attend``: decode attention over spans. ``attend_selected``: over selected tokens or pages. ``full``: over every visible key.
    ``match``: ring match. ``causal``: prompt attention with lse. ``mac_step``: a whole MAC step.
    ``extend_bounds``, ``row_scores``, ``weigh_rows``, ``token_scores``: bounds of key channels, scores and weighted sums of such summaries,
    and scores of all tokens.
    ``attend_quantised``: over dequantised keys and values. ``quantise_rows``: quantise a new row in place.
    ``column_sums``: attention that tokens get from prompt queries. ``least_attended``: which selected token got least in a step.
    ``top``: the best of many scores. ``strong_channels``, ``mean_probability``, ``top_tokens``: of bounds of chunks, see channels.
    ``plan(cache, heads, scale)``: what a backend's ``full`` wants done on the host before a step. ``captures``: whether a CUDA graph may
    capture its calls.
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
    attend_quantised: Callable
    quantise_rows: Callable
    column_sums: Callable
    least_attended: Callable
    top: Callable
    strong_channels: Callable
    mean_probability: Callable
    top_tokens: Callable
    plan: Callable | None = None
    captures: bool = True


def kernels(backend: str = "auto", device: str | torch.device = "cpu") -> Kernels:
    """The kernels of a backend; ``auto`` is triton on a GPU and torch elsewhere."""
    from macbench_kernels import channels, prefill, quantised, scores, select, summaries, torch_backend
    from macbench_kernels.mac import compose

    kind = torch.device(device).type
    if backend == "auto":
        backend = "triton" if kind == "cuda" else "torch"
    if backend == "torch":
        t = torch_backend
        return Kernels(
            "torch",
            attend=t.attend,
            attend_selected=t.attend_selected,
            full=t.full,
            match=t.match,
            causal=prefill.causal,
            mac_step=compose(t.match, t.attend),
            extend_bounds=summaries.extend_bounds,
            row_scores=summaries.row_scores,
            weigh_rows=summaries.weigh_rows,
            token_scores=summaries.token_scores,
            attend_quantised=quantised.attend_quantised,
            quantise_rows=quantised.quantise_rows,
            column_sums=scores.column_sums,
            least_attended=scores.least_attended,
            top=select.top,
            strong_channels=channels.strong_channels,
            mean_probability=channels.mean_probability,
            top_tokens=channels.top_tokens,
            captures=False,
        )
    if backend == "flashinfer":
        from macbench_kernels.flashinfer_backend import with_flashinfer

        if kind != "cuda":
            raise UnsupportedError(f"backend=flashinfer on device {kind}: needs a CUDA device")
        return with_flashinfer(kernels("triton", device))
    if backend != "triton":
        raise UnsupportedError(f"backend={backend}: must be one of {', '.join(BACKENDS)}")
    if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnsupportedError(f"backend=triton on device {kind}: needs a CUDA device, or TRITON_INTERPRET=1 to interpret the kernels on a CPU")
    try:
        from macbench_kernels import (
            triton_attend,
            triton_channels,
            triton_mac,
            triton_match,
            triton_quantised,
            triton_scores,
            triton_select,
            triton_selected,
            triton_summaries,
        )
    except ImportError as error:
        raise UnsupportedError(f"backend=triton: cannot import triton ({error})") from error
    return Kernels(
        "triton",
        attend=triton_attend.attend,
        attend_selected=triton_selected.attend_selected,
        full=triton_attend.full,
        match=triton_match.match,
        causal=prefill.causal,
        mac_step=triton_mac.mac_step,
        extend_bounds=triton_summaries.extend_bounds,
        row_scores=triton_summaries.row_scores,
        weigh_rows=triton_summaries.weigh_rows,
        token_scores=triton_summaries.token_scores,
        attend_quantised=triton_quantised.attend_quantised,
        quantise_rows=triton_quantised.quantise_rows,
        column_sums=triton_scores.column_sums,
        least_attended=triton_scores.least_attended,
        top=triton_select.top,
        strong_channels=triton_channels.strong_channels,
        mean_probability=triton_channels.mean_probability,
        top_tokens=triton_channels.top_tokens,
    )
