"""Triton's interpreter spends most of its time on what it throws away or has found before; here that is left out. Results are the same."""

from dataclasses import replace
from functools import cache
from math import prod

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    _patch_once()
    _leave_out_dropped_checks()
    _remember()


def _patch_once() -> None:
    """The interpreter patches triton.language anew at every call of a device function, which takes longer than most of what it then interprets.

    Within a launch, a module of the language is patched at its first use alone; the end of a launch restores it as ever.
    """
    patch, scopes, patched = interpreter._patch_lang, interpreter._LangPatchScope, set()
    restore = scopes.restore

    @cache
    def asks(fn):
        return {id(tl), id(tl.core)} & set(map(id, fn.__globals__.values()))

    def first(fn):
        asked = asks(fn)
        if asked <= patched:
            return scopes()
        patched.update(asked)
        return patch(fn)

    def forget(scope):
        patched.clear()
        restore(scope)

    interpreter._patch_lang, scopes.restore = first, forget


def _leave_out_dropped_checks() -> None:
    """Integer operations are done in 64 bits, too, to look for overflow; without ``debug`` what is found is dropped."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def _remember() -> None:
    """numpy's name of a type, and the sizes of a block and of a tensor, are looked up instead of made for every operation."""
    find, known = interpreter._get_np_dtype, {}
    make_block, blocks = tl.core.block_type.__init__, {}

    def numpy_type(dtype):
        found = known.get(dtype.name)
        return found if found is not None else known.setdefault(dtype.name, find(dtype))

    def block(type, element_ty, shape):
        key = (element_ty.name, *shape)
        if key in blocks:
            type.element_ty, (type.shape, type.numel, type.name) = element_ty, blocks[key]
        else:
            make_block(type, element_ty, shape)
            blocks[key] = type.shape, type.numel, type.name

    @cache
    def sizes(shape):
        return tl.core.tuple(map(tl.constexpr, shape)), tl.constexpr(prod(shape))

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = sizes((*type.shape,) if type.is_block() else ())

    interpreter._get_np_dtype, tl.core.block_type.__init__, tl.core.tensor.__init__ = numpy_type, block, tensor
