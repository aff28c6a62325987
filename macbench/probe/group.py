"""The processes of one training: this one alone, or those that torchrun started, one a GPU, which add up their gradients."""

import os
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist


class Group:
    """Process ``rank`` of ``size``. Make it after other processes have been forked and before anything is on a GPU."""

    def __init__(self, device: str):
        self.size, self.rank, self.device = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)), device
        if self.size > 1:
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if device == "cuda" else "gloo")

    @property
    def leads(self) -> bool:
        """Whether this process decides, reports and writes."""
        return self.rank == 0

    def first(self, make: Callable[[], float]) -> float:
        """What ``make`` returns in the first process, in all of them: clocks differ."""
        if self.size == 1:
            return make()
        value = torch.tensor([make() if self.leads else 0.0], dtype=torch.float64, device=self.device)
        dist.broadcast(value, 0)
        return float(value)

    @torch.no_grad()
    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sum float32 tensors over the processes, in place and in one message."""
        if self.size > 1:
            tensors = list(tensors)
            joined = torch.cat([x.flatten() for x in tensors])
            dist.all_reduce(joined)
            for x, total in zip(tensors, joined.split([x.numel() for x in tensors]), strict=True):
                x.copy_(total.view_as(x))

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
