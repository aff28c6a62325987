"""RULER, thirteen synthetic long-context tasks: needles in a haystack, variable tracking, word frequencies, questions over documents.

Hsieh et al., 2024. https://github.com/NVIDIA/RULER (Apache-2.0). The official words are data in protocol.py, everything else is written
for this package: prompts are put together from pieces whose tokens are known (pieces.py), which makes a sample of 128K tokens a
matter of milliseconds, fills the context exactly (fit.py) and makes every sample a function of task, seed and index alone (rng.py).
"""

from macbench.tasks.ruler.protocol import SUBTASKS
from macbench.tasks.ruler.task import Ruler

__all__ = ["SUBTASKS", "Ruler"]
