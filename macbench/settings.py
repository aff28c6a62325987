"""From the composed configuration to checked values and objects; every mistake is a ConfigError that names its key."""

import importlib
import json
import re
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from omegaconf import DictConfig, OmegaConf

from macbench import cli
from macbench.errors import ConfigError, choose, one_of
from macbench.methods.base import Method
from macbench.output_error import Measured

# Largest number of examples per subtask; beyond it lists of pending examples would fill the memory.
MOST_EXAMPLES = 100_000
# Tasks without a model's own prompts, whose batch may be a list.
SYNTHETIC = ("attention", "decode")
# Tasks that run one method on their own terms.
ALONE = (*SYNTHETIC, "trace")
# What is about answers to examples, which those score none of. (A preset gives all its commands limit, retry and follow, too.)
_ANSWERS = ("shard", "question_in_prefill", "expect")


@dataclass
class Variant:
    """A method with fixed hyper-parameters; ``label`` tells variants of one method apart ('' if there is one).

    ``budget``: the rho_bytes that it was fitted to, ``knobs``: the hyper-parameters that this chose. ``measured``: the method, with the
    errors of its attention outputs.
    """

    name: str
    label: str
    method: Method
    budget: float | None = None
    knobs: dict[str, Any] = field(default_factory=dict)
    measured: Measured = field(init=False)

    def __post_init__(self):
        self.measured = Measured(self.method)


# Integers that every task has: smallest and largest.
_RANGES = {
    "limit": (1, MOST_EXAMPLES),
    "seed": (0, 2**63 - 1),
    "follow": (0, 2**20),
    "engine.page_size": (1, 2**16),
    "engine.prefill_chunk": (1, 2**31 - 1),
}


def check_numbers(cfg: DictConfig, *keys: str) -> None:
    """Of some keys that are integers."""
    for key in keys:
        value, (low, high) = _select(cfg, key), _RANGES[key]
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(key, value, f"must be an integer of at least {low} and at most {high}")


def check(cfg: DictConfig) -> None:
    """Types and ranges of everything that is not checked by whom it configures."""
    for group in ("method", "task", "model", "judge", "logger"):
        name = OmegaConf.select(cfg, f"{group}.name")
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(f"{group}.name", name, f"must be a plain name; {group} is one of {', '.join(cli.options(group))}")
    if cfg.task.name in ALONE:
        for key in ("compare", "grid"):
            if cfg.get(key):
                raise ConfigError(key, cfg[key], f"must be empty with task={cfg.task.name}, which measures the method beside full attention")
    if OmegaConf.select(cfg, "model.random") is not None and cfg.task.name not in SYNTHETIC:
        raise ConfigError("model", cfg.model.name, f"has random weights, which serve task=decode alone, not task={cfg.task.name}")
    check_numbers(cfg, *_RANGES)
    if cfg.task.name not in SYNTHETIC:
        _expect(cfg, "batch", "null or an integer of at least 1", lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and v >= 1))
    _expect(cfg, "retry", "null, or failed: examples that ended with an error are made again", lambda v: v in (None, "failed"))
    share([], cfg.get("shard"))
    _expect(cfg, "question_in_prefill", "true or false", lambda v: isinstance(v, bool))
    _expect(cfg, "compare", "a list of methods: compare=[full]", lambda v: isinstance(v, str) or OmegaConf.is_list(v))
    defaults = OmegaConf.load(cli.CONF / "config.yaml")
    of_models = sorted({key for name in cli.options("model") for key in cli.load_option("model", name)})
    for group, keys in (("engine", defaults.engine), ("model", of_models)):
        for key, value in cfg[group].items():
            if key not in keys:  # as +engine.key=value makes it
                raise ConfigError(f"{group}.{key}", value, f"no such key; must be one of {', '.join(keys)}")
    for key, value in cfg.engine.items():
        if cfg.task.name in SYNTHETIC and value != (fixed := defaults.engine[key]):
            said = f"must be {json.dumps(fixed)} with task={cfg.task.name}, whose task.modes=[graph,eager] choose how steps run"
            raise ConfigError(f"engine.{key}", value, said)
    for key in ("engine.graph", "engine.batch_invariant"):
        _expect(cfg, key, "true or false", lambda v: isinstance(v, bool))
    if cfg.engine.batch_invariant and cfg.task.name not in SYNTHETIC and (cfg.batch or 1) > 1:
        others = [name for name in (cfg.method.name, *_compared(cfg)) if name not in ("full", "mac")]
        if others:
            raise ConfigError(
                "engine.batch_invariant", True, f"serves full attention and MAC, not {', '.join(others)}; leave it false or take batch=1"
            )
    positive = isinstance(cfg.get("expect"), int) and not isinstance(cfg.expect, bool) and cfg.expect >= 1
    _expect(cfg, "expect", "null or an integer of at least 1", lambda v: v is None or positive)
    within = all(isinstance(b, int | float) and not isinstance(b, bool) and 0 < b <= 1 for b in budgets(cfg))
    _expect(cfg, "budget", "null, a number above 0 and at most 1 (rho_bytes), or a list of such numbers", lambda v: within and v != [])
    if cfg.task.name in ALONE:
        for key in _ANSWERS:
            allowed = f"{json.dumps(defaults[key])} with task={cfg.task.name}, which scores no answers"
            _expect(cfg, key, allowed, lambda v, key=key: v == defaults[key])
        _expect(cfg, "budget", f"null with task={cfg.task.name}, whose reads follow from no budget", lambda v: v is None)
    _expect(cfg, "runs_dir", "a folder", lambda v: isinstance(v, str) and v != "")
    _expect(cfg, "device", "auto, cpu or cuda", lambda v: isinstance(v, str))
    _expect(cfg, "backend", "auto, torch, triton or flashinfer", lambda v: isinstance(v, str))
    _expect(cfg, "grid", "parameters with lists of values: grid.tau=[0.3,0.45]", OmegaConf.is_dict)
    for key in ("path", "gguf", "revision", "adapter", "adapter_sha256"):
        _expect(cfg, f"model.{key}", "null or text", lambda v: v is None or (isinstance(v, str) and v != ""))


