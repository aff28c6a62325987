"""What a CUDA graph asks of every method: nothing synchronises, and every step does the same operations.

On the CPU on every machine, with kernels that compute nothing; what the real ones do on the host is read from their source.
"""

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import macbench_kernels
import pytest
import torch
from macbench_kernels import Kernels, MacStep, State, kernels
from torch.utils._python_dispatch import TorchDispatchMode

from macbench.engine import Engine
from macbench.methods import base
from macbench.methods.base import Method
from macbench.methods.full import Full
from macbench.methods.mac import MAC
from macbench.models import fused
from macbench.models.adapter import attention_shape
from macbench.output_error import Measured
from tests.methods.cases import PROMPTS
from tests.methods.driver import Batch, Text
from tests.models.tiny import tiny

METHODS = sorted(Path(base.__file__).parent.glob("*.py"))
KERNELS = Path(macbench_kernels.__file__).parent


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
    """Writes down every operation with the shapes of its tensors and its numbers; raises at those that make the host wait or depend on data.

    What reaches no dispatcher, or looks like nothing on a CPU (``tolist``, ``numpy``, moves to the host), is replaced while it watches.
    """

    FORBIDDEN = (
        "_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "_unique", "_unique2", "unique_consecutive", "unique_dim",
        "unique_dim_consecutive", "is_nonzero", "equal", "lift_fresh", "bincount",
    )  # fmt: skip
    READERS = ("tolist", "numpy", "cpu", "item", "__array__")

    def __init__(self):
        super().__init__()
        self.log = []

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in self.READERS:
            self.patch.setattr(torch.Tensor, name, refuse)
        to = torch.Tensor.to

        def moved(tensor, *args, **options):
            # By its name: the device of another tensor is the CPU here and a GPU there.
            assert "cpu" not in [a for a in (*args, *options.values()) if isinstance(a, str)], "moves a tensor to the host"
            return to(tensor, *args, **options)

        self.patch.setattr(torch.Tensor, "to", moved)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        assert name not in self.FORBIDDEN, f"{function} synchronises with the host, or takes a tensor from it"
        if name == "repeat_interleave":
            assert kwargs.get("output_size") is not None, f"{function} asks the device for the size of its result"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype is not torch.bool for i in args[1]), f"{function} with a mask"
        # Numbers, too: a graph replays those of its capture.
        numbers = [a for a in args if isinstance(a, int | float)]
        self.log.append((str(function), *(tuple(a.shape) for a in args if isinstance(a, torch.Tensor)), *numbers))
        return function(*args, **kwargs)


def refuse(*args, **options):
    raise AssertionError("reads a tensor on the host")


SYNCHRONISING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "int": lambda x: int(x[0]),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "mask": lambda x: x[x > 1],
    "masked_select": lambda x: x.masked_select(x > 1),
    "tensor": lambda x: torch.tensor([1]),
    "unique": torch.unique,
    "unique_dim": lambda x: torch.unique(x[None], dim=0),
    "unique_consecutive": torch.unique_consecutive,
    "unique_consecutive_dim": lambda x: torch.unique_consecutive(x[None], dim=0),
    "repeat_interleave": lambda x: x.repeat_interleave(x),
    "bincount": torch.bincount,
    "equal": lambda x: torch.equal(x, x),
    "to": lambda x: x.to("cpu"),
    "to_device": lambda x: x.to(device="cpu", dtype=torch.float32),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
}


@pytest.mark.parametrize("use", SYNCHRONISING.values(), ids=SYNCHRONISING)
def test_watch_sees_what_it_should(use):
    with pytest.raises(AssertionError), Watch():
        use(torch.arange(4))


def test_watch_lets_the_rest_pass():
    x = torch.arange(4)
    with Watch() as watch:
        x.to(torch.float32).add_(1).to(x)
        x.repeat_interleave(2), x.repeat_interleave(x, output_size=6), torch.where(x > 1, x, 0)
    assert len(watch.log) > 4
    assert x.cpu().tolist() == x.to("cpu").numpy().tolist() == [0, 1, 2, 3]  # what was replaced is back


def captured_operations(make: Callable[[], Method], prompts: tuple) -> list[list]:
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
            with Watch() as watch:
                for layer, (q_pre, q) in enumerate(queries):
                    batch.method.attend(layer, q_pre, q, batch.cache)
                batch.ledger.end_step()
            logs.append(watch.log)
    return logs


def test_a_step_can_be_captured(case):
    """Nothing in attend or in the ledger synchronises, and steps of other lengths do exactly the same operations."""
    logs = captured_operations(case.make, case.prompts)
    assert all(log == logs[0] for log in logs)


def test_a_mac_step_with_all_its_knobs_can_be_captured():
    logs = captured_operations(lambda: MAC(window=16, band=8, sink=4, max_chain=2, min_context=40), PROMPTS)
    assert logs[0] and all(log == logs[0] for log in logs)


def test_a_measured_step_can_be_captured(case):
    """Full attention beside the method, and the sums of errors, too."""
    logs = captured_operations(lambda: Measured(case.make()), case.prompts)
    assert all(log == logs[0] for log in logs)


