"""What a CUDA graph asks of every method: nothing synchronises, and every step does the same operations."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from macbench_kernels import Kernels, MacStep, State, kernels
from torch.utils._python_dispatch import TorchDispatchMode

from macbench.engine import Engine
from macbench.methods.base import Method
from macbench.methods.full import Full
from macbench.methods.mac import MAC
from macbench.models.adapter import attention_shape
from macbench.output_error import Measured
from tests.conftest import DEVICE
from tests.methods.cases import PROMPTS
from tests.methods.driver import Batch, Text
from tests.models.tiny import tiny


def stub(s) -> Kernels:
    """Kernels that compute nothing: torch's own ones look at bounds on the host, which a method may not."""

    def state(*lead):
        return State(torch.zeros(*lead, s.batch, s.q_heads, s.head_dim), torch.zeros(*lead, s.batch, s.q_heads))

    flags, bounds = torch.zeros(s.batch, s.q_heads, dtype=torch.bool), torch.zeros(2, 2, s.batch, s.q_heads, dtype=torch.int32)
    mac = (bounds, flags, flags, flags.int(), flags[:, 0].int())
    return replace(
        kernels("torch"),
        attend=lambda q, cache, layer, spans, scale: state(spans.shape[0]),
        attend_selected=lambda *args, **options: state(),
        full=lambda q, cache, layer, scale: torch.zeros_like(q),
        token_scores=lambda q, cache, layer, scale, width: torch.zeros(s.batch, s.q_heads, width),
        row_scores=lambda weights, table, units, rows=None: torch.zeros(*weights.shape[:3], table.shape[-1]),
        extend_bounds=lambda *args: None,
        attend_quantised=lambda *args: state(),
        quantise_rows=lambda *args: None,
        weigh_rows=lambda weights, table: torch.zeros(*weights.shape[:3], table.shape[-1]),
        mac_step=lambda q_pre, q, *args: MacStep(torch.zeros_like(q), *(x.clone() for x in mac)),
    )


class Watch(TorchDispatchMode):
    """Writes down every operation with the shapes of its tensors; raises at those that make the host wait or depend on data.

    ``tolist`` and ``numpy`` reach no dispatcher: the test replaces them.
    """

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "lift_fresh", "bincount")

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{function} synchronises with the host, or takes a tensor from it"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype is not torch.bool for i in args[1]), f"{function} with a mask"
        self.log.append((str(function), *(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))))
        return function(*args, **(kwargs or {}))


def refuse(*args):
    raise AssertionError("reads a tensor on the host")


def test_watch_sees_what_it_should():
    x = torch.arange(4)
    for use in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(), lambda: x[x > 1], lambda: torch.tensor([1]), lambda: int(x[0])):
        with pytest.raises(AssertionError), Watch():
            use()


def captured_operations(make: Callable[[], Method], prompts: tuple, monkeypatch) -> list[list]:
    """What three steps of each of two batches do, operation by operation."""
    logs = []
    longest = max(prompts) + 10
    for lengths in (prompts, (20, longest - 9, 3, 50)[: len(prompts)]):
        data = [Text.random(n, longest - n, seed=n) for n in lengths]
        shape = Batch(Full(), data).shape
        batch = Batch(make(), data, layer_kernels=stub(shape), max_tokens=longest)
        batch.step()  # the first step may allocate
        for _ in range(3):
            batch.grow()
            queries = [batch.queries(layer) for layer in range(shape.layers)]
            with monkeypatch.context() as patch, Watch() as watch:
                for name in ("tolist", "numpy", "cpu"):
                    patch.setattr(torch.Tensor, name, refuse)
                for layer, (q_pre, q) in enumerate(queries):
                    batch.method.attend(layer, q_pre, q, batch.cache)
                batch.ledger.end_step()
            logs.append(watch.log)
    return logs


def test_a_step_can_be_captured(case, monkeypatch):
    """Nothing in attend or in the ledger synchronises, and steps of other lengths do exactly the same operations."""
    if DEVICE == "cuda":
        return
    logs = captured_operations(case.make, case.prompts, monkeypatch)
    assert all(log == logs[0] for log in logs)


def test_a_mac_step_with_all_its_knobs_can_be_captured(monkeypatch):
    if DEVICE == "cuda":
        return
    logs = captured_operations(lambda: MAC(window=16, band=8, sink=4, max_chain=2, min_context=40), PROMPTS, monkeypatch)
    assert logs[0] and all(log == logs[0] for log in logs)


def test_a_measured_step_can_be_captured(case, monkeypatch):
    """Full attention beside the method, and the sums of errors, too."""
    if DEVICE == "cuda":
        return
    logs = captured_operations(lambda: Measured(case.make()), case.prompts, monkeypatch)
    assert all(log == logs[0] for log in logs)


@pytest.mark.parametrize("make", [Full, lambda: MAC(window=16, band=8, min_context=0)], ids=["full", "mac"])
def test_a_whole_decode_step_can_be_captured(make, monkeypatch):
    """From token to token: positions and pages, the model's layers, the method, the greedy choice and the ledger, for other lengths alike."""
    if DEVICE == "cuda":
        return
    network = tiny("llama", torch.float32)
    engine = Engine(network, stub(replace(attention_shape(network), batch=2)), 128, page_size=4, batch=2)
    decoder = engine.decoder(make(), 2)
    logs = []
    with torch.inference_mode():
        for lengths in ((70, 40), (33, 80)):
            prompts = [engine.prefill(list(range(n)), 16) for n in lengths]
            decoder.start(prompts)
            for step in range(4):
                decoder.before()
                with monkeypatch.context() as patch, Watch() as watch:
                    for name in ("tolist", "numpy", "cpu"):
                        patch.setattr(torch.Tensor, name, refuse)
                    decoder.step()
                logs += [watch.log] if step else []  # the first may allocate
            decoder.stop()
            for prompt in prompts:
                prompt.free()
    assert len(logs[0]) > 50 and all(log == logs[0] for log in logs)
