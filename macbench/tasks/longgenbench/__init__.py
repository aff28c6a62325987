"""LongGenBench: one text of 16K or 32K tokens in numbered parts, and whether the parts hold what was ordered for them.

Wu et al., LongGenBench: Benchmarking Long-Form Generation in Long Context LLMs (ICLR 2025), arXiv:2409.02076, earlier called Spinning
the Golden Thread. https://github.com/mozhu621/LongGenBench has no licence file: neither its data nor its code is part of this package.
Not the benchmark of the same name by Dominic789654, which packs many short questions into one prompt.
"""

from macbench.tasks.longgenbench.protocol import SCENARIOS
from macbench.tasks.longgenbench.task import LongGenBench

__all__ = ["SCENARIOS", "LongGenBench"]
