"""The story of a run: read the configuration, load model and task, prefill each example once, decode it with every method, record.

python -m macbench.run method=mac compare=[full] task=ruler ctx=4k limit=5
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from functools import partial as bind
from pathlib import Path

from macbench import interrupt  # isort: skip  (first of the slow ones: it answers Ctrl-C during the imports below)
import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from macbench_kernels import Kernels, UnsupportedError, kernels
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from macbench import asked, budget, cli, environment, experiment, judging, loggers, partial, settings, sweep
from macbench.asked import Asked
from macbench.engine import Engine
from macbench.errors import ConfigError, one_line
from macbench.generate import Made, answers, failure
from macbench.leases import Leases, leftovers
from macbench.models import placement
from macbench.models.chat import Chat
from macbench.models.fingerprint import hashes
from macbench.models.weights import LoadedModel, load, load_chat, max_context, planned_shape, resolve_device, resolve_dtype
from macbench.progress import rate
from macbench.recorder import Recorder
from macbench.records import KEY, RunDirectory, config_hash, engine_knobs, placeless, read_table
from macbench.redact import by_name, within
from macbench.rows import records
from macbench.settings import Variant
from macbench.summary import drift, generated, summarise
from macbench.tables import format_frame, format_summary, protocol_card
from macbench.tasks.base import Example, Task, count, guesses
from macbench.work import Work

# Where a run goes, how far it gets and where its data lies do not change what is measured; they are no part of its identity.
# Nor do judges: they read texts that are there already, and their verdicts lie in folders of their own.
OUTPUT_KEYS = ("runs_dir", "limit", "shard", "retry", "logger", "device", "judge")
LOCATION_KEYS = ("data_path", "data_sha256")
# Generated tokens per row of the table that shows drift over long generations.
DRIFT_WINDOW = 1000


def run(cfg: DictConfig) -> int:
    """One job. Returns the exit code: 0, or 1 if an example failed."""
    settings.check(cfg)
    if cfg.task.name == "attention":
        return run_attention(cfg)
    if cfg.task.name == "decode":
        return run_decode(cfg)
    if cfg.task.name == "trace":
        return run_trace(cfg)
    plan = prepare(cfg)
    if hasattr(plan.task, "checks"):
        judging.prepare(cfg.judge)  # a missing key or model shows now, not after an hour
    directory = RunDirectory(run_folder(cfg, plan))
    for note in plan.notes:
        print(f"macbench: note: {note}", file=sys.stderr)
    work = pending(cfg, plan, directory)
    directory.write_text(asked.FILE, plan.asked.text())
    if work:
        model = load(cfg.model, plan.device, plan.chat, cache_bytes(cfg, plan))
        engine = make_engine(cfg, plan.layer, plan.ctx, model)
        facts = environment.facts(plan.device, plan.layer.name, str(plan.dtype), hashes(cfg.model))
        for note in environment.continued(directory.path, facts):
            print(f"macbench: note: {note}", file=sys.stderr)
        directory.write_text("config.yaml", as_yaml(cfg))
        protocol = {"protocol": plan.task.protocol(), "identity": identity(cfg, plan)}
        directory.write_text("environment.json", environment.to_json(facts | protocol))
        with loggers.open_logger(cfg.logger, directory, OmegaConf.to_container(cfg, resolve=True)) as log:
            evaluate(engine, model, plan, work, directory, facts, log, cfg)
            table = report(directory, plan)
            log.summary(table)
            log.figures(directory.path)
    else:
        print("nothing left to compute: all examples are recorded", file=sys.stderr)
        if leftovers(directory.path):
            directory.tidy()
            partial.tidy(directory, len(plan.variants))
        table = report(directory, plan)
    for note in budget.misses(table, plan.variants):
        print(f"macbench: note: {note}", file=sys.stderr)
    failed = int(table.errors.where(table.subtask != "all", 0).sum())
    unjudged = 0
    if hasattr(plan.task, "checks"):
        unjudged = judging.judge_run(directory.path, plan.task, plan.asked.rows(directory.samples()), cfg.judge, plan.device)
    if failed:
        print(f"macbench: {failed} example(s) failed; their rows carry the error, retry=failed tries them again", file=sys.stderr)
    if unjudged:
        print(f"macbench: {unjudged} check(s) could not be judged; the same command, or python -m macbench.judge, asks again", file=sys.stderr)
    return 1 if failed or unjudged else 0


@dataclass
class Plan:
    """What a configuration comes to before any weights are read. ``resolved``: what its automatic values became."""

    ctx: int
    device: str
    dtype: torch.dtype
    layer: Kernels
    chat: Chat
    task: Task
    variants: list[Variant]
    asked: Asked
    resolved: dict
    notes: list[str]
    question_in_prefill: bool = True

    def example(self, subtask: str, index: int) -> Example:
        example = self.task.example(subtask, index)
        return replace(example, question=0) if self.question_in_prefill else example


def prepare(cfg: DictConfig) -> Plan:
    """Check everything that can be checked now: methods, task and its data, sizes."""
    ctx = cli.parse_ctx(cfg.get("ctx"))
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.model, device)
    placement.check(cfg.model, device)
    variants = settings.build_variants(cfg)
    layer = _kernels(cfg.backend, device)
    _fits(cfg, ctx)
    resolved = {"ctx": ctx, "dtype": str(dtype), "backend": layer.name}
    chat = load_chat(cfg.model)
    task = settings.build(cfg.task, "task", chat=chat, ctx=ctx, seed=cfg.seed)
    numbers = {subtask: count(task, subtask, cfg.limit) for subtask in task.subtasks}
    last = [task.example(subtask, number - 1) for subtask, number in numbers.items()]  # missing data shows now, not after an hour
    if not (cfg.question_in_prefill or any(example.question for example in last)):
        raise ConfigError("question_in_prefill", "false", f"needs a task whose questions follow a context; those of task={cfg.task.name} do not")
    floors: list[str] = []
    shape = planned_shape(cfg.model, dtype, device, ctx)
    if cfg.budget is not None:
        tokens, new = budget.expected(task, cfg.expect, cfg.question_in_prefill)
        variants, floors = budget.fit(cfg, variants, tokens, shape, new)
        resolved["fitted"] = [[v.name, v.label, v.knobs] for v in variants]
    for variant in variants:
        variant.method.check(shape)
    wanted = Asked(numbers, [[v.name, v.label] for v in variants])
    notes = [v.method.caution(ctx) for v in variants] + floors + [budget.untouched(variants) if cfg.budget is not None else None]
    return Plan(ctx, device, dtype, layer, chat, task, variants, wanted, resolved, list(dict.fromkeys(filter(None, notes))), cfg.question_in_prefill)


def target(cfg: DictConfig) -> Path:
    """Where a task with records of its own leaves them: a parquet file, or for task=trace a folder."""
    config = OmegaConf.to_container(cfg, resolve=True)
    if cfg.task.name == "trace":
        sources = config["task"]["sources"].items()
        config["task"]["sources"] = {name: own and {k: v for k, v in own.items() if k not in LOCATION_KEYS} for name, own in sources}
        kept = {key: value for key, value in config.items() if key not in OUTPUT_KEYS}
        name = config_hash(kept | {"limit": cfg.limit, "engine": engine_knobs(config["engine"])})
        return Path(cfg.runs_dir) / "trace" / model_name(cfg) / str(cli.parse_ctx(cfg.ctx)) / f"trace-{name}"
    task, method, contexts = _plain(cfg)
    if cfg.task.name == "attention":
        from macbench.attention import command

        resolved = command.resolve(task, method, contexts, cfg.backend, _bench_device(cfg))
        return command.target(cfg.runs_dir, method, contexts, resolved)
    dtype = resolve_dtype(cfg.model, resolve_device(cfg.device))
    rest = {key: OmegaConf.to_container(cfg, resolve=True)[key] for key in ("model", "seed")}
    task = {key: value for key, value in task.items() if key not in LOCATION_KEYS}
    name = config_hash({"task": task, "method": method, "ctx": contexts, "backend": cfg.backend, "dtype": str(dtype)} | rest)
    return Path(cfg.runs_dir) / "decode" / model_name(cfg) / f"{method['name']}-{name}.parquet"


def _plain(cfg: DictConfig) -> tuple[dict, dict, list[int]]:
    """Task, method and contexts of a benchmark of latency as plain values, ``batch`` and ``ctx`` of the command line in them."""
    settings.build_variants(cfg)  # the method's own checks of its knobs
    task, method = (OmegaConf.to_container(node, resolve=True) for node in (cfg.task, cfg.method))
    if cfg.batch is not None:
        task["batch"] = OmegaConf.to_container(cfg.batch) if OmegaConf.is_list(cfg.batch) else cfg.batch
    return task, method, [cli.parse_ctx(c) for c in (cfg.ctx if OmegaConf.is_list(cfg.ctx) else [cfg.ctx])]


def run_attention(cfg: DictConfig) -> int:
    """``task=attention``: no model and no prompts, the kernels alone on synthetic tensors."""
    from macbench.attention.command import run as measure

    task, method, contexts = _plain(cfg)
    return measure(task, method, contexts, cfg.backend, _bench_device(cfg), cfg.seed, cfg.runs_dir)


def _bench_device(cfg: DictConfig) -> str:
    """Kernels are timed on a GPU unless the CPU is asked for by name."""
    return "cuda" if cfg.device == "auto" else cfg.device


def run_decode(cfg: DictConfig) -> int:
    """``task=decode``: a model's decode step end to end, on real or synthetic prompts."""
    from macbench.latency.command import run as measure

    task, method, contexts = _plain(cfg)
    if cfg.model.get("device_map"):
        raise ConfigError("model.device_map", cfg.model.device_map, "must be null with task=decode, which measures latency")
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.model, device)
    facts = lambda: environment.facts(device, cfg.backend, str(dtype)) | {"task": task, "method": method}  # noqa: E731
    return measure(task, method, cfg.model, contexts, cfg.backend, device, dtype, cfg.seed, target(cfg), facts)


