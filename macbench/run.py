"""The story of a run: read the configuration, load model and task, prefill each example once, decode it with every method, record.

python -m macbench.run method=mac compare=[full] task=ruler ctx=4k limit=5
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import time

from macbench import interrupt  # isort: skip  (first of the slow ones: it answers Ctrl-C during the imports below)
import hydra
import torch
from macbench_kernels import Kernels, UnsupportedError, kernels
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from macbench import budget, cli, environment, experiment, judging, loggers, partial, settings
from macbench.engine import Engine
from macbench.errors import ConfigError, one_line
from macbench.generate import Answer, answers
from macbench.models.chat import Chat
from macbench.models.weights import LoadedModel, load, load_chat, max_context, planned_shape, resolve_device, resolve_dtype
from macbench.records import RunDirectory, config_hash, read_table
from macbench.rows import layer_rows, sample_columns, step_rows
from macbench.settings import Variant
from macbench.summary import drift, summarise
from macbench.tables import format_frame, format_summary
from macbench.tasks.base import Example, Task, count, guesses

# Where a run goes, how far it gets and where its data lies do not change what is measured; they are no part of its identity.
# Nor do judges: they read texts that are there already, and their verdicts lie in folders of their own.
OUTPUT_KEYS = ("runs_dir", "limit", "logger", "device", "judge")
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
    ready = prepare(cfg)
    ctx, device, layer, task, variants = ready.ctx, ready.device, ready.layer, ready.task, ready.variants
    directory = RunDirectory(ready.folder)
    todo = pending(task, cfg.limit, variants, directory.done())
    cautions = [v.method.caution(ctx) for v in variants] + ready.floors + [budget.untouched(variants) if cfg.budget is not None else None]
    for note in dict.fromkeys(filter(None, cautions)):
        print(f"macbench: note: {note}", file=sys.stderr)
    if any(todo.values()):
        model = load(cfg.model, device, ready.chat)
        engine = _engine(cfg, model, layer, ctx)
        facts = environment.facts(device, layer.name, str(ready.dtype))
        directory.write_text("config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        directory.write_text("environment.json", environment.to_json(facts | {"protocol": task.protocol()}))
        with loggers.open_logger(cfg.logger, directory, OmegaConf.to_container(cfg, resolve=True)) as log:
            evaluate(engine, model, task, variants, todo, directory, facts, log, cfg.follow)
            table = report(directory, task, cfg.limit, variants)
            log.summary(table)
            log.figures(directory.path)
    else:
        print("nothing left to compute: all examples are recorded", file=sys.stderr)
        table = report(directory, task, cfg.limit, variants)
    for note in budget.misses(table, variants):
        print(f"macbench: note: {note}", file=sys.stderr)
    failed = int(table.errors.where(table.subtask != "all", 0).sum())
    unjudged = 0
    if hasattr(task, "checks"):
        unjudged = judging.judge_run(directory.path, task, asked(directory, task, cfg.limit, variants), cfg.judge, device)
    if failed:
        print(f"macbench: {failed} example(s) failed; their rows carry the error, the same command tries them again", file=sys.stderr)
    if unjudged:
        print(f"macbench: {unjudged} check(s) could not be judged; the same command, or python -m macbench.judge, asks again", file=sys.stderr)
    return 1 if failed or unjudged else 0


@dataclass
class Prepared:
    """What a run of a benchmark needs before it loads a model. ``floors``: notes on budgets that methods cannot meet."""

    ctx: int
    device: str
    dtype: torch.dtype
    layer: Kernels
    chat: Chat
    task: Task
    variants: list[Variant]
    floors: list[str]
    folder: Path


def prepare(cfg: DictConfig) -> Prepared:
    """Check and resolve everything that can be checked without the model's weights."""
    ctx = cli.parse_ctx(cfg.get("ctx"))
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.model, device)
    variants = settings.build_variants(cfg)
    layer = _kernels(cfg.backend, device)
    _fits(cfg, ctx)
    resolved = {"ctx": ctx, "dtype": str(dtype), "backend": layer.name}
    floors: list[str] = []
    if cfg.budget is not None:
        variants, floors = budget.fit(cfg, variants, ctx, planned_shape(cfg.model, dtype, device, ctx))
        resolved["fitted"] = [[v.name, v.label, v.knobs] for v in variants]
    chat = load_chat(cfg.model)
    task = settings.build(cfg.task, "task", chat=chat, ctx=ctx, seed=cfg.seed)
    for subtask in task.subtasks:
        task.example(subtask, count(task, subtask, cfg.limit) - 1)  # missing data or too small a ctx shows now, not after an hour

    if hasattr(task, "checks"):
        judging.prepare(cfg.judge)  # a missing key or model shows now, too
    return Prepared(ctx, device, dtype, layer, chat, task, variants, floors, run_folder(cfg, task, resolved))


