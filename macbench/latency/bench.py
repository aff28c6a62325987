"""Rows of task=decode: every method on the same weights and cache, one after the other in one process."""

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from statistics import quantiles
from time import perf_counter

import torch
from macbench_kernels import UnsupportedError, kernels

from macbench.attention.timing import copy_bandwidth
from macbench.counting import READ_CATEGORIES
from macbench.engine import Engine
from macbench.errors import one_line
from macbench.generate import out_of_memory
from macbench.latency import peer
from macbench.latency.breakdown import USED, breakdown
from macbench.latency.synthetic import SyntheticMAC
from macbench.methods.full import Full
from macbench.methods.mac import MAC

_WARM = 4  # steps before the clock starts
# What transformers' ``generate`` says where it has no row of numbers.
NOT_TIMED = ("not on a CPU: generate is timed on a CUDA device", "only at batch 1: generate tells when each token of one request arrives")
COLUMNS = (
    "model", "random_weights", "synthetic", "method", "backend", "forward", "mode", "ctx", "batch", "window", "band", "tau",
    "hit_rate", "misses", "hit_rate_measured", "steps", "prefill_s", "first_token_s", "tpot_ms", "tpot_p50_ms", "tpot_p95_ms", "tokens_per_s",
    "attention_ms", "products_ms", "rest_ms", "device_ms", "weight_bytes", "read_bytes", "floor_ms", "over_floor", "over_full", "over_flashinfer",
    "peak_bytes", "kv_bytes", "state_bytes", "over_memory_floor", "copy_bandwidth", "error",
)  # fmt: skip


def measure(
    network: torch.nn.Module,
    name: str,
    random_weights: bool,
    ctx: Iterable[int] = (32768,),
    batch: Iterable[int] = (1,),
    hit_rate: Iterable[float | str] = (0, 0.9, 0.99),
    misses: str = "random",
    backends: Iterable[str] = ("triton", "flashinfer"),
    modes: Iterable[str] = ("graph",),
    steps: int = 64,
    prefill: bool = False,
    generate: bool = False,
    mac: MAC | None = None,
    max_gap: int = 64,
    prompts: Callable[[int, int], list[list[int]]] | None = None,
    backend: str = "auto",
    seed: int = 42,
    say=lambda row: None,
) -> list[dict]:
    """One row per method, see ``COLUMNS``; a failed measurement is a row with ``error``.

    ``prompts(batch, tokens)`` -> token ids, for real prompts; without it, requests hold ``ctx`` random rows of K and V. ``mac``: the method
    with its knobs, or None for full attention only. ``hit_rate``: numbers (synthetic), or 'real' with real prompts. ``say`` gets each row when
    it is done.

    ``prefill_s``: seconds of the prefill of one prompt, the mean of a batch, after a warm-up of two chunks. ``first_token_s``: from the begin of the
    first prefill until the last request has its first token, which the logits of its prefill give: prompts of a batch are prefilled one after
    the other, so all their seconds together; None where fewer prompts were prefilled than decode. Of ``generate`` it is what its first call in
    a process takes, cold.
    """
    device = str(network.device.type)
    ceiling = _ceiling(device)  # one figure per process
    weights = weight_bytes(network)
    rows: list[dict] = []
    facts = {"model": name, "random_weights": random_weights, "copy_bandwidth": ceiling, "weight_bytes": weights}
    for tokens in ctx:
        for size in batch:
            group: list[dict] = []
            options = (tokens, size, tuple(hit_rate), misses, tuple(backends), tuple(modes), steps, prefill, generate, mac, max_gap, prompts)
            for row in _cell(network, *options, backend, seed):
                row = dict.fromkeys(COLUMNS) | facts | {"ctx": tokens, "batch": size} | row
                _derive(row, group)
                group.append(row)
                say(row)
            rows += group
    return rows


def _ceiling(device: str) -> float | None:
    """Copy bandwidth in bytes per second; None on a CPU, and where a card is too full to measure it."""
    try:
        return copy_bandwidth(device)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print("macbench: note: no room for the 4 GiB whose copy is timed; rows have no floor", file=sys.stderr)
        return None


def weight_bytes(network: torch.nn.Module) -> int:
    """Bytes of the weights that every decode step reads: all but the input embedding, unless it is also the output's.

    Of a mixture of experts, as many experts as a token is sent to.
    """
    inputs, outputs = network.get_input_embeddings().weight, network.get_output_embeddings().weight
    config = network.config
    share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    total = 0
    for key, weight in network.named_parameters():
        if weight is inputs and inputs is not outputs:
            continue
        total += weight.nbytes * (share if ".experts." in key else 1)
    return int(total)