def run_trace(cfg: DictConfig) -> int:
    """``task=trace``: what MAC finds in texts of full attention."""
    from macbench.trace import command, prompts

    ctx, device = cli.parse_ctx(cfg.ctx), resolve_device(cfg.device)
    settings.build_variants(cfg)  # the method's own checks of its knobs
    task, method = (OmegaConf.to_container(node, resolve=True) for node in (cfg.task, cfg.method))
    command.check(task, method)
    if (target(cfg) / "config.yaml").exists():  # written last, when every text is there
        print(f"nothing left to compute: {target(cfg)} is there", file=sys.stderr)
        return 0
    layer, chat = _kernels(cfg.backend, device), load_chat(cfg.model)
    _fits(cfg, ctx)
    examples = prompts.examples(task["sources"], chat, ctx, cfg.seed, cfg.limit)
    model = load(cfg.model, device, chat)
    facts = environment.facts(device, layer.name, str(model.network.dtype)) | {"model": model_name(cfg), "ctx": ctx, "task": task, "method": method}
    return command.run(task, method, model, examples, make_engine(cfg, layer, ctx, model), target(cfg), facts, as_yaml(cfg))


def as_yaml(cfg: DictConfig) -> str:
    """The resolved configuration without secrets."""
    return OmegaConf.to_yaml(within(OmegaConf.to_container(cfg, resolve=True)))


