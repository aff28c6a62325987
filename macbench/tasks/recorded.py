"""The task of a run folder, by its configuration: one of this package's, whatever the file says."""

from pathlib import Path

from hydra.utils import get_class
from omegaconf.errors import OmegaConfBaseException

from macbench.errors import ConfigError, one_line
from macbench.untrusted import configuration


def task_class(run: Path) -> type:
    """The class that a run's examples and scores come from. A run folder may be anybody's: it cannot name other code."""
    try:
        target = str(configuration(run).task._target_)
        if not target.startswith("macbench.tasks."):
            raise ValueError(f"task._target_={target} is no task of macbench")
        return get_class(target)
    except (OSError, ImportError, AttributeError, ValueError, OmegaConfBaseException) as error:
        raise ConfigError("RUN", run, f"is not a run folder ({one_line(error)})") from None
