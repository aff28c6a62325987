"""KIVI with 2 bits, under a name of its own: one comparison holds it beside the 4 bits of ``kivi``."""

from dataclasses import dataclass

from macbench.methods.kivi import KIVI


@dataclass
class KIVI2Bit(KIVI):
    """``KIVI`` that has no other ``bits`` than 2, whatever the budget: the name in its rows says so."""

    bits: int = 2

    BITS = (2,)
