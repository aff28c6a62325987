"""Oracle top-k whose choice is free, under a name of its own: one comparison holds it beside the honest ``oracle_topk``."""

from dataclasses import dataclass

from macbench.methods.oracle_topk import OracleTopK


@dataclass
class OracleTopKIdeal(OracleTopK):
    """``OracleTopK`` that has no other ``count`` than ideal: the name in its rows says so."""

    count: str = "ideal"

    COUNTS = ("ideal",)
