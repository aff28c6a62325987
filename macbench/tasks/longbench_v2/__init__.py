"""LongBench v2: 503 multiple-choice questions about real long texts, up to two million words.

Bai et al., LongBench v2: Towards Deeper Understanding and Reasoning on Realistic Long-context Multitasks (2024), arXiv:2412.15204.
https://github.com/THUDM/LongBench (MIT). Prompts, limits and answer patterns are data in protocol.py; what is done with them is ours.
"""

from macbench.tasks.longbench_v2.protocol import SUBTASKS
from macbench.tasks.longbench_v2.task import LongBenchV2

__all__ = ["SUBTASKS", "LongBenchV2"]
