"""Devices cpu:0 and cpu:1 that are one CPU but keep their tensors apart, as GPUs would: what mixes them raises."""

from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode

HOST = torch.device("cpu")
# What takes tensors of several devices.
_MOVES = ("copy_", "to")


class Pretended(TorchFunctionMode):
    """While open, ``device="cpu:1"`` makes tensors that say they are there, and an operation with tensors of two devices raises, numbers aside.

    A tensor's place is an attribute of it; what an operation returns lies where its arguments did. Tensors without a place are the host's.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if function is torch.device:
            return function(*args, **kwargs)
        if function == torch.Tensor.device.__get__:
            return place_of(args[0])
        tensors = [*_tensors((args, tuple(kwargs.values())))]
        places = {place_of(x) for x in tensors if x.dim() or place_of(x) != HOST}
        if len(places) > 1 and name not in _MOVES:
            raise RuntimeError(f"{name}: tensors on {' and '.join(sorted(map(str, places)))}")
        place = place_of(args[0]) if name == "copy_" else HOST if name == "cpu" else next(iter(places), HOST)
        if kwargs.get("device") is not None:
            place = torch.device(kwargs["device"])
            kwargs = kwargs | {"device": HOST}
        elif name == "to":
            place = next((_meant(x) for x in args[1:] if isinstance(x, torch.Tensor | str | torch.device)), place_of(args[0]))
            args = (args[0], *(HOST if isinstance(x, str | torch.device) else x for x in args[1:]))
        result = function(*args, **kwargs)
        if any(result is x and place_of(x) != place for x in tensors):  # what stays where it is, is a copy elsewhere
            result = result.clone()
        for x in _tensors(result):
            put(x, place)
        return result


def place_of(tensor: torch.Tensor) -> torch.device:
    return tensor.__dict__.get("_place", HOST)


def put(tensor: torch.Tensor, place: torch.device) -> None:
    tensor._place = place


def _meant(where: torch.Tensor | str | torch.device) -> torch.device:
    return place_of(where) if isinstance(where, torch.Tensor) else torch.device(where)


def _tensors(values) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