def target(cfg: DictConfig) -> Path:
    """Where a task with records of its own leaves them: a parquet file, or for task=trace a folder."""
    config = OmegaConf.to_container(cfg, resolve=True)
    if cfg.task.name == "trace":
        sources = config["task"]["sources"].items()
        config["task"]["sources"] = {name: own and {k: v for k, v in own.items() if k not in LOCATION_KEYS} for name, own in sources}
        name = config_hash({key: value for key, value in config.items() if key not in OUTPUT_KEYS} | {"limit": cfg.limit})
        return Path(cfg.runs_dir) / "trace" / model_name(cfg) / str(cli.parse_ctx(cfg.ctx)) / f"trace-{name}"
    task, method, contexts = _plain(cfg)
    if cfg.task.name == "attention":
        from macbench.attention import command

        resolved = command.resolve(task, method, contexts, cfg.backend, _bench_device(cfg))
        return command.target(cfg.runs_dir, method, contexts, resolved)
    dtype = resolve_dtype(cfg.model, resolve_device(cfg.device))
    name = config_hash({"task": task, "method": method, "ctx": contexts, "backend": cfg.backend, "dtype": str(dtype)})
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
    if (target(cfg) / "texts.parquet").exists():
        print(f"nothing left to compute: {target(cfg)} is there", file=sys.stderr)
        return 0
    layer, chat = _kernels(cfg.backend, device), load_chat(cfg.model)
    _fits(cfg, ctx)
    examples = prompts.examples(task["sources"], chat, ctx, cfg.seed, cfg.limit)
    model = load(cfg.model, device, chat)
    facts = environment.facts(device, layer.name, str(model.network.dtype)) | {"model": model_name(cfg), "ctx": ctx, "task": task, "method": method}
    return command.run(task, method, model, examples, _engine(cfg, model, layer, ctx), target(cfg), facts, OmegaConf.to_yaml(cfg, resolve=True))


def _engine(cfg: DictConfig, model: LoadedModel, layer, ctx: int) -> Engine:
    batch = cfg.batch or 1
    try:
        return Engine(model.network, layer, ctx, cfg.engine.page_size, cfg.engine.prefill_chunk, batch, cfg.engine.graph)
    except (RuntimeError, MemoryError) as error:
        said = f"the KV cache of {batch} x {ctx} tokens does not fit into memory ({_one_line(error)}); lower batch or ctx"
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


