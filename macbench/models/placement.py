"""Models larger than the GPU: ``model.device_map=auto`` leaves to accelerate which layers stay in host memory.

accelerate brings such a layer's weights to the GPU whenever it runs and drops them afterwards, so every attention happens on the GPU, where
the KV cache, rings and states of all layers are. That is slow, exact, and no way to measure latency.
"""

import torch

from macbench.errors import ConfigError

# GPU memory that weights leave for activations, besides the KV cache.
_ACTIVATIONS = 4 << 30


def check(spec, device: str) -> None:
    """Raises a ConfigError for a ``model.device_map`` that cannot be had."""
    wanted = spec.get("device_map")
    if wanted not in (None, "auto"):
        raise ConfigError("model.device_map", wanted, "must be null or auto")
    if wanted and device != "cuda":
        raise ConfigError("model.device_map", wanted, f"needs a GPU; with device={device} leave it null")


def options(spec, device: str, cache_bytes: int) -> dict:
    """For ``from_pretrained``; none without ``model.device_map``. ``cache_bytes``: memory that the KV cache will take."""
    check(spec, device)
    wanted = spec.get("device_map")
    if wanted is None:
        return {}
    gpu = torch.cuda.current_device()
    room = torch.cuda.mem_get_info(gpu)[0] - cache_bytes - _ACTIVATIONS
    if room <= 0:
        raise ConfigError("model.device_map", wanted, f"leaves no room for weights beside a KV cache of {cache_bytes >> 20} MiB; lower ctx or batch")
    return {"device_map": "auto", "max_memory": {gpu: room, "cpu": _host_memory()}}


def offloaded(network: torch.nn.Module) -> bool:
    """Whether some weights come and go, so that kernels cannot hold on to them."""
    return len(set(getattr(network, "hf_device_map", {}).values())) > 1


def compute_device(network: torch.nn.Module) -> torch.device:
    """Where a network's layers run, wherever its weights lie."""
    places = set(getattr(network, "hf_device_map", {}).values()) - {"cpu", "disk"}
    if len(places) > 1:
        raise ConfigError("model.device_map", "auto", f"spreads layers over {len(places)} GPUs, of which one can be used")
    if places:
        return torch.device("cuda", place) if isinstance(place := places.pop(), int) else torch.device(place)
    return torch.device("cpu") if offloaded(network) else network.device


def _host_memory() -> int:
    """Bytes of host memory that are free, less a tenth."""
    with open("/proc/meminfo") as file:
        facts = dict(line.split(":", 1) for line in file)
    return int(facts["MemAvailable"].split()[0]) * 1024 * 9 // 10
