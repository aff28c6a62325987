"""What a training run needs to go on: low-rank terms, the optimiser's moments and the plan, in one safetensors file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from macbench.errors import ConfigError
from macbench.files import write_whole

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Place:
    """Where a run is: the next step, the share of all time that is spent, and the state of the plan of lengths (`Lengths.state`)."""

    step: int
    progress: float
    plan: dict


def save(path: Path, weights: dict[str, torch.Tensor], optimiser: torch.optim.Optimizer, place: Place) -> None:
    tensors = {}
    for name, weight in weights.items():
        tensors[name] = weight.detach()
        state = optimiser.state[weight]
        tensors |= {f"{name}:{moment}": state[moment] for moment in MOMENTS if state}
    header = {"place": json.dumps(asdict(place))}
    payload = serialise({name: x.contiguous().cpu() for name, x in tensors.items()}, metadata=header)
    write_whole(path, lambda file: file.write(payload))


@torch.no_grad()
def load(path: Path, weights: dict[str, torch.Tensor], optimiser: torch.optim.Optimizer) -> Place:
    """Fill weights and moments."""
    try:
        with safe_open(path, "pt") as file:
            place = Place(**json.loads(file.metadata()["place"]))
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("--resume", path, f"cannot be read as a checkpoint ({error})") from None
    if set(weights) - set(found):
        raise ConfigError("--resume", path, "is a checkpoint of another network")
    for name, weight in weights.items():
        weight.copy_(found[name])
        if f"{name}:{MOMENTS[0]}" in found:
            moments = {moment: found[f"{name}:{moment}"].to(weight) for moment in MOMENTS}
            optimiser.state[weight] = {"step": torch.tensor(float(place.step), device=weight.device), **moments}
    return place
