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
    """What a backend offers; signatures and shapes are in torch_backend, prefill and mac.

    ``attend``: decode attention over spans. ``attend_selected``: over selected tokens or pages. ``full``: over every visible key.
    ``match``: ring match. ``causal``: prompt attention with lse. ``mac_step``: a whole MAC step.
    """

    name: str
    attend: Callable
    attend_selected: Callable
    full: Callable
    match: Callable
    causal: Callable
    mac_step: Callable


def kernels(backend: str = "auto", device: str | torch.device = "cpu") -> Kernels:
    """The kernels of a backend; ``auto`` is triton on a GPU and torch elsewhere."""
    from macbench_kernels import prefill, torch_backend
    from macbench_kernels.mac import compose

    kind = torch.device(device).type
    if backend == "auto":
        backend = "triton" if kind == "cuda" else "torch"
    if backend == "torch":
        step = compose(torch_backend.match, torch_backend.attend)
        t = torch_backend
        return Kernels("torch", t.attend, t.attend_selected, t.full, t.match, prefill.causal, step)
    if backend != "triton":
        raise UnsupportedError(f"backend={backend}: must be one of {', '.join(BACKENDS)}")
    if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnsupportedError(f"backend=triton on device {kind}: needs a CUDA device, or TRITON_INTERPRET=1 to interpret the kernels on a CPU")
    try:
        from macbench_kernels import triton_attend, triton_mac, triton_match, triton_selected
    except ImportError as error:
        raise UnsupportedError(f"backend=triton: cannot import triton ({error})") from error
    return Kernels(
        "triton", triton_attend.attend, triton_selected.attend_selected, triton_attend.full, triton_match.match, prefill.causal, triton_mac.mac_step
    )
