"""Presets: one per figure or table of the paper, each at three scales. ``+experiment=NAME`` on the command line of macbench.run comes here.

python -m macbench.run +experiment=fig4 scale=cpu [--dry-run] [data=DIR] [KEY=VALUE ...]
"""

import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from macbench import cli, interrupt, plan
from macbench.errors import ConfigError, choose, one_line
from macbench.tasks import hub

SCALES = ("cpu", "gpu", "paper")
EVERY = "all"  # every preset, one after the other
_HINT = "python -m macbench.run +experiment=fig4 scale=cpu"


def asked(argv: list[str]) -> bool:
    """Whether a command line is about a preset."""
    return any(a.lstrip("+").startswith("experiment=") for a in argv)


def load(name: str) -> dict:
    """A preset with everything that it takes over from another one (``like``) or another scale filled in."""
    preset = OmegaConf.to_container(cli.load_option("experiment", name))
    preset = load(preset["like"]) | preset if "like" in preset else preset
    return preset | {scale: preset[preset[scale]] for scale in SCALES if preset[scale] in SCALES}


def jobs(name: str, scale: str) -> list[str] | str:
    """Overrides of each command of a preset, or in a line why there is none."""
    return load(name)[choose("scale", scale, SCALES)]


def pace(name: str, scale: str) -> plan.Pace | None:
    """Seconds per cell that a preset notes for a scale, and whether they were measured at it."""
    preset = load(name)
    if scale not in preset.get("pace", {}):
        return None
    estimated = preset.get("estimated", {}).get(scale)
    same = next(other for other in SCALES if preset[other] == preset[scale])  # the first one with these commands
    return preset["pace"][scale], f"not measured: estimated from {estimated}" if estimated else f"measured with this preset at scale {same}"


def located(overrides: list[str], data: Path | None) -> list[str]:
    """``task.data_path`` for jobs whose task has a folder of its name in ``data``; for task=trace its sources', for task=decode RULER's."""
    if data is None:
        return []
    task = next(o.partition("=")[2] for o in overrides if o.startswith("task="))
    keys = {"task": "ruler" if task == "decode" else task}
    if task == "trace":  # RULER is a source of it always, others where the preset says so
        others = [name for name in ("longbench_v2", "longgenbench") if any(o.startswith(f"task.sources.{name}=") for o in overrides)]
        keys = {f"task.sources.{name}": name for name in ("ruler", *others)}
    return [f"++{key}.data_path={data / name}" for key, name in keys.items() if (data / name).is_dir()]


def configuration(overrides: list[str]) -> DictConfig:
    """The composed configuration; a mistake is a ConfigError."""
    return cli.check(cli.normalise(overrides))


def main(argv: list[str], run: Callable[[DictConfig], int]) -> int:
    """Run, or with --dry-run list, the commands of a preset. Returns the exit code, the worst of all commands'; a signal ends them all."""
    names, scale, data, rest, dry = _parse(argv)
    interrupt.raise_again()
    if dry:
        with hub.asked_once():
            return _each(names, scale, data, rest, lambda cfg, name: print(plan.describe(cfg, pace(name, scale), gpu=scale != "cpu")) or 0)
    return _each(names, scale, data, rest, lambda cfg, name: run(cfg))


def _each(names: list[str], scale: str, data: Path | None, rest: list[str], do: Callable[[DictConfig, str], int]) -> int:
    worst, seen = 0, set()
    for name in names:
        found = jobs(name, scale)
        print(f"== {name}: {load(name)['title']} (scale {scale})", flush=True)
        if isinstance(found, str):
            print(f"   not at this scale: {found}")
            continue
        for job in found:
            overrides = shlex.split(job)
            overrides += located(overrides, data) + rest
            print(f"-- python -m macbench.run {shlex.join(overrides)}", flush=True)
            if tuple(overrides) in seen:
                print("   the same run as above")
                continue
            seen.add(tuple(overrides))
            try:
                cfg = configuration(overrides)
                worst = max(worst, do(cfg, name))
                if worst > 128:  # a signal
                    return worst
            except ConfigError as error:
                print(f"macbench: {error}", file=sys.stderr)
                worst = 2
            except OmegaConfBaseException as error:
                print(f"macbench: {ConfigError('configuration', error.full_key or '', one_line(error))}", file=sys.stderr)
                worst = 2
            except KeyboardInterrupt:
                print(interrupt.MESSAGE.decode(), end="", file=sys.stderr)
                return 130
            except Exception as error:  # whatever it is, the other commands do not depend on it
                traceback.print_exc()
                print(f"macbench: this command failed ({type(error).__name__}: {one_line(error)}); the others go on", file=sys.stderr)
                worst = max(worst, 1)
    return worst


def _parse(argv: list[str]) -> tuple[list[str], str, Path | None, list[str], bool]:
    own, rest = {}, []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if equals and key.lstrip("+") in ("experiment", "scale", "data"):
            own[key.lstrip("+")] = value
        elif argument != "--dry-run":
            rest.append(argument)
    flags = [a for a in rest if a.startswith("-")]
    if flags:
        raise ConfigError("command line", flags[0], f"is no flag of a preset; there is --dry-run: {_HINT} --dry-run")
    if "scale" not in own:
        raise ConfigError("scale", "", f"must be one of {', '.join(SCALES)}: {_HINT}")
    choose("scale", own["scale"], SCALES)
    names = cli.options("experiment")
    chosen = own["experiment"].split(",")
    for name in chosen:
        choose("experiment", name, [*names, EVERY])
    data = Path(own["data"]) if "data" in own else None
    if data and not data.is_dir():
        raise ConfigError("data", data, "must be a folder with a folder per task: ruler, longbench_v2, longgenbench")
    return names if EVERY in chosen else chosen, own["scale"], data, rest, "--dry-run" in argv