def share(items: list, shard: object) -> list:
    """Every n-th item, beginning with the i-th, for a shard ``i/n``; all of them without one."""
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", str(shard)) if shard is not None else None
    if shard is not None and (not found or int(found[1]) > int(found[2])):
        raise ConfigError("shard", shard, "must be null or i/n with i from 1 to n, such as 1/4 for the first of four shares")
    return items[int(found[1]) - 1 :: int(found[2])] if found else items


def budgets(cfg: DictConfig) -> list:
    """The values of ``budget``, one, several or none."""
    value = cfg.get("budget")
    return [] if value is None else list(dict.fromkeys(value)) if OmegaConf.is_list(value) else [value]


def _compared(cfg: DictConfig) -> list[str]:
    return [cfg.compare] if isinstance(cfg.compare, str) else list(cfg.compare)


def _select(cfg: DictConfig, key: str) -> Any:
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return node.get(leaf) if OmegaConf.is_dict(node) else None


def _expect(cfg: DictConfig, key: str, allowed: str, holds) -> None:
    value = _select(cfg, key)
    if not holds(value):
        raise ConfigError(key, value, f"must be {allowed}")


def build_variants(cfg: DictConfig) -> list[Variant]:
    """The method (one variant per point of ``grid``), then those of ``compare`` that are not the method itself."""
    grid = {key: list(value) if OmegaConf.is_list(value) else [value] for key, value in cfg.grid.items()}
    knobs = [key for key in cfg.method if key not in ("_target_", "name")]
    for key, values in grid.items():
        if not knobs:
            raise ConfigError(f"grid.{key}", cfg.grid[key], f"grid varies the chosen method alone, and method={cfg.method.name} has no knobs")
        if key not in knobs:
            raise ConfigError(f"grid.{key}", cfg.grid[key], f"{key} is no knob of method={cfg.method.name}; {one_of(key, knobs)}")
        if not values:
            raise ConfigError(f"grid.{key}", "[]", "must list at least one value")
    variants = []
    for point in product(*grid.values()):
        chosen = dict(zip(grid, point, strict=True))
        label = " ".join(f"{key}={value}" for key, value in chosen.items())
        variants.append(Variant(cfg.method.name, label, build(OmegaConf.merge(cfg.method, chosen), "method", Method)))
    compared = _compared(cfg)
    if cfg.task.name == "fidelity":
        if cfg.method.name == "full" and not set(compared) - {"full"}:
            raise ConfigError("method", "full", "is what task=fidelity measures others against; name another method, or several in compare")
        compared.append("full")
    for name in compared:
        node = cli.load_option("method", choose("compare", str(name), cli.options("method")))
        if node.name not in {v.name for v in variants}:
            variants.append(Variant(node.name, "", build(node, "method", Method)))
    return variants


def own_classes_only(cfg: DictConfig) -> None:
    """For a configuration that came with somebody else's run: it names classes of macbench, or a ConfigError does, before anything is imported."""
    for key in ("method", "task", "judge"):
        target = str(_select(cfg, f"{key}._target_"))
        if target != "None" and not target.startswith("macbench."):
            raise ConfigError(f"{key}._target_", target, "must be a class of macbench in a run that is verified")


def build(node: DictConfig, key: str, kind: type = object, **extra):
    """Instantiate a node's ``_target_``, a subclass of ``kind``, with its other keys but ``name``."""
    params = OmegaConf.to_container(node, resolve=True)
    target = params.pop("_target_", None)
    params.pop("name", None)
    module, _, name = str(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}._target_", target, f"cannot be imported ({error})") from error
    if not isinstance(found, type) or not issubclass(found, kind):
        raise ConfigError(f"{key}._target_", target, f"must be a class{f' derived from {kind.__name__}' if kind is not object else ''}")
    try:
        return found(**params, **extra)
    except TypeError as error:
        raise ConfigError(key, target, f"cannot be built: {error}") from error