@pytest.mark.parametrize("groups", [((70, 40), (33, 80)), ((70,), (33,))], ids=["all", "one of two"])
@pytest.mark.parametrize("make", [Full, lambda: MAC(window=16, band=8, min_context=0)], ids=["full", "mac"])
def test_a_whole_decode_step_can_be_captured(make, groups):
    """From token to token: positions and pages, the model's layers, the method, the greedy choice and the ledger, for other lengths alike.

    A request that does not grow writes to a spare page, which is not the same one each time.
    """
    network = tiny("llama", torch.float32).cpu()
    engine = Engine(network, stub(replace(attention_shape(network), batch=2)), 128, page_size=4, batch=2)
    decoder = engine.decoder(make(), 2)
    logs = []
    with torch.inference_mode():
        for lengths in groups:
            prompts = [engine.prefill(list(range(n)), 16) for n in lengths]
            decoder.start(prompts)
            for step in range(4):
                decoder.before()
                with Watch() as watch:
                    decoder.step()
                logs += [watch.log] if step else []  # the first may allocate
            decoder.stop()
            for prompt in prompts:
                prompt.free()
    assert len(logs[0]) > 50 and all(log == logs[0] for log in logs)


# What waits for nothing although it looks so, and why.
ALLOWED = {("kivi", "_row_bytes")}  # hyper-parameters and plain numbers only
# Calls that make the host wait for the device, or a tensor out of what the host has.
WAITING = {
    "item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "equal", "allclose",
    "synchronize", "tensor", "as_tensor", "from_numpy",
}  # fmt: skip


def waiting_calls(function: ast.FunctionDef) -> list[str]:
    """Those of the source of a function; int, bool and float of anything that is computed are among them, and indices with a comparison."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            casts = isinstance(node.func, ast.Name) and name in ("int", "bool", "float") and not isinstance(node.args[0], ast.Constant)
            found += [ast.unparse(node)] if name in WAITING or casts or names_the_host(node) else []
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Compare):
            found.append(ast.unparse(node))
    return found


def names_the_host(call: ast.Call) -> bool:
    """Moves to the CPU, the CPU as an object, tensors made there: ``x.to("cpu")``, ``torch.device("cpu")``, ``torch.empty(4, device="cpu")``."""
    return any(isinstance(a, ast.Constant) and str(a.value).split(":")[0] == "cpu" for a in (*call.args, *(k.value for k in call.keywords)))


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    """All of a file that run on the host: Triton's own kernels do not."""
    tree = ast.parse(path.read_text())
    defined = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {node.name: node for node in defined if not any("jit" in ast.unparse(d) for d in node.decorator_list)}


def test_waiting_calls_are_found_in_source():
    code = "def f(x):\n    x.item(); int(x.sum()); torch.nonzero(x); x.to('cpu'); x[x > 1]; x.cpu().numpy(); float('inf'); x.to(torch.int32)"
    assert len(waiting_calls(ast.parse(code).body[0])) == 7
    code = "def f(x):\n    x.to(torch.device('cpu')); torch.empty(4, device='cpu:0').copy_(x); x.to(x.device); x.to('cuda')"
    assert len(waiting_calls(ast.parse(code).body[0])) == 2


@pytest.mark.parametrize("path", sorted(KERNELS.glob("triton_*.py")), ids=lambda path: path.stem)
def test_no_wrapper_of_a_kernel_waits(path):
    """None of them: a step may call each."""
    assert {name: waiting_calls(f) for name, f in functions(path).items() if waiting_calls(f)} == {}


@pytest.mark.parametrize("path", [p for p in METHODS if "attend" in functions(p)], ids=lambda path: path.stem)
def test_no_attend_waits(path):
    """Nor what it calls or reads of its own file, from function to function."""
    assert waiting(path, "attend") == {}


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_no_method_names_the_host(path):
    """Anywhere in its file: a device or a tensor of the CPU that is made before a step can be moved or copied to within one.

    While it watches, nothing tells these from the step's own on a machine whose only device is the CPU.
    """
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert [ast.unparse(call) for call in calls if names_the_host(call)] == []


# What else a step on a GPU runs, which no CPU takes: file and functions.
ON_A_GPU = [
    (Path(fused.__file__), "step"), (KERNELS / "flashinfer_backend.py", "full"),
    *[(KERNELS / "one_by_one.py", name) for name in ("attend", "full", "mac_step")],
    (KERNELS / "ring.py", "only"), *[(KERNELS / "cache.py", name) for name in ("only", "advance")],
]  # fmt: skip


@pytest.mark.parametrize(("path", "name"), ON_A_GPU, ids=lambda part: getattr(part, "stem", part))
def test_no_step_on_a_gpu_waits(path, name):
    assert waiting(path, name) == {}


def waiting(path: Path, first: str) -> dict[str, list[str]]:
    """Waiting calls of a function of a file and of all of the file that it reaches, by function."""
    own, reached, ahead = functions(path), set(), {first}
    while ahead:
        reached |= ahead
        names = {getattr(n, "attr", getattr(n, "id", None)) for name in ahead for n in ast.walk(own[name])}
        ahead = (names & own.keys()) - reached
    return {name: waiting_calls(own[name]) for name in reached if waiting_calls(own[name]) and (path.stem, name) not in ALLOWED}
