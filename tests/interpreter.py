"""Triton's interpreter patches triton.language anew at every call of a device function, which takes longer than most of what it then interprets."""

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """Within a launch, a module of the language is patched at its first use alone; the end of a launch restores it as ever."""
    patch, scopes, patched = interpreter._patch_lang, interpreter._LangPatchScope, set()
    restore = scopes.restore

    def first(fn):
        asked = {id(tl), id(tl.core)} & set(map(id, fn.__globals__.values()))
        if asked <= patched:
            return scopes()
        patched.update(asked)
        return patch(fn)

    def forget(scope):
        patched.clear()
        restore(scope)

    interpreter._patch_lang, scopes.restore = first, forget
