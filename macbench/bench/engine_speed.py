"""Our engine beside transformers' own generate on the CPU: same weights, same prompts, one process per peak-memory figure.

    python -m macbench.bench.engine_speed                 # prefill and decode at 2k and 4k, peak memory at 8k, load time
    python -m macbench.bench.engine_speed ctx=[1024] repeats=3

Both sides run full attention in float32 with SDPA. Sides alternate within each repeat and change order between repeats; medians.
"""

import json
import resource
import subprocess
import sys
from statistics import median
from time import perf_counter

from omegaconf import OmegaConf

DEFAULTS = {"ctx": [2048, 4096], "memory_ctx": 8192, "new_tokens": 24, "repeats": 5, "role": "compare"}


def load_side(role: str):
    """(prefill, decode, load seconds): prefill(ids) -> state; decode(state, ids, n)."""
    import torch
    from macbench_kernels import kernels

    from macbench.cli import load_option
    from macbench.engine import Engine
    from macbench.methods.full import Full
    from macbench.models.weights import load, load_chat

    began = perf_counter()
    spec = load_option("model", "smollm2")
    model = load(spec, "cpu", load_chat(spec))
    seconds = perf_counter() - began

    def ours(ids, new_tokens):
        engine = Engine(model.network, kernels("torch"), len(ids) + new_tokens)
        prompt = engine.prefill(ids)
        steps = engine.decode(prompt, Full(), new_tokens).step_seconds if new_tokens > 1 else []
        return prompt.seconds, [float(s) for s in steps]

    def theirs(ids, new_tokens):
        stamps = []

        class Clock:
            """Called after every generated token, as a streamer."""

            def put(self, value):
                stamps.append(perf_counter())

            def end(self):
                pass

        tensor = torch.tensor([ids])
        began = perf_counter()
        with torch.inference_mode():
            model.network.generate(
                tensor,
                attention_mask=torch.ones_like(tensor),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                eos_token_id=None,
                pad_token_id=0,
                do_sample=False,
                streamer=Clock(),
            )
        tokens = stamps[1:]  # the first call hands over the prompt
        return tokens[0] - began, [b - a for a, b in zip(tokens, tokens[1:], strict=False)]

    return {"macbench": ours, "transformers": theirs}[role], seconds, model.chat


def prompt_ids(chat, tokens: int) -> list[int]:
    text = chat.render("The quick brown fox jumps over the lazy dog. " * (tokens // 5))
    return list(chat.encode(text))[:tokens]


def compare(config) -> None:
    sides = {}
    for role in ("macbench", "transformers"):
        sides[role], seconds, chat = load_side(role)
    print(f"second load of smollm2: {seconds:.1f} s")
    print(f"{'ctx':>6} {'':>8} {'macbench':>10} {'transformers':>13} {'ratio':>6}")
    for ctx in config.ctx:
        ids = prompt_ids(chat, ctx - config.new_tokens)
        found = {role: ([], []) for role in sides}
        for repeat in range(config.repeats + 1):
            for role in sorted(sides, reverse=repeat % 2 == 1):
                prefill, steps = sides[role](ids, config.new_tokens)
                if repeat:  # the first round warms up
                    found[role][0].append(prefill)
                    found[role][1].extend(steps)
        for i, what, unit in ((0, "prefill", 1.0), (1, "decode", 1e3)):
            a, b = (median(found[role][i]) * unit for role in ("macbench", "transformers"))
            print(f"{ctx:>6} {what:>8} {a:>9.2f}{'s' if i == 0 else 'm'} {b:>12.2f}{'s' if i == 0 else 'm'} {a / b:>6.3f}")
    peaks = {}
    for role in ("macbench", "transformers"):
        command = [sys.executable, "-m", "macbench.bench.engine_speed", f"role={role}", f"memory_ctx={config.memory_ctx}"]
        peaks[role] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])["peak_gib"]
    a, b = peaks["macbench"], peaks["transformers"]
    print(f"{config.memory_ctx:>6} {'peak GiB':>8} {a:>10.2f} {b:>13.2f} {a / b:>6.3f}")


def main() -> None:
    config = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli())
    if config.role == "compare":
        compare(config)
        return
    side, _, chat = load_side(config.role)
    side(prompt_ids(chat, config.memory_ctx - 8), 8)
    print(json.dumps({"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


if __name__ == "__main__":
    main()