def stored_bytes(network: torch.nn.Module) -> int:
    """Bytes of all weights; what two of them share counts once."""
    return sum(p.nbytes for p in {p.data_ptr(): p for p in network.parameters()}.values())


def over_memory(peak: int, apart: int, weights: int, kv: int) -> float:
    """Peak memory less what is told ``apart`` (rings and the benchmark's own queries), over weights, K and V; all in bytes."""
    return (peak - apart) / (weights + kv)


def positions(ctx: int, steps: int) -> int:
    """Tokens that a request comes to in one cell: ``ctx``, warm-up steps, ``steps`` that are timed, and those of the breakdown."""
    return ctx + _WARM + steps + USED + 1


def excused(error: str) -> bool:
    """Whether a row's error says that something is not there or does not apply, which is no failure."""
    return "not installed" in error or any(said in error for said in NOT_TIMED)


def _cell(network, ctx, size, hit_rates, misses, backends, modes, steps, prefill, generate, mac, max_gap, prompts, backend, seed) -> Iterator[dict]:
    device = network.device
    total = positions(ctx, steps)
    if generate:
        row = {"method": "full", "backend": "generate", "forward": "transformers", "mode": "compiled", "steps": steps, "synthetic": False}
        yield row | _guard(lambda: _generate(network, ctx, size, steps, prompts, seed))
    for mode in modes if device.type == "cuda" else modes[:1]:  # a CPU captures nothing: all modes are the same there
        label = {"mode": mode if device.type == "cuda" else "cpu"}
        for kind in backends:
            yield (
                label
                | {"method": "full", "backend": kind, "synthetic": prompts is None}
                | _guard(lambda kind=kind, mode=mode: _run(network, kind, total, size, mode, Full(), ctx, steps, prefill, prompts, seed))
            )
        for rate in hit_rates if mac is not None else ():
            synthetic = rate != "real"
            knobs = {"window": mac.window, "band": mac.band, "tau": mac.tau}
            method = (SyntheticMAC if synthetic else MAC)(**vars_of(mac))
            made = {"hit_rate": float(rate), "misses": misses if 0 < rate < 1 else "none"} if synthetic else {}
            load = (rate, misses, max_gap) if synthetic else None
            yield (
                label
                | {"method": "mac", "backend": backend, "synthetic": synthetic}
                | knobs
                | made
                | _guard(
                    lambda method=method, mode=mode, load=load: _run(
                        network, backend, total, size, mode, method, ctx, steps, False, prompts, seed, load
                    )
                )
            )


def vars_of(mac: MAC) -> dict:
    """The hyper-parameters of a method."""
    return {name: getattr(mac, name) for name in mac.__dataclass_fields__}