def cache_bytes(cfg: DictConfig, plan: Plan) -> int:
    """Of the KV cache that the engine will make."""
    s = planned_shape(cfg.model, plan.dtype, plan.device, plan.ctx)
    return (cfg.batch or 1) * plan.ctx * s.layers * s.kv_row_bytes * s.kv_heads * plan.dtype.itemsize // 2


def make_engine(cfg: DictConfig, layer: Kernels, ctx: int, model: LoadedModel) -> Engine:
    batch = cfg.batch or 1
    try:
        return Engine(model.network, layer, ctx, cfg.engine.page_size, cfg.engine.prefill_chunk, batch, cfg.engine.graph, cfg.engine.batch_invariant)
    except UnsupportedError as error:
        raise ConfigError("engine.batch_invariant", True, str(error)) from error
    except (RuntimeError, MemoryError) as error:
        said = f"the KV cache of {batch} x {ctx} tokens does not fit into memory ({failure(error)}); lower batch or ctx"
        raise ConfigError("batch" if batch > 1 else "ctx", batch if batch > 1 else ctx, said) from error


def _kernels(backend: str, device: str):
    try:
        return kernels(backend, device)
    except UnsupportedError as error:
        raise ConfigError("backend", backend, str(error).removeprefix(f"backend={backend}").strip(": ")) from error