def run_folder(cfg: DictConfig, task: Task, resolved: dict) -> Path:
    """runs/<task>/<model>/<ctx>/<method>-<hash8>: the hash is over everything that can change a number.

    That is the configuration, what its automatic values came to (``resolved``: ctx, dtype, backend) and the data's own hashes.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    identity = {key: value for key, value in config.items() if key not in OUTPUT_KEYS} | resolved | {"protocol": task.protocol()}
    identity["task"] = {key: value for key, value in identity["task"].items() if key not in LOCATION_KEYS}
    name = f"{cfg.method.name}-{config_hash(identity)}"
    return Path(cfg.runs_dir) / task.name / model_name(cfg) / str(resolved["ctx"]) / name


def pending(task: Task, limit: int, variants: list[Variant], done: set[tuple]) -> dict[str, list[int]]:
    """Indices of the examples of each subtask that are not recorded for every variant."""

    def missing(subtask: str, index: int) -> bool:
        return any((v.name, v.label, subtask, str(index)) not in done for v in variants)

    return {subtask: [i for i in range(count(task, subtask, limit)) if missing(subtask, i)] for subtask in task.subtasks}


def evaluate(engine: Engine, model: LoadedModel, task: Task, variants, todo, directory: RunDirectory, facts: dict, log, follow: int) -> None:
    """Make and record every missing example."""
    with tqdm(total=sum(map(len, todo.values())), unit="example", dynamic_ncols=True) as bar:
        for group in batched(examples(task, todo), engine.batch):
            bar.set_description(group[0].subtask)
            made = answers(engine, model, task, variants, list(group), directory.path, lambda stage: _rate(bar, stage), follow)
            for example, answered in zip(group, made, strict=True):
                tables = records(engine, task, variants, example, answered, directory.run_id)
                directory.write_example(f"{example.subtask}/{example.example_id}", tables, facts)
                partial.clear(directory.path, example)
                log.example(tables["samples"])
                bar.update()


def examples(task: Task, todo: dict[str, list[int]]) -> Iterator[Example]:
    for subtask, indices in todo.items():
        for index in indices:
            yield task.example(subtask, index)


def batched(items: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Lists of ``size`` items, the last one shorter."""
    items = iter(items)
    while group := list(islice(items, size)):
        yield group


def records(engine: Engine, task: Task, variants: list[Variant], example: Example, made: list, run_id: str) -> dict[str, list[dict]]:
    """The rows of the three tables from what each variant made of an example. A failure becomes a row with ``error``."""
    tables = {"samples": [], "steps": [], "layers": []}
    texts: dict[int, list[int]] = {}
    for i, (variant, answer) in enumerate(zip(variants, made, strict=True)):
        key = {"run_id": run_id, "method": variant.name, "variant": variant.label}
        key |= {"subtask": example.subtask, "example_id": example.example_id}
        row = key | {"task": task.name, "ctx": engine.ctx, "prompt_tokens": len(example.input_ids), "reference": list(example.references)}
        meta = dict(example.meta)
        if isinstance(answer, Answer):
            texts[i] = answer.generation.tokens
            meta |= {"earlier_texts": answer.earlier} if answer.earlier else {}
            meta |= {"resumed_at": answer.resumed_at} if answer.resumed_at else {}
            row |= {"text": answer.text, "score": task.score(example, answer.text), "prefill_s": answer.prefill_s}
            row |= {"prompt_tokens": answer.prompt_tokens} | sample_columns(answer.generation) | answer.fidelity
            tables["steps"] += step_rows(answer.generation, key)
            tables["layers"] += layer_rows(answer.generation, key)
        else:
            row["error"] = _one_line(answer)
        tables["samples"].append(row | {"meta": json.dumps(meta, default=str)})
    _mark_divergence(tables["samples"], variants, texts)
    return tables


def _mark_divergence(rows: list[dict], variants: list[Variant], texts: dict[int, list[int]]) -> None:
    """``first_divergence``: index of the first generated token that differs from full attention's; null if none does or full was not run."""
    full = next((texts[i] for i, v in enumerate(variants) if v.name == "full" and i in texts), None)
    for i, row in enumerate(rows):
        if full is not None and i in texts and texts[i] != full:
            shorter = min(len(full), len(texts[i]))
            row["first_divergence"] = next((j for j in range(shorter) if full[j] != texts[i][j]), shorter)