def _guard(function: Callable[[], dict]) -> dict:
    try:
        return function()
    except UnsupportedError as error:
        return {"error": one_line(error)}
    except (RuntimeError, ValueError, MemoryError) as error:
        hint = "; lower batch or ctx" if out_of_memory(error) else ""
        return {"error": f"{type(error).__name__}: {one_line(error)}{hint}"}
    finally:
        gc.collect()  # decoders and what they attend with know each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _run(network, backend, total, size, mode, method, ctx, steps, prefill, prompts, seed, load=None) -> dict:
    """One method on one engine of its own, so that peak memory is its own."""
    cuda = network.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    engine = Engine(network, kernels(backend, network.device), total, batch=size, graph=mode == "graph")
    made: dict = {"backend": engine.kernels.name, "forward": engine.forward.name}
    if cuda and not engine.captures:
        made["mode"] = "eager"
    decoder = engine.decoder(method, size)
    torch.manual_seed(seed)
    with torch.inference_mode():
        if prompts is None:
            for storage in (engine.pool.k, engine.pool.v):
                for layer in storage:
                    layer.normal_()
        if prefill and prompts is None:
            ids = torch.randint(0, network.config.vocab_size, (ctx,)).tolist()
            engine.prefill(ids[: min(ctx, 2 * engine.chunk)]).free()  # warm
            prompt = engine.prefill(ids)
            made["prefill_s"] = prompt.seconds
            made["first_token_s"] = prompt.seconds if size == 1 else None
            prompt.free()
        if prompts is not None:
            texts = prompts(size, ctx)
            if cuda:
                engine.prefill(texts[0][: 2 * engine.chunk], method.prompt_queries).free()  # warm
            ready = [engine.prefill(ids, method.prompt_queries) for ids in texts]
            made["first_token_s"] = sum(p.seconds for p in ready)
            made["prefill_s"] = made["first_token_s"] / len(ready)
            decoder.start(ready)
            decoder.tokens.copy_(torch.tensor([p.first_token for p in ready]))
            decoder.cache.reserve(total - ctx - 1)
        else:
            decoder.start_at(ctx, total - ctx - 1)
            if load is not None:
                method.load(ctx, total - ctx, *load, seed)
        feed = method.feed if load is not None else lambda: None
        made |= spread(_clocked(decoder, _WARM + steps, feed)[_WARM:], size)
        if cuda:
            made["peak_bytes"] = torch.cuda.max_memory_allocated()
        made |= breakdown(engine, decoder, made["tpot_p50_ms"], feed) if mode == "graph" else {}
        counts = decoder.ledger.counts()
        decoder.stop()
    timed = {key: values[_WARM : _WARM + steps] for key, values in counts.items()}
    read = sum(int(timed[f"bytes_{c}"].sum()) for c in READ_CATEGORIES) / steps * network.dtype.itemsize / 2
    matched = int(timed["match_heads"].sum())
    pool, s = engine.pool, engine.shape
    kv = size * -(-total // pool.page_size) * pool.page_size * s.layers * s.kv_heads * s.head_dim * 2 * network.dtype.itemsize
    state = sum(buffer.nbytes for buffer in method._buffers.values())
    made |= {
        "read_bytes": int(read), "kv_bytes": kv, "state_bytes": state, "hit_rate_measured": int(timed["hits"].sum()) / matched if matched else None,
    }  # fmt: skip
    if cuda:
        stream = getattr(method, "stream", None)  # the benchmark's own queries are no part of the method
        extra = state + (stream.untyped_storage().nbytes() if stream is not None else 0)
        made["over_memory_floor"] = over_memory(made["peak_bytes"], extra, stored_bytes(network), kv)
    return made


def spread(seconds: list[float], batch: int) -> dict:
    """Mean, median and 95th percentile of steps in which ``batch`` requests get a token each, and tokens per second."""
    cuts = quantiles(seconds, n=20, method="inclusive")
    mean = sum(seconds) / len(seconds)
    return {
        "steps": len(seconds), "tpot_ms": 1e3 * mean, "tpot_p50_ms": 1e3 * cuts[9], "tpot_p95_ms": 1e3 * cuts[18], "tokens_per_s": batch / mean,
    }  # fmt: skip


def _clocked(decoder, count: int, feed: Callable[[], None]) -> list[float]:
    """Seconds of steps, each from the host's preparations until its tokens are on the host; ``feed`` is called before each."""
    seconds = []
    for _ in range(count):
        feed()
        began = perf_counter()
        decoder.before()
        decoder.step()
        decoder.chosen.tolist()
        seconds.append(perf_counter() - began)
    return seconds


def prompt_ids(vocab: int, size: int, ctx: int, prompts: Callable[[int, int], list[list[int]]] | None, seed: int) -> torch.Tensor:
    """[size, n], what ``generate`` is given: the prompts that the engine gets, or ``ctx`` random ids where that gets none."""
    if prompts is not None:
        return torch.tensor(prompts(size, ctx))
    return torch.randint(0, vocab, (size, ctx), generator=torch.Generator().manual_seed(seed))


def _generate(network, ctx: int, size: int, steps: int, prompts, seed: int) -> dict:
    if network.device.type != "cuda" or size > 1:
        raise UnsupportedError(NOT_TIMED[size > 1 and network.device.type == "cuda"])
    ids = prompt_ids(network.config.vocab_size, size, ctx, prompts, seed).to(network.device)
    torch.cuda.reset_peak_memory_stats()
    skip = 8
    found = peer.generate(network, ids, steps + skip + 1, skip)
    return spread(found["seconds"], size) | {"first_token_s": found["first"], "peak_bytes": torch.cuda.max_memory_allocated()}


def _derive(row: dict, group: list[dict]) -> None:
    """Floor (bytes over the measured copy bandwidth), and ratios to full attention by our kernels and by FlashInfer's in the same mode."""
    if row["tpot_ms"] is None:
        return
    if row["read_bytes"] and row["copy_bandwidth"]:
        row["floor_ms"] = (row["weight_bytes"] + row["read_bytes"]) / row["copy_bandwidth"] * 1e3
        row["over_floor"] = row["tpot_p50_ms"] / row["floor_ms"]
    for column, backend in (("over_full", "triton"), ("over_flashinfer", "flashinfer")):
        full = next((r for r in [*group, row] if r["method"] == "full" and r["backend"] == backend and r["mode"] == row["mode"]), None)
        if full is None and column == "over_full":
            full = next((r for r in [*group, row] if r["method"] == "full" and r["backend"] == "torch"), None)
        if full is not None and full["tpot_p50_ms"]:
            row[column] = row["tpot_p50_ms"] / full["tpot_p50_ms"]
