"""What a RULER sample costs to make: seconds per sample beside those of the official generator.

python -m macbench.bench.ruler_generation --data-path FOLDER    (no model and no GPU; the tokenizer is SmolLM2's)
"""

import argparse
import statistics
import time

from macbench.errors import ConfigError
from macbench.models.chat import Chat
from macbench.models.smollm2 import converted
from macbench.tasks.ruler import SUBTASKS, Ruler

OFFICIAL_SOURCE = "official generator, one core of a two-core machine"
# Seconds per sample of NVIDIA/RULER's scripts with the SmolLM2 tokenizer, start-up excluded.
OFFICIAL = {
    "niah_single_1": {4096: 0.014, 32768: 0.12, 131072: 0.55},
    "niah_single_2": {4096: 0.032, 32768: 0.27, 131072: 1.14},
    "niah_multikey_2": {4096: 0.014, 32768: 0.15, 131072: 0.42},
    "niah_multikey_3": {4096: 0.007, 32768: 0.10, 131072: 0.48},
    "niah_multivalue": {4096: 0.035, 32768: 0.28, 131072: 1.08},
    "vt": {4096: 0.015, 32768: 0.08, 131072: 0.61},
    "cwe": {4096: 0.012, 32768: 0.11, 131072: 0.46},
    "fwe": {4096: 0.014, 32768: 0.17, 131072: 0.54},
    "qa_1": {4096: 0.011, 32768: 0.14, 131072: 0.39},
    "qa_2": {4096: 0.021, 32768: 0.18, 131072: 0.57},
}


def measure(task: Ruler, subtask: str, samples: int) -> tuple[float, float]:
    """Median seconds per sample over ``samples``, and the seconds that the first sample took longer."""
    seconds = []
    for index in range(samples + 1):
        start = time.perf_counter()
        task.example(subtask, index)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    return median, max(0.0, seconds[0] - median)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctx", type=int, nargs="+", default=[4096, 32768, 131072], help="context lengths, tokens")
    parser.add_argument("--samples", type=int, default=15, help="samples per task after the first one")
    parser.add_argument("--subtasks", nargs="+", default=list(SUBTASKS))
    parser.add_argument("--data-path", default=None, help="folder with the official data files, as task.data_path")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    chat = Chat(AutoTokenizer.from_pretrained(converted()))
    print(f"{'task':<16} {'ctx':>7} {'ours s':>9} {'start-up s':>11} {'official s':>11} {'ratio':>6}")
    for ctx in args.ctx:
        total = 0.0
        task = Ruler(chat, ctx, subtasks=args.subtasks, data_path=args.data_path)
        for subtask in task.subtasks:
            try:
                seconds, start_up = measure(task, subtask, args.samples)
            except ConfigError as error:
                print(f"{subtask:<16} {ctx:>7} {error}")
                continue
            total += start_up
            official = OFFICIAL.get(subtask, {}).get(ctx)
            beside = f"{official:>11.3f} {official / seconds:>5.0f}x" if official else f"{'-':>11} {'-':>6}"
            print(f"{subtask:<16} {ctx:>7} {seconds:>9.4f} {start_up:>11.3f} {beside}")
        print(f"{'all':<16} {ctx:>7} {'':>9} {total:>11.3f}")
    print(f"ours: median of {args.samples} samples after the first; official: {OFFICIAL_SOURCE}")


if __name__ == "__main__":
    main()
