"""Where a run's summary goes besides parquet: wandb, offline by default, or nowhere."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd

from macbench.errors import choose
from macbench.redact import redact


class NoLogger:
    """Accepts everything, sends nothing."""

    def example(self, rows: list[dict]) -> None:
        """Sample rows of one finished example."""

    def summary(self, table: pd.DataFrame) -> None:
        """The final table."""


class WandbLogger(NoLogger):
    """One wandb run per command; scores and ratios as they come, the table at the end."""

    def __init__(self, run):
        self.run = run

    def example(self, rows):
        for row in rows:
            name = " ".join(filter(None, [row["method"], row["variant"]]))
            keys = ("score", "rho_log", "rho_phys", "rho_bytes", "hit_rate", "tpot_ms")
            self.run.log({f"{name}/{row['subtask']}/{k}": row[k] for k in keys if row.get(k) is not None})

    def summary(self, table):
        import wandb

        self.run.log({"summary": wandb.Table(dataframe=table)})
        for row in table.to_dict("records"):
            name = " ".join(filter(None, [row["method"], row["variant"], row["subtask"]]))
            self.run.summary.update({f"{name}/{k}": v for k, v in row.items() if isinstance(v, int | float) and v == v})


@contextmanager
def open_logger(cfg, directory, config: dict) -> Iterator[NoLogger]:
    """The logger of a ``conf/logger`` node. wandb failing to start costs a warning, never the run."""
    if cfg.name == "none":
        yield NoLogger()
        return
    choose("logger.mode", cfg.mode, ("offline", "online", "disabled"))
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        config, project, entity = json.loads(redact(json.dumps([config, cfg.project, cfg.entity], default=str)))
        # Its own description of the process would hold the command line, keys included; environment.json has what matters.
        quiet = wandb.Settings(x_disable_meta=True, console="off")
        run = wandb.init(project=project, entity=entity, mode=cfg.mode, dir=str(directory.path), name=directory.run_id, config=config, settings=quiet)
    except (OSError, wandb.Error) as error:
        print(f"macbench: wandb is off for this run ({str(error).splitlines()[0]})", file=sys.stderr)
        yield NoLogger()
        return
    with run:
        yield WandbLogger(run)
