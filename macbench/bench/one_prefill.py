"""What a comparison costs: several methods on one prefill, beside as many runs of their own, and beside one prefill and the decodes alone.

    python -m macbench.bench.one_prefill model=smollm2_128k ctx=32768 device=cuda [methods=[quest,snapkv]] [new_tokens=128] [repeats=1]
        [data_path=DIR] [gguf=FILE] [adapter=DIR] [out=runs/reference/h100/one_prefill.parquet]

A real prompt (an essay to be continued), greedy, every method with its published settings. Before anything is timed, every method prepares for
the prompt and makes two tokens, which compiles its kernels and captures its step; all ways then use the same captured steps, so none of them
pays for that. Ways alternate and change order; medians. Rows: one per way and repeat, and of those parts that are timed by themselves; the
seconds of the warm-up have the way ``warm``. ``out`` is written after every way, so that what was measured is kept.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from time import perf_counter

import pyarrow as pa
from omegaconf import OmegaConf

from macbench.errors import ConfigError, choose

DEFAULTS = OmegaConf.create(
    {
        "model": "smollm2",
        "ctx": 4096,
        "new_tokens": 64,
        "methods": None,
        "device": "cpu",
        "backend": "auto",
        "data_path": None,
        "gguf": None,
        "adapter": None,
        "repeats": 1,
        "out": None,
    }
)
# ``way``: together, apart, parts, or warm (in no comparison); ``part``: empty for the whole of it, else prefill or a method.
SCHEMA = pa.schema([("way", pa.string()), ("part", pa.string()), ("repeat", pa.int64()), ("seconds", pa.float64())])


def measure(engine, ids: list[int], methods: dict, new_tokens: int, repeats: int, say=print, keep=lambda rows: None) -> list[dict]:
    """Rows of ``SCHEMA``. ``methods``: by name; ``ids``: the prompt. ``keep`` sees all rows so far whenever there are more."""

    def prefill(*wanted):
        return engine.prefill(ids, max(m.prompt_queries for m in wanted), column_sums=any(m.prompt_column_sums for m in wanted))

    def decode(prompt, tokens: int = new_tokens) -> Iterable[tuple[str, float]]:
        for name, method in methods.items():
            began = perf_counter()
            engine.decode(prompt, method, tokens)
            yield name, perf_counter() - began

    def together() -> list[tuple[str, float]]:
        prompt = prefill(*methods.values())
        list(decode(prompt))
        prompt.free()
        return []

    def apart() -> list[tuple[str, float]]:
        for method in methods.values():
            prompt = prefill(method)
            engine.decode(prompt, method, new_tokens)
            prompt.free()
        return []

    def parts() -> list[tuple[str, float]]:
        prompt = prefill(*methods.values())
        found = [("prefill", prompt.seconds), *decode(prompt)]
        prompt.free()
        return found

    rows = []

    def note(way: str, repeat: int, found: list[tuple[str, float]]) -> None:
        rows.extend({"way": way, "part": part, "repeat": repeat, "seconds": seconds} for part, seconds in found)
        keep(rows)

    prompt = prefill(*methods.values())
    say(f"first prefill {prompt.seconds:.2f} s")
    note("warm", 0, [("prefill", prompt.seconds)])
    for name, seconds in decode(prompt, 2):
        say(f"{name}: ready after {seconds:.1f} s")
        note("warm", 0, [(name, seconds)])
    prompt.free()
    ways = {"together": together, "apart": apart, "parts": parts}
    for repeat in range(repeats):
        for way in list(ways)[:: 1 if repeat % 2 else -1]:
            began = perf_counter()
            found = ways[way]()
            whole = sum(seconds for _, seconds in found) if found else perf_counter() - began
            note(way, repeat, [("", whole), *found])
            say(f"repeat {repeat}, {way}: {whole:.2f} s")
    return rows


def main(arguments: list[str]) -> None:
    from macbench_kernels import kernels

    from macbench.attention.__main__ import facts
    from macbench.attention.methods import METHODS
    from macbench.attention.table import write
    from macbench.cli import load_option
    from macbench.engine import Engine
    from macbench.latency.prompts import essays
    from macbench.models.weights import load, load_chat

    given = OmegaConf.from_dotlist(arguments)
    for key in given:
        choose(key, key, list(DEFAULTS))
    config = OmegaConf.merge(DEFAULTS, given)
    known = [name for name in METHODS if name != "full"]
    twelve = [name for name in known if name != "kivi_2bit"]  # another width of kivi
    methods = {name: METHODS[choose("methods", name, known)]() for name in config.methods or twelve}
    for key in ("repeats", "new_tokens"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise ConfigError(key, config[key], "must be an integer of at least 1")
    spec = load_option("model", config.model)
    spec.gguf = config.gguf
    if config.adapter:
        spec.adapter = config.adapter
    chat = load_chat(spec)
    engine = Engine(load(spec, config.device, chat).network, kernels(config.backend, config.device), config.ctx)
    (ids,) = essays(chat, config.data_path)(1, config.ctx - config.new_tokens)
    what = {"model": config.model, "prompt_tokens": len(ids), "new_tokens": config.new_tokens, "methods": list(methods)}

    def keep(rows: list[dict]) -> None:
        if config.out:
            write(rows, Path(config.out), facts(config.device, "macbench.bench.one_prefill") | what, SCHEMA)

    rows = measure(engine, ids, methods, config.new_tokens, config.repeats, lambda line: print(line, flush=True), keep)
    whole, separate, sums = (median(r["seconds"] for r in rows if r["way"] == way and not r["part"]) for way in ("together", "apart", "parts"))
    print(f"{len(methods)} methods, {len(ids)} prompt tokens, {config.new_tokens} new ones, {config.device}: {', '.join(methods)}")
    print(f"on one prefill {whole:.2f} s; one prefill and the decodes alone {sums:.2f} s ({whole / sums:.3f}); runs of their own {separate:.2f} s")
    print(f"ratio to runs of their own: {whole / separate:.3f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        print(f"macbench: {error}", file=sys.stderr)
        sys.exit(2)
