"""Quantised copies of the keys or values of all layers."""

from dataclasses import replace

from macbench_kernels import Codes, PagedKVCache, Scheme

from macbench.methods.base import Method

# Codes are integers of 64 bits while they are made and packed: so many times the memory of the keys.
_WIDER = 8
# Tokens that are quantised at once, a multiple of every group.
_CHUNK = 8192


class Stored:
    """``layers[i]``: the codes of layer i, in buffers of ``method`` whose names begin with ``name``. ``side``: 0 of keys, 1 of values."""

    def __init__(self, method: Method, scheme: Scheme, name: str, side: int):
        shape = self._shape = method.shape
        sizes = (shape.layers * shape.batch, shape.kv_heads, shape.max_tokens, shape.head_dim)
        codes = self._codes = self._view(Codes.create(scheme, *sizes, method.buffer, name), lambda x: x.unflatten(0, (shape.layers, shape.batch)))
        self._slices, self._side = method.slices, side
        self.layers = [self._view(codes, lambda x, i=i: x[i]) for i in range(shape.layers)]

    def copy(self, cache: PagedKVCache, request: int, start: int, stop: int) -> None:
        """Quantise the tokens [start, stop) of a request out of the cache in all layers; both multiples of the group's tokens."""
        for first in range(start, stop, _CHUNK):
            last = min(first + _CHUNK, stop)
            for layers in self._slices(_WIDER * (last - first)):
                part = self._view(self._codes, lambda x, layers=layers: x[layers, request])
                part.write(slice(None), first, cache.stacked(layers, request, first, last, self._side))

    @staticmethod
    def _view(codes: Codes, view) -> Codes:
        zero = None if codes.zero is None else view(codes.zero)
        return replace(codes, words=view(codes.words), scale=view(codes.scale), zero=zero)
