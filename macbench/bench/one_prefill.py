"""What a comparison costs: several methods on one prefill, beside as many runs of their own, and beside one prefill and the decodes alone.

    python -m macbench.bench.one_prefill model=smollm2_128k ctx=32768 device=cuda [new_tokens=128] [data_path=DIR] [gguf=FILE] [repeats=3]

A real prompt (an essay to be continued), greedy, every method with its published settings. Ways alternate and change order; medians.
"""

from statistics import median
from time import perf_counter

from omegaconf import OmegaConf

DEFAULTS = OmegaConf.create(
    {
        "model": "smollm2",
        "ctx": 4096,
        "new_tokens": 64,
        "device": "cpu",
        "backend": "auto",
        "data_path": None,
        "gguf": None,
        "adapter": None,
        "repeats": 3,
    }
)


def main() -> None:
    from macbench_kernels import kernels

    from macbench.attention.methods import METHODS
    from macbench.cli import load_option
    from macbench.engine import Engine
    from macbench.latency.prompts import essays
    from macbench.models.weights import load, load_chat

    config = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli())
    spec = load_option("model", config.model)
    spec.gguf = config.gguf
    if config.adapter:
        spec.adapter = config.adapter
    chat = load_chat(spec)
    network = load(spec, config.device, chat).network
    engine = Engine(network, kernels(config.backend, config.device), config.ctx)
    (ids,) = essays(chat, config.data_path)(1, config.ctx - config.new_tokens)
    methods = {name: make() for name, make in METHODS.items() if name != "full"}

    def prefill(*wanted):
        return engine.prefill(ids, max(m.prompt_queries for m in wanted), column_sums=any(m.prompt_column_sums for m in wanted))

    def together() -> float:
        began = perf_counter()
        prompt = prefill(*methods.values())
        for method in methods.values():
            engine.decode(prompt, method, config.new_tokens)
        prompt.free()
        return perf_counter() - began

    def apart() -> float:
        began = perf_counter()
        for method in methods.values():
            prompt = prefill(method)
            engine.decode(prompt, method, config.new_tokens)
            prompt.free()
        return perf_counter() - began

    def parts() -> float:
        """Each part timed by itself and added up."""
        prompt = prefill(*methods.values())
        seconds = prompt.seconds
        for method in methods.values():
            began = perf_counter()
            engine.decode(prompt, method, config.new_tokens)
            seconds += perf_counter() - began
        prompt.free()
        return seconds

    ways = {"together": together, "apart": apart, "parts": parts}
    found: dict[str, list[float]] = {name: [] for name in ways}
    together()  # compiles, captures
    for repeat in range(config.repeats):
        for name in list(ways)[:: 1 if repeat % 2 else -1]:
            found[name].append(ways[name]())
    whole, separate, sums = (median(found[name]) for name in ways)
    print(f"{len(methods)} methods, {len(ids)} prompt tokens, {config.new_tokens} new ones, {config.device}: {', '.join(methods)}")
    print(f"on one prefill {whole:.2f} s; one prefill and the decodes alone {sums:.2f} s ({whole / sums:.3f}); runs of their own {separate:.2f} s")
    print(f"ratio to runs of their own: {whole / separate:.3f}")


if __name__ == "__main__":
    main()
