"""Models larger than a GPU: with ``model.device_map=auto`` accelerate places the layers.

Several visible GPUs share them, contiguous blocks of about the same size; a layer's attention runs where the layer lies, and so do its KV cache,
rings and states (see spread.py). On a single GPU, layers that do not fit stay in host memory: accelerate brings such a layer's weights to the GPU
whenever it runs and drops them afterwards, so every attention happens on the GPU. Both are exact, run without CUDA graphs and fused kernels,
and are no way to measure latency.
"""

from collections.abc import Callable

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


def options(spec, device: str, cache_bytes: int, skeleton: Callable[[], torch.nn.Module]) -> dict:
    """For ``from_pretrained``; none without ``model.device_map``. ``cache_bytes``: memory that the KV cache will take. ``skeleton``: makes the
    network without its weights."""
    check(spec, device)
    if spec.get("device_map") is None:
        return {}
    if torch.cuda.device_count() > 1:
        free = {gpu: torch.cuda.mem_get_info(gpu)[0] - _ACTIVATIONS for gpu in range(torch.cuda.device_count())}
        return {"device_map": shared_out(skeleton(), free, cache_bytes)}
    gpu = torch.cuda.current_device()
    room = torch.cuda.mem_get_info(gpu)[0] - cache_bytes - _ACTIVATIONS
    if room <= 0:
        raise ConfigError("model.device_map", "auto", f"leaves no room for weights beside a KV cache of {cache_bytes >> 20} MiB; lower ctx or batch")
    return {"device_map": "auto", "max_memory": {gpu: room, "cpu": _host_memory()}}


def shared_out(network: torch.nn.Module, free: dict[int, int], cache_bytes: int) -> dict[str, int]:
    """The GPU of every module, for GPUs with so many ``free`` bytes each. A layer's share of the KV cache goes where its weights go."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    kinds = list(network._no_split_modules)
    layers = [module for module in network.modules() if type(module).__name__ in kinds]
    weights = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())
    share = weights / (weights + cache_bytes)
    most = {gpu: max(0, int(room * share)) for gpu, room in free.items()}
    for limits in (get_balanced_memory(network, dict(most), kinds), most):  # as much on one as on the other, or else one after the other
        found = infer_auto_device_map(network, limits, no_split_module_classes=kinds)
        if not {"cpu", "disk"} & set(found.values()):
            return found
    said = (
        f"finds no room on {len(free)} GPUs for all layers and a KV cache of {cache_bytes >> 20} MiB; lower ctx or batch, take more GPUs, or one"
        " alone (CUDA_VISIBLE_DEVICES=0), which leaves in host memory what does not fit"
    )
    raise ConfigError("model.device_map", "auto", said)


def dispatched(network: torch.nn.Module) -> bool:
    """Whether accelerate moves weights or activations about, so that kernels cannot hold on to weights and no graph captures a step."""
    return len(set(_placed(network).values())) > 1


def compute_device(network: torch.nn.Module) -> torch.device:
    """Where a network's layers run, wherever its weights lie; of several devices the first."""
    places = [place for place in _placed(network).values() if place not in ("cpu", "disk")]
    if places:
        return _device(places[0])
    return torch.device("cpu") if dispatched(network) else network.device


def layer_devices(network: torch.nn.Module) -> tuple[torch.device, ...]:
    """Where each layer runs, if not all run on one device; else nothing."""
    placed, first = _placed(network), compute_device(network)
    found = []
    for layer in range(network.config.num_hidden_layers):
        name = f"{network.base_model_prefix}.layers.{layer}"
        while name and name not in placed:
            name = name.rpartition(".")[0]
        place = placed.get(name, "cpu")
        found.append(first if place in ("cpu", "disk") else _device(place))
    return tuple(found) if len(set(found)) > 1 else ()


def _placed(network: torch.nn.Module) -> dict:
    """Where accelerate has put modules, by name."""
    return getattr(network, "hf_device_map", {})


def _device(place: int | str | torch.device) -> torch.device:
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def _host_memory() -> int:
    """Bytes of host memory that are free, less a tenth."""
    with open("/proc/meminfo") as file:
        facts = dict(line.split(":", 1) for line in file)
    return int(facts["MemAvailable"].split()[0]) * 1024 * 9 // 10
