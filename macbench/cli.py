"""Manners of the command line: where the configuration lies, and one clear line for a wrong override before Hydra sees it."""

import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from macbench.errors import ConfigError, choose, one_line

_HERE = Path(__file__).parent
# In a wheel conf/ is installed inside the package; in a checkout it is its neighbour.
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"

_SWEEP = ("-m", "--multirun")

# The model where ctx is beyond the default one's positions and no model is named.
LONG_MODEL, DEFAULT_POSITIONS = "smollm2_128k", 8192


def options(group: str) -> list[str]:
    """Names of the YAML files of a configuration group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def groups() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


def load_option(group: str, name: str):
    """One group file as a config node."""
    return OmegaConf.load(CONF / group / f"{choose(group, name, options(group))}.yaml")


def normalise(argv: list[str]) -> list[str]:
    """``grid.tau=[..]`` adds a key that no YAML lists; Hydra wants that spelled ``++``, and ``-m`` before all overrides.

    A long ctx gets the model that serves it.
    """
    argv = [a for a in argv if a in _SWEEP] + [a for a in argv if a not in _SWEEP]
    argv = ["++" + a if a.startswith(("grid.", "grid=")) else a for a in argv]
    if _wants_long_model(argv):
        first = next(i for i, a in enumerate(argv) if a.startswith("ctx="))  # beside another override: argparse takes them from one place only
        argv.insert(first, f"model={LONG_MODEL}")
    return argv


def _wants_long_model(argv: list[str]) -> bool:
    """Whether any ctx is beyond the default model, no model was chosen, and the adapter of the long one is installed."""
    from macbench.models.lora import packaged

    if any(a.startswith(("model=", "model.path=")) for a in argv):
        return False
    contexts = [n for a in argv if a.startswith("ctx=") for n in re.findall(r"\b\d{1,18}[kK]?\b(?!\.)", a)]
    longest = max((parse_ctx(n) for n in contexts if int(n.rstrip("kK"))), default=0)
    return longest > DEFAULT_POSITIONS and packaged(load_option("model", LONG_MODEL).adapter).is_file()


def check(argv: list[str]) -> DictConfig | None:
    """The composed configuration, of a sweep that of its first job; a mistake in the overrides is a ConfigError. None: Hydra's own flags (--help,
    --cfg, ...) explain themselves."""
    if any(a.startswith("-") and a not in _SWEEP for a in argv):
        return None
    overrides = [a for a in argv if not a.startswith("-")]
    for text in overrides:
        _check_group(text)
    single = [_first_of_sweep(text) for text in overrides] if len(overrides) < len(argv) else overrides
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            return compose("config", overrides=single)
    except Exception as error:  # Hydra's and OmegaConf's own, and whatever else strange overrides of hydra.* make them raise
        raise _explain(error, single) from error


def sweeps(argv: list[str]) -> bool:
    """Whether a command line asks for several jobs."""
    return any(a in _SWEEP for a in argv)


def sweep_folder(config: DictConfig) -> Path:
    """Where Hydra notes a sweep; it is made."""
    folder = Path(str(config.runs_dir)) / ".sweep"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("runs_dir", config.runs_dir, f"cannot be written ({error.strerror})") from error
    return folder


def _parse(text: str):
    try:
        return OverridesParser.create().parse_override(text)
    except (OverrideParseException, HydraException, ValueError, RecursionError) as error:  # thousands of digits or brackets
        key, _, value = text.partition("=")
        raise ConfigError(key, value, "is not a valid override; write key=value, and quote values with spaces, commas or brackets") from error


def _first_of_sweep(text: str) -> str:
    override = _parse(text)
    if not override.is_sweep_override():
        return text
    return f"{override.input_line.split('=')[0]}={next(iter(override.sweep_string_iterator()))}"


def _check_group(text: str) -> None:
    override = _parse(text)
    key = override.key_or_group
    if key in groups():
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
        for value in values:
            choose(key, str(value), options(key))


def _explain(error: Exception, overrides: list[str]) -> ConfigError:
    text = str(error)
    found = re.search(r"Could not override '([^']+)'", text)
    if isinstance(error, ConfigCompositionException) and found:
        key = found.group(1)
        value = next((o.partition("=")[2] for o in overrides if o.lstrip("+~").startswith(key + "=")), "")
        node = OmegaConf.load(CONF / "config.yaml")
        parent, _, leaf = key.rpartition(".")
        if parent in groups():
            known = sorted({k for name in options(parent) for k in OmegaConf.load(CONF / parent / f"{name}.yaml")} - {"_target_"})
        elif parent:
            known = list(OmegaConf.select(node, parent) or [])
        else:
            known = sorted((set(node) - {"defaults", "hydra"}) | set(groups()))
        try:
            choose(key, leaf, known)
        except ConfigError as nearest:
            return ConfigError(key, value, "no such key; " + str(nearest).split(": ", 1)[1])
        return ConfigError(key, value, f"the chosen {parent or 'configuration'} has no such key")
    return ConfigError("command line", " ".join(overrides), one_line(error))


def parse_ctx(value: object) -> int:
    """Tokens of a context: an integer, or one with the suffix k = 1024."""
    found = re.fullmatch(r"(\d{1,18})([kK]?)", str(value).strip())
    tokens = int(found.group(1)) * (1024 if found.group(2) else 1) if found else 0
    if tokens < 1:
        raise ConfigError("ctx", value, "must be a positive integer, or one with k = 1024, such as 4096, 4k or 120k")
    return tokens
