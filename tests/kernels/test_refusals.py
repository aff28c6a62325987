"""What the Triton wrappers refuse, in one line, before anything is launched."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from macbench_kernels import MacParams, Ring, UnsupportedError, kernels
from macbench_kernels.triton_attend import attend_full

from tests.conftest import DEVICE, filled_cache

ELSEWHERE = torch.device("meta")


@pytest.fixture
def given():
    """Arguments that are all right, to be spoilt one at a time."""
    k = torch.randn(2, 2, 20, 64, device=DEVICE)
    q = torch.randn(2, 4, 64, device=DEVICE)
    spans = torch.tensor([[[[0] * 4] * 2, [[20] * 4] * 2]], dtype=torch.int32, device=DEVICE)
    position = torch.tensor([19, 19], dtype=torch.int32, device=DEVICE)
    cache, ring = filled_cache(k, k), Ring.create(2, 4, 8, 64, torch.float32, DEVICE)
    return SimpleNamespace(q_pre=q.clone(), q=q, spans=spans, position=position, cache=cache, ring=ring)


def calls(given) -> dict:
    layer = kernels("triton", DEVICE)
    return {
        "attend": lambda: layer.attend(given.q, given.cache, 0, given.spans, 1.0),
        "full": lambda: layer.full(given.q, given.cache, 0, 1.0),
        "attend_full": lambda: attend_full(given.q, given.cache, 0, 1.0),
        "match": lambda: layer.match(given.q_pre, given.ring, given.position, 1.0, 0),
        "mac_step": lambda: layer.mac_step(given.q_pre, given.q, given.cache, 0, given.ring, MacParams(1.0, 4), 1.0),
    }


def refused(call) -> str:
    with pytest.raises(UnsupportedError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


OWNERS = {
    "block_table": ("cache", "block table", ("attend", "full", "attend_full", "mac_step")),
    "lengths": ("cache", "lengths", ("attend", "full", "attend_full", "mac_step")),
    "q": ("ring", "ring.q", ("match", "mac_step")),
    "out": ("ring", "ring.out", ("match", "mac_step")),
    "lse": ("ring", "ring.lse", ("match", "mac_step")),
    "depth": ("ring", "ring.depth", ("match", "mac_step")),
}


@pytest.mark.parametrize("name", OWNERS)
def test_tensors_on_another_device(given, name):
    owner, said, which = OWNERS[name]
    target = getattr(given, owner)
    setattr(target, name, getattr(target, name).to(ELSEWHERE))
    for each in which:
        message = refused(calls(given)[each])
        assert f"{said} on meta" in message
        assert f"queries on {given.q.device}" in message


@pytest.mark.parametrize(("name", "which"), [("spans", "attend"), ("position", "match"), ("q_pre", "mac_step"), ("q", "full")])
def test_arguments_on_another_device(given, name, which):
    setattr(given, name, getattr(given, name).to(ELSEWHERE))
    assert "meta" in refused(calls(given)[which])


def test_batches_and_shapes_that_disagree(given):
    assert "(1, 4, 64) on a cache of 2 requests" in refused(lambda: kernels("triton", DEVICE).full(given.q[:1], given.cache, 0, 1.0))
    assert "(4, 64) on a cache of 2 requests" in refused(lambda: kernels("triton", DEVICE).full(given.q[0], given.cache, 0, 1.0))
    given.q = torch.cat([given.q, given.q], 1)
    assert "before and (2, 8, 64) after RoPE" in refused(calls(given)["mac_step"])


def test_a_cpu_without_the_interpreter():
    """Whether kernels are interpreted is settled when triton is imported, so this takes a process of its own."""
    program = """
import torch
from macbench_kernels import MacParams, PagedKVCache, PagePool, Ring, UnsupportedError, kernels
from macbench_kernels.triton_attend import attend, attend_full
from macbench_kernels.triton_mac import mac_step
from macbench_kernels.triton_match import match

cache = PagedKVCache(PagePool(1, 1, 16, 4), 1)
cache.extend(5)
q, ring, spans = torch.zeros(1, 1, 16), Ring.create(1, 1, 4, 16, torch.float32, "cpu"), torch.zeros(1, 2, 1, 1, dtype=torch.int32)
for call in (
    lambda: attend(q, cache, 0, spans, 1.0),
    lambda: attend_full(q, cache, 0, 1.0),
    lambda: match(q, ring, cache.lengths, 1.0, 0),
    lambda: mac_step(q, q, cache, 0, ring, MacParams(1.0, 4), 1.0),
    lambda: kernels("triton", "cpu"),
):
    try:
        call()
        print("not refused")
    except UnsupportedError as error:
        print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stderr
    for line in lines:
        assert "needs a CUDA device" in line or "need a CUDA device" in line
        assert "TRITON_INTERPRET=1" in line
