"""Where a run's summary goes besides parquet: wandb, offline by default, or nowhere."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from macbench.errors import choose, one_line
from macbench.redact import redact


class NoLogger:
    """Accepts everything, sends nothing."""

    def example(self, rows: list[dict]) -> None:
        """Sample rows of one finished example."""

    def summary(self, table: pd.DataFrame) -> None:
        """The final table."""

    def figures(self, folder: Path) -> None:
        """What ``make figures`` draws of the run in ``folder``."""


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

    def figures(self, folder):
        try:
            from analysis.figures import draw
            from analysis.records import Records
        except ImportError:
            return  # an installed package has no analysis
        import wandb

        with tempfile.TemporaryDirectory() as scratch:
            try:
                drawn = draw(Records(folder), Path(scratch))
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                print(f"macbench: note: no figures for wandb ({one_line(error)})", file=sys.stderr)
                return
            self.run.log({f"figures/{item.name}": wandb.Image(str(item.picture), caption=item.caption) for item in drawn if item.picture})
            self.run.log({f"tables/{item.name}": wandb.Table(dataframe=item.frame) for item in drawn if item.frame is not None})


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