def _fits(cfg: DictConfig, ctx: int) -> None:
    most = max_context(cfg.model)
    if ctx > most:
        raise ConfigError("ctx", cfg.ctx, f"is {ctx} tokens, but model {model_name(cfg)} serves at most {most} with full attention")


def model_name(cfg: DictConfig) -> str:
    """Name for records: the option's, or the last part of ``model.path`` where that was changed."""
    own = cli.load_option("model", cfg.model.name).path
    return cfg.model.name if cfg.model.path == own else Path(str(cfg.model.path)).name


def identity(cfg: DictConfig, plan: Plan) -> dict:
    """Everything that can change a number but the task's protocol: the configuration and what its automatic values came to."""
    config = OmegaConf.to_container(cfg, resolve=True)
    found = {key: value for key, value in config.items() if key not in OUTPUT_KEYS} | {"engine": engine_knobs(config["engine"])} | plan.resolved
    found["task"] = {key: value for key, value in found["task"].items() if key not in LOCATION_KEYS}
    found["model"] = placeless(found["model"])
    return found


def run_name(cfg: DictConfig, plan: Plan) -> str:
    """<method>-<hash8>: the hash is over the run's ``identity`` and the protocol, which has the data's hashes."""
    return f"{cfg.method.name}-{config_hash(identity(cfg, plan) | {'protocol': plan.task.protocol()})}"


def run_folder(cfg: DictConfig, plan: Plan) -> Path:
    """runs/<task>/<model>/<ctx>/<method>-<hash8>."""
    return Path(cfg.runs_dir) / plan.task.name / model_name(cfg) / str(plan.ctx) / run_name(cfg, plan)


def pending(cfg: DictConfig, plan: Plan, directory: RunDirectory) -> Work:
    """The examples of this shard that are not recorded for every variant."""
    stamps = directory.stamps()
    done = directory.done(retry_failed=cfg.retry == "failed")

    def missing(subtask: str, index: int) -> bool:
        return any((v.name, v.label, subtask, str(index)) not in done for v in plan.variants)

    mine = settings.share(plan.asked.places(), cfg.shard)
    return Work(directory, [place for place in mine if missing(*place)], stamps)


def evaluate(engine: Engine, model: LoadedModel, plan: Plan, work: Work, directory: RunDirectory, facts: dict, log, cfg: DictConfig) -> None:
    """Make and record every missing example that no other process makes.

    A single example is on the disk before the next one begins, so that a kill costs one at most; its writing hides behind the making of
    the next prompt. A batch is written while the next one is prefilled.
    """
    task, variants = plan.task, plan.variants
    follow = getattr(task, "follow", cfg.follow)

    def record(group: list[tuple[str, int]], examples: list[Example], made: Made) -> list[list[dict]]:
        """Returns the sample rows of those that were recorded."""
        tables = {}
        for place, example, answered in zip(group, examples, made, strict=True):
            rows = records(engine.ctx, task, variants, example, answered, directory.run_id, engine.batch > 1)
            if not (leases.lost(work.left[place]) or work.made(place)):  # else who took it over, while this process slept too long, makes it
                tables[place] = rows
        if tables:
            directory.write_examples({work.left[place]: rows for place, rows in tables.items()}, facts)
        for place, example in zip(group, examples, strict=True):
            if place in tables:
                partial.clear(directory.path, example)
        return [rows["samples"] for rows in tables.values()]

    def finish(group: list[tuple[str, int]], recorded: list[list[dict]]) -> None:
        work.finished(leases, group)
        for rows in recorded:
            log.example(rows)

    with Leases(directory.path) as leases, tqdm(total=len(work), unit="example", dynamic_ncols=True) as bar, Recorder() as recorder:
        waiting = lambda left: bar.set_description(f"{left} left to other processes")  # noqa: E731
        for group in work.groups(leases, engine.batch, waiting, recorder.settle):
            examples = [plan.example(*place) for place in group]
            if engine.batch == 1:
                recorder.settle()
            bar.update(bar.total - len(work) - bar.n)  # others' as well
            bar.set_description(group[0][0])
            made = answers(engine, model, task, variants, examples, directory.path, lambda stage: rate(bar, stage), follow)
            recorder.put(bind(record, group, examples, made), bind(finish, group))
        bar.update(bar.total - bar.n)
    if leases.last:
        directory.tidy()
        partial.tidy(directory, len(variants))


