"""Judge a finished run again, without generating again: ``python -m macbench.judge RUN [RUN ...] judge=llm judge.temperature=0``.

RUN is a folder that macbench.run wrote. Answers are kept beside it; the same judge is never asked the same question twice.
"""

import sys
from pathlib import Path

from omegaconf import OmegaConf

from macbench import cli
from macbench.errors import ConfigError, choose
from macbench.judging import judge_run, prepare
from macbench.models.weights import resolve_device
from macbench.records import read_table
from macbench.tasks.recorded import task_class

DEFAULT = "lexical"


def settings(overrides: list[str]):
    """The judge's node and the device, from ``judge=option``, ``judge.key=value`` and ``device=``."""
    given = OmegaConf.from_dotlist([text for text in overrides if not text.startswith("judge=")])
    named = [text.removeprefix("judge=") for text in overrides if text.startswith("judge=")]
    node = cli.load_option("judge", choose("judge", named[-1], cli.options("judge")) if named else DEFAULT)
    for key in given:
        choose("argument", str(key), ("judge", "device"))
    for key, value in given.get("judge", {}).items():
        node[choose(f"judge.{key}", str(key), [k for k in node if k not in ("_target_", "name")])] = value
    return node, resolve_device(given.get("device", "auto"))


def judged_class(run: Path):
    """The class of the task that a run was made with, which must be one with texts to judge."""
    found = task_class(run)
    if not hasattr(found, "checks"):
        raise ConfigError("RUN", run, f"is a run of task {found.__name__}, which needs no judge")
    return found


def judge(argv: list[str]) -> int:
    runs, overrides = [a for a in argv if "=" not in a], [a for a in argv if "=" in a]
    if not runs:
        raise ConfigError("RUN", "", "name a run folder: python -m macbench.judge RUN judge=lexical|llm|api")
    node, device = settings(overrides)
    tasks = [judged_class(Path(run)) for run in runs]
    for run in runs:
        if not any((Path(run) / "samples").glob("*.parquet")):
            raise ConfigError("RUN", run, "has no samples to judge")
    prepare(node)
    unjudged = [judge_run(run, task, read_table(run, "samples"), node, device) for run, task in zip(map(Path, runs), tasks, strict=True)]
    return 1 if any(unjudged) else 0


def main() -> None:
    try:
        code = judge(sys.argv[1:])
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("macbench: interrupted; answers are kept, the same command continues", file=sys.stderr)
        code = 130
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
