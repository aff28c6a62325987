"""The prompts of a trace: examples of other tasks, by their own settings."""

from omegaconf import OmegaConf

from macbench import cli, settings
from macbench.errors import ConfigError, choose
from macbench.tasks.base import Example, count

SOURCES = ("ruler", "longgenbench", "longbench_v2")


def examples(sources: dict, chat, ctx: int, seed: int, limit: int) -> list[tuple[str, Example]]:
    """(name of the task, example), ``limit`` of each subtask. ``sources``: task -> settings that differ from conf/task, perhaps
    a ``limit`` of its own; null leaves it out."""
    found = []
    for name, changes in sources.items():
        choose("task.sources", name, SOURCES)
        if changes is None:
            continue
        node = OmegaConf.to_container(cli.load_option("task", name), resolve=True)
        changes = dict(changes)
        most = min(limit, changes.pop("limit", limit))
        for key in changes:
            choose(f"task.sources.{name}", key, [k for k in node if k not in ("_target_", "name")])
        task = settings.build(OmegaConf.create(node | changes), f"task.sources.{name}", chat=chat, ctx=ctx, seed=seed)
        for subtask in task.subtasks:
            found += [(task.name, task.example(subtask, index)) for index in range(count(task, subtask, most))]
    if not found:
        raise ConfigError("task.sources", "{}", f"must name some of {', '.join(SOURCES)} with their settings")
    return found
