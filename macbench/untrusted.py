"""A configuration out of somebody else's run folder, read without being run: bounded, no aliases, no references to be resolved."""

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from macbench.errors import ConfigError, one_line

_MOST = 1 << 16  # bytes; a resolved configuration has four thousand
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def configuration(run: Path) -> DictConfig:
    """``config.yaml`` of a run folder, which a run writes resolved; anything else is a ConfigError.

    A line of aliases to lines of aliases is gigabytes, and so is a reference to texts of references; ``${oc.env:...}`` reads secrets.
    """
    path = run / "config.yaml"
    try:
        size = path.stat().st_size
        if size > _MOST:
            raise ValueError(f"{path.name} has {size} bytes, at most {_MOST} are read")
        text = path.read_text()
        if "${" in text or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_LOADER)):
            raise ValueError(f"{path.name} has aliases or references")
        found = OmegaConf.create(text)
        if not isinstance(found, DictConfig):
            raise ValueError(f"{path.name} is no configuration")
        return found
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError("RUN", run, f"is not a run folder ({one_line(error)})") from None
