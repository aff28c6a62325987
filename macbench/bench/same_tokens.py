"""Do a captured step, an eager step and a batch of requests write the same greedy text? SmolLM2, prompts of RULER.

python -m macbench.bench.same_tokens [prompts=16] [new_tokens=64] [ctx=4096] [device=cuda] [batch=16] [gguf=FILE]

Each way is compared with batch 1, eager. Where a text differs, the gap between the two largest logits at that step says how near a tie was.
"""

import torch
from omegaconf import OmegaConf

DEFAULTS = OmegaConf.create(
    {"methods": ["full", "mac"], "prompts": 16, "new_tokens": 64, "ctx": 4096, "device": "cuda", "batch": 16, "backend": "auto", "gguf": None}
)


def main() -> None:
    from macbench_kernels import kernels

    from macbench.cli import load_option
    from macbench.engine import Engine, Request
    from macbench.methods.full import Full
    from macbench.methods.mac import MAC
    from macbench.models.weights import load, load_chat
    from macbench.tasks.ruler import Ruler

    config = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli())
    spec = load_option("model", "smollm2")
    spec.gguf = config.gguf
    chat = load_chat(spec)
    network = load(spec, config.device, chat).network
    tasks = ("niah_single_1", "niah_multikey_2", "vt", "cwe")
    ruler = Ruler(chat, config.ctx, subtasks=list(tasks))
    prompts = [ruler.example(tasks[i % 4], i // 4).input_ids[: config.ctx - config.new_tokens] for i in range(config.prompts)]
    ways = {"eager": (1, False), "graph": (1, True), "batch, eager": (config.batch, False), "batch, graph": (config.batch, True)}
    print(f"{len(prompts)} prompts, {config.new_tokens} greedy tokens, ctx {config.ctx}, {next(network.parameters()).dtype}, {config.device}")
    for name, method in {"full": Full(), "mac": MAC()}.items():
        if name not in config.methods:
            continue
        want, gaps = [], []
        for way, (size, graph) in ways.items():
            engine = Engine(network, kernels(config.backend, config.device), config.ctx, batch=size, graph=graph)
            made: list[list[int]] = []
            for start in range(0, len(prompts), size):
                ready = [engine.prefill(list(ids), method.prompt_queries) for ids in prompts[start : start + size]]
                seen: list[float] = []

                def watch(step, logits, seen=seen, size=size):
                    if size == 1:
                        top = logits[0].topk(2).values
                        seen.append(float(top[0] - top[1]))

                made += [g.tokens for g in engine.decode_batch([Request(p, config.new_tokens) for p in ready], method, watch=watch)]
                for prompt in ready:
                    prompt.free()
                if way == "eager":
                    gaps.append(seen)
            want = want or made
            pairs = [list(zip(x, y, strict=True)) for x, y in zip(made, want, strict=True)]
            first = [next((i for i, (a, b) in enumerate(pair) if a != b), None) for pair in pairs]
            differing = [(i, at) for i, at in enumerate(first) if at is not None]
            told = ", ".join(f"{i} from token {at} (gap {gaps[i][at - 1]:.3f})" for i, at in differing)
            same = f"{len(prompts) - len(differing)} of {len(prompts)}"
            print(f"{name:<5} {way:<13} same text: {same}{'; prompt ' + told if told else ''}", flush=True)
            del engine
        steps = torch.tensor([gap for seen in gaps for gap in seen])
        near = float((steps < 0.1).float().mean())
        print(f"{name:<5} gap between the two largest logits: median {steps.median():.2f}, below 0.1 at {near:.1%} of steps")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
