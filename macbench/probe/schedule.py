"""How long the sequences of a step are, and how large its learning rate is, as functions of the share of the time that is spent.

Time on one H100 (SmolLM2-135M, bf16, nothing recomputed but feed-forward layers at 128K), a fit to measured steps of 65,536 tokens: linear
layers and the rest 3.5 us a token, causal attention of n tokens 3.5 * 34,560 * n^2 flop forward and backward at 425 TFLOP/s (cuDNN). Half as
many tokens a part, and two parts a step, give twice the steps up to 32K in the same time on two GPUs. With ``STEP_TOKENS`` tokens a part:

    length        4K    8K    16K   32K   64K   128K
    rows          8     4     2     1     1     1
    s, fitted     0.15  0.19  0.27  0.42  1.45  5.4
    s of 500      62    74    80    98    100   85    (by PHASES)
    steps         402   386   300   234   69    16
"""

import math
from dataclasses import dataclass, field

STEP_TOKENS = 32768
# (end of the phase as a share of all time, {tokens of a sequence: share of the phase's time})
PHASES = (
    (0.10, {4096: 0.6, 8192: 0.4}),
    (0.30, {4096: 0.15, 8192: 0.25, 16384: 0.35, 32768: 0.25}),
    (0.55, {4096: 0.06, 8192: 0.14, 16384: 0.20, 32768: 0.30, 65536: 0.30}),
    (1.00, {4096: 0.04, 8192: 0.05, 16384: 0.09, 32768: 0.16, 65536: 0.28, 131072: 0.38}),
)
WARMUP, FLOOR = 0.03, 0.03  # share of the time in which the rate rises; what is left of it at the end


def learning_rate(progress: float, peak: float) -> float:
    """Linear from 0 to ``peak`` over ``WARMUP``, then a cosine down to ``FLOOR * peak`` at progress 1."""
    if progress < WARMUP:
        return peak * progress / WARMUP
    x = min((progress - WARMUP) / (1 - WARMUP), 1.0)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * x)))


def seconds(length: int, rows: int) -> float:
    """Estimated time of a step on one H100 (see above)."""
    return rows * (3.5e-6 * length + 3.5 * 34560 * length**2 / 4.25e14)


@dataclass
class Lengths:
    """Chooses the length of each step so that every length gets its share of the phase's time.

    ``longest``: longer ones are left out. ``parts``: of a step, one after the other. ``cost``: seconds of a step by length, an estimate at
    first, then measured; ``spent``: seconds planned so far in the current phase.
    """

    longest: int = 131072
    step_tokens: int = STEP_TOKENS
    phases: tuple = PHASES
    parts: int = 1
    cost: dict[int, float] = field(default_factory=dict)
    spent: dict[int, float] = field(default_factory=dict)
    phase: int = -1

    def __post_init__(self):
        known = {length for _, shares in self.phases for length in shares}
        self.cost = {length: self.parts * seconds(length, self.rows(length)) for length in known} | self.cost

    def rows(self, length: int) -> int:
        return max(self.step_tokens // length, 1)

    def next(self, progress: float, left: float = math.inf) -> int | None:
        """The length that lacks most of its share at ``progress``, of those that take at most ``left`` seconds; None if none does."""
        number = next((i for i, (end, _) in enumerate(self.phases) if progress < end), len(self.phases) - 1)
        if number != self.phase:
            self.phase, self.spent = number, {}
        shares = {length: share for length, share in self.phases[number][1].items() if length <= self.longest}
        fitting = [length for length in shares if self.cost[length] <= left]
        if not fitting:
            return None
        # The step after which the time spent on a length, by its share, is the least.
        length = min(fitting, key=lambda length: ((self.spent.get(length, 0.0) + self.cost[length] / 2) / shares[length], length))
        self.spent[length] = self.spent.get(length, 0.0) + self.cost[length]
        return length

    def measured(self, length: int, took: float) -> None:
        """Learn from a step's time."""
        self.cost[length] += 0.3 * (took - self.cost[length])

    def state(self) -> dict:
        """What a checkpoint keeps: JSON values."""
        return {"phase": self.phase, "spent": dict(self.spent), "cost": dict(self.cost)}

    def restore(self, state: dict) -> None:
        self.phase = state["phase"]
        self.spent, self.cost = ({int(length): took for length, took in state[key].items()} for key in ("spent", "cost"))
