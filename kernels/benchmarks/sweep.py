"""Time variants of the kernels' knobs on a GPU, by CUDA-graph replay over several layers: python kernels/benchmarks/sweep.py full mac parts

full: tiles, stages, warps and programs per multiprocessor of the persistent kernel. mac: the same for a whole step with and without
early launches. parts: how much of a step each of its three launches takes.
"""

import itertools
import sys
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
from macbench_kernels import MacParams, triton_attend, triton_mac, triton_match
from macbench_kernels.triton_spans import MAC

from macbench.attention.problem import Cell, Problem, Stream
from macbench.attention.timing import copy_bandwidth, rounds


def timed(run, layers, before=lambda i: None, count=13, warm=3) -> float:
    """Median microseconds per layer."""
    run(0)

    def everything():
        for layer in range(layers):
            run(layer)

    return rounds(everything, before, count, layers, "graph", warm)["time_ms"] * 1e3


def knobs(blocks=(64, 128), stages=(3, 5, 7), warps=(4,), occupancy=(1, 2, 3)):
    for block, stage, warp, each in itertools.product(blocks, stages, warps, occupancy):
        yield {"block": block, "stages": stage, "warps": warp, "occupancy": each}


def attempt(label, bytes_, run, layers, **options):
    try:
        time = timed(run, layers, **options)
        print(f"{label:<90} {time:9.2f} us  {bytes_ / time / 1e6:5.2f} TB/s", flush=True)
    except Exception as error:  # a knob that does not fit the machine is a result as well
        print(f"{label:<90} {type(error).__name__} {str(error).splitlines()[0][:80]}", flush=True)


def full(cells, variants) -> None:
    for heads, batch, ctx, layers in cells:
        problem = Problem(Cell(*heads, batch, ctx), "cuda", layers, 4, 0)
        for variant in variants:
            attempt(
                f"full {heads} b={batch} {ctx} {variant}", problem.cell.cache_bytes,
                lambda layer, v=variant, p=problem: triton_attend.attend_full(p.q[layer], p.cache, layer, p.cell.scale, p.cell.dtype, **v), layers,
            )  # fmt: skip


def mac(cells, variants, rates=(1.0,), early=(True, False)) -> None:
    for heads, batch, ctx, layers in cells:
        problem = Problem(Cell(*heads, batch, ctx), "cuda", layers, 14, 0)
        cell, rings = problem.cell, None
        params = MacParams(cell.tau * (2 * cell.head_dim) ** 0.5, cell.band)
        for rate in rates:
            stream = Stream(problem, rate, "random", rings)
            rings = stream.rings
            inputs = stream.queries[0].clone()
            for variant, on in itertools.product(variants, early):
                problem.rewind()
                with (
                    mock.patch.object(triton_match, "dependent_launch", lambda device, on=on: on),
                    mock.patch.object(triton_attend, "dependent_launch", lambda device, on=on: on),
                    mock.patch.object(triton_mac, "dependent_launch", lambda device, on=on: on),
                ):
                    attempt(
                        f"mac h={rate} {heads} b={batch} {ctx} early={on} {variant}", cell.hit_bytes,
                        lambda layer, v=variant: triton_mac.mac_step(
                            inputs[layer], problem.q[layer], problem.cache, layer, rings[layer], params, cell.scale, **v
                        ),
                        layers, before=lambda i: inputs.copy_(stream.queries[i]),
                    )  # fmt: skip


def parts(cells) -> None:
    """Differences between a step that stops after one, two and three launches (nothing is appended in the first two)."""
    for heads, batch, ctx, layers in cells:
        problem = Problem(Cell(*heads, batch, ctx), "cuda", layers, 14, 0)
        cell = problem.cell
        stream = Stream(problem, 1.0, "none")
        radius = cell.tau * (2 * cell.head_dim) ** 0.5
        q, rings = stream.queries[0], stream.rings

        def scan(layer):
            return triton_match.scan(q[layer], rings[layer], problem.cache.lengths, -1, radius, cell.band, None, 0)

        def two(layer):
            return triton_attend.Pieces(
                problem.q[layer], problem.cache, layer, cell.scale, MAC, 1,
                keys=scan(layer)[0], radius=radius, capacity=cell.window, band=cell.band, sink=0,
            )  # fmt: skip

        attempt(f"scan       {heads} b={batch}", cell.hit_bytes, scan, layers)
        for split in (1, 2, 4, 16, 32):
            with mock.patch.object(triton_match, "PROGRAMS_PER_PROCESSOR", split):
                attempt(f"scan       {heads} b={batch} programs per processor {split}", cell.hit_bytes, scan, layers)
        attempt(f"scan+share {heads} b={batch}", cell.hit_bytes, two, layers)


def main(what: list[str]) -> None:
    print(f"copy {copy_bandwidth('cuda') / 1e12:.3f} TB/s", flush=True)
    eight, four = (32, 8), (32, 4)
    if "full" in what:
        few = [{"block": 64, "stages": s, "occupancy": o} for s, o in ((3, 2), (5, 1), (5, 2))]
        full([(eight, 1, 130048, 3), (eight, 1, 32768, 20), (four, 1, 130048, 4), (four, 1, 32768, 40), (eight, 16, 32768, 1)], few)
    if "mac" in what:
        few = [{"block": 64, "stages": s, "occupancy": o} for s, o in ((3, 2), (3, 3), (5, 1), (5, 2))]
        cells = [(eight, 1, 32768, 38), (eight, 16, 32768, 3), (eight, 64, 16384, 1)]
        mac(cells, few, rates=(1.0, 0.97, 0.0), early=(True,))
    if "slices" in what:  # of the merging programs: tile in elements, fewest channels
        for elements, thinnest in ((512, 16), (1024, 16), (512, 32), (1024, 32)):
            print(f"merging tiles of {elements} elements, at least {thinnest} channels")
            with mock.patch.object(triton_attend, "_MERGE_ELEMENTS", elements), mock.patch.object(triton_attend, "_THINNEST", thinnest):
                mac([(eight, 1, 32768, 38), (eight, 16, 32768, 3), (eight, 64, 16384, 1)], [{}], rates=(1.0, 0.97, 0.0), early=(True,))
        print("at most 4 splits of a ring")
        with mock.patch.object(triton_match, "MAX_SPLITS", 4):
            mac([(eight, 1, 32768, 38)], [{}], rates=(1.0, 0.97), early=(True,))
        few = [{"block": 64, "stages": s, "occupancy": o} for s, o in ((3, 3), (5, 2))]
        mac([(four, 16, 32768, 3), (four, 1, 32768, 38), (eight, 4, 32768, 10)], few, rates=(1.0, 0.9), early=(True,))
    if "parts" in what:
        parts([(eight, 1, 32768, 38), (eight, 16, 32768, 3), (eight, 64, 16384, 1)])
    if "profile" in what:  # for ncu: a few launches of each kernel
        for batch, ctx in ((1, 32768), (16, 32768), (64, 16384)):
            problem = Problem(Cell(*eight, batch, ctx), "cuda", 1, 4, 0)
            stream = Stream(problem, 1.0, "none")
            cell = problem.cell
            for step in range(2):
                params = MacParams(cell.tau * (2 * cell.head_dim) ** 0.5, cell.band)
                triton_mac.mac_step(stream.queries[step, 0], problem.q[0], problem.cache, 0, stream.rings[0], params, cell.scale)


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1:])