def _rate(bar: tqdm, stage: str):
    """Progress callback that shows tokens per second of a stage beside the bar."""
    began, tokens = time(), 0

    def progress(count: int) -> None:
        nonlocal tokens
        tokens += count
        bar.set_postfix_str(f"{stage} {tokens} tok, {tokens / max(time() - began, 1e-9):.0f} tok/s", refresh=tokens == count)

    return progress


def _one_line(error: Exception) -> str:
    hint = "; lower batch, engine.prefill_chunk or ctx" if isinstance(error, torch.OutOfMemoryError) else ""
    return f"{type(error).__name__}: {one_line(error) if str(error).strip() else ''}{hint}"


def asked(directory: RunDirectory, task: Task, limit: int, variants: list[Variant]):
    """Sample rows of the examples that this command asked for, in its order."""
    samples = read_table(directory.path, "samples")
    wanted = {(subtask, str(i)) for subtask in task.subtasks for i in range(count(task, subtask, limit))}
    samples = samples[[pair in wanted for pair in zip(samples.subtask, samples.example_id, strict=True)]]
    order = {(v.name, v.label): i for i, v in enumerate(variants)}
    rank = [order.get(pair, len(order)) for pair in zip(samples.method, samples.variant, strict=True)]
    place = {subtask: i for i, subtask in enumerate(task.subtasks)}
    return (
        samples.assign(_rank=rank, _place=samples.subtask.map(place))
        .sort_values(["_rank", "_place"], kind="stable")
        .drop(columns=["_rank", "_place"])
    )


def report(directory: RunDirectory, task: Task, limit: int, variants: list[Variant]):
    """The final table, from parquet; printed and kept as summary.json. Then the task's own tables, and how long generations drift."""
    samples = asked(directory, task, limit, variants)
    table = summarise(samples, guesses(task, samples))
    directory.write_text("summary.json", table.to_json(orient="records", indent=1))
    print(protocol_card(task.protocol()), file=sys.stderr)
    print(format_summary(table))
    more = task.tables(samples) if hasattr(task, "tables") else []
    if (samples.decode_steps > DRIFT_WINDOW).any():
        more.append((f"by {DRIFT_WINDOW} generated tokens", drift(read_table(directory.path, "steps"), samples, DRIFT_WINDOW)))
    for title, frame in more:
        print(f"\n{title}\n{format_frame(frame)}")
    if more:
        tables = {title: frame.to_dict("records") for title, frame in more}
        directory.write_text("tables.json", json.dumps(tables, indent=1, default=float) + "\n")
    print(f"records: {directory.path}")
    return table


def protocol_card(facts: dict) -> str:
    """One line of what a reader must know to repeat the numbers; environment.json has all of it."""

    def short(value: object) -> str:
        return f"{value[:12]}..." if isinstance(value, str) and len(value) > 60 else str(value)

    return "protocol: " + ", ".join(f"{key} {short(value)}" for key, value in facts.items() if not isinstance(value, dict | list))


def _guarded(cfg: DictConfig) -> None:
    interrupt.raise_again()
    try:
        code = run(cfg)
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        code = 2
    except OmegaConfBaseException as error:
        print(f"macbench: {ConfigError('configuration', error.full_key or '', str(error).splitlines()[0])}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(interrupt.MESSAGE.decode(), end="", file=sys.stderr)
        code = 130
    if code:
        sys.exit(code)


_hydra_main = hydra.main(version_base="1.3", config_path=str(cli.CONF.resolve()), config_name="config")(_guarded)


def main() -> None:
    """Entry point of ``macbench`` and ``python -m macbench.run``."""
    try:
        if experiment.asked(sys.argv[1:]):
            sys.exit(experiment.main(sys.argv[1:], run))
        sys.argv[1:] = cli.normalise(sys.argv[1:])
        cli.check(sys.argv[1:])
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        sys.exit(2)
    _hydra_main()


if __name__ == "__main__":
    main()