def report(directory: RunDirectory, plan: Plan):
    """The final table, from parquet; printed and kept as summary.json. Then the task's own tables, and how long generations drift."""
    task, stamps = plan.task, None
    while stamps != (stamps := directory.stamps()):  # another process's last rows must not be missing from the table that stays
        samples = plan.asked.rows(directory.samples())
        table = summarise(samples, guesses(task, samples))
        directory.write_text(asked.FILE, plan.asked.text())  # another process may have asked for another number since this one began
        directory.write_text("summary.json", table.to_json(orient="records", indent=1))
    missing = len(plan.asked.places()) - samples.groupby(["subtask", "example_id"]).ngroups
    if missing:
        print(f"macbench: note: {missing} example(s) are left to other shards", file=sys.stderr)
    print(protocol_card(task.protocol()), file=sys.stderr)
    print(format_summary(table))
    more = task.tables(samples) if hasattr(task, "tables") else []
    if hasattr(task, "layer_tables"):
        more += task.layer_tables(read_table(directory.path, "layers").merge(samples[KEY], on=KEY))
    if (samples.decode_steps > DRIFT_WINDOW).any():
        more.append((f"by {DRIFT_WINDOW} generated tokens", drift(read_table(directory.path, "steps"), samples, DRIFT_WINDOW)))
    if (samples.get("question_steps", 0) > 0).any():
        more.append(("generated tokens alone, without the steps that process the question", generated(read_table(directory.path, "steps"), samples)))
    for title, frame in more:
        print(f"\n{title}\n{format_frame(frame)}")
    if more:
        tables = {title: frame.to_dict("records") for title, frame in more}
        directory.write_text("tables.json", json.dumps(tables, indent=1, default=float) + "\n")
    print(f"records: {directory.path}")
    return table


def _guarded(cfg: DictConfig) -> int:
    """One job, whatever happens to it, as an exit code."""
    interrupt.raise_again()
    try:
        return run(cfg)
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
    except OmegaConfBaseException as error:
        print(f"macbench: {ConfigError('configuration', error.full_key or '', str(error).splitlines()[0])}", file=sys.stderr)
    except OSError as error:  # a disk that is full, read-only or gone while a lease, a part or a log is written
        print(f"macbench: {ConfigError('runs_dir', error.filename or cfg.get('runs_dir'), one_line(error))}", file=sys.stderr)
    except KeyboardInterrupt as stop:
        print(interrupt.MESSAGE.decode(), end="", file=sys.stderr)
        return 143 if isinstance(stop, interrupt.Terminated) else 130
    return 2


def _job(cfg: DictConfig) -> None:
    """What Hydra calls."""
    try:
        code = _guarded(cfg)
    except Exception as error:
        error.of_a_job = True
        raise
    if code in (1, 2) and HydraConfig.get().mode == RunMode.MULTIRUN:
        sweep.note(code)  # the other jobs go on
    elif code:
        sys.exit(code)


_hydra_main = hydra.main(version_base="1.3", config_path=str(cli.CONF.resolve()), config_name="config")(_job)


def _by_hydra() -> None:
    """Where something is asked of Hydra itself. What it cannot do is one line as well."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # it raises, and prints no traceback
    try:
        _hydra_main()
    except Exception as error:
        if getattr(error, "of_a_job", False):
            raise
        asked_for = " ".join(a for a in sys.argv[1:] if "hydra" in a or a.startswith("-"))
        print(f"macbench: {ConfigError('hydra', asked_for, one_line(error))}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Entry point of ``macbench`` and ``python -m macbench.run``."""
    try:
        if experiment.asked(sys.argv[1:]):
            sys.exit(experiment.main(sys.argv[1:], _guarded))
        argv = sys.argv[1:] = cli.normalise(sys.argv[1:])
        cfg = cli.check(argv)
        folder = cli.sweep_folder(cfg) if cfg is not None and cli.sweeps(argv) else None
        if folder is not None:
            sweep.begin(folder)
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        sys.exit(2)
    code = 0
    if folder is not None:
        sys.argv[1:] = map(by_name, argv)
        try:
            _by_hydra()
        finally:
            code = sweep.end()
    elif cfg is None or any("hydra" in a for a in argv):
        _by_hydra()
    else:  # nothing is asked of Hydra that would need the configuration composed again, twice
        code = _guarded(cfg)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
