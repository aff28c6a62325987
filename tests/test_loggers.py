"""wandb gets the figures of a run, and a run without anything to draw costs nothing."""

import wandb

from macbench.loggers import WandbLogger
from tests.analysis.test_numbers import REFERENCE


class Log:
    """Takes the place of a wandb run."""

    def __init__(self):
        self.entries: dict = {}

    def log(self, entries: dict) -> None:
        self.entries |= entries


def test_figures_and_tables_of_a_run():
    (run,) = (REFERENCE / "cpu" / "ruler" / "smollm2" / "4096").iterdir()
    log = Log()
    WandbLogger(log).figures(run)
    (picture,) = [value for name, value in log.entries.items() if name.startswith("figures/fig1")]
    assert isinstance(picture, wandb.Image)
    assert isinstance(log.entries["tables/table1"], wandb.Table)


def test_nothing_to_draw(tmp_path):
    log = Log()
    WandbLogger(log).figures(tmp_path)
    assert log.entries == {}
