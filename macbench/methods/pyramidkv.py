"""PyramidKV: SnapKV with more room in low layers than in high ones.

Cai, Zhang, Gao, Liu, Liu, Lu, Xiong, Dong, Chang, Hu, Xiao. arXiv:2406.02069. Public code (MIT): Zefan-Cai/KVCache-Factory.
"""

from dataclasses import dataclass

from macbench.methods.base import is_int, require
from macbench.methods.snapkv import SnapKV


@dataclass
class PyramidKV(SnapKV):
    """Scoring, decoding, modes of gqa and counting are SnapKV's; the prefix kept by layer l of n falls linearly. c = ``capacity`` is the mean.

        low = floor((c - W) / beta),   high = 2 (c - W) - low;   if high >= P - W: high = P - W, low = 2 (c - W) - high
        prefix_l = high - l * (high - low) / (n - 1),   and W tokens of the window;   c - W in every layer if P < 2 (c - W)

    ``mode`` harness: real-valued steps, rounded down, and the tokens that this leaves over go to the layers with the largest fractions, so that
    the mean is c. faithful: the step is rounded down, as in the public code (which divides by n - 1, unlike the paper), so that the
    mean exceeds c; the cache is stored once per query head.

    rho_bytes = (c + generated) / L (faithful: the sum over layers), the floor that of SnapKV.
    """

    capacity: int = 2048
    window: int = 8
    beta: int = 20

    def __post_init__(self):
        super().__post_init__()
        require(is_int(self.beta, 1), "method", "beta", self.beta, "an integer of at least 1")

    def prefix(self, layer, prompt):
        mean = self.capacity - self.window
        if prompt < 2 * mean or prompt < self.capacity:
            return min(prompt - self.window, mean)
        return self.schedule(prompt, self.shape.model_layers)[self.shape.first + layer]

    def kept(self, prompt, layers):
        prompt, mean = int(prompt), self.capacity - self.window
        if prompt < 2 * mean or prompt < self.capacity:
            return min(prompt, self.capacity)
        return sum(self.schedule(prompt, layers)) / layers + self.window

    def schedule(self, prompt: int, layers: int) -> list[int]:
        """Prefix tokens of every layer for a prompt that is long enough."""
        mean = self.capacity - self.window
        low = mean // self.beta
        high = 2 * mean - low
        if high >= prompt - self.window:
            high = prompt - self.window
            low = 2 * mean - high
        if layers == 1:
            return [mean]
        if self.mode == "faithful":
            return [high - layer * ((high - low) // (layers - 1)) for layer in range(layers)]
        ramp = [divmod(high * (layers - 1) - layer * (high - low), layers - 1) for layer in range(layers)]  # whole tokens, and what is left
        budget = [whole for whole, _ in ramp]
        largest = sorted(range(layers), key=lambda layer: -ramp[layer][1])  # ties to the lowest layer
        for layer in largest[: layers * mean - sum(budget)]:
            budget[layer] += 1
        return budget
