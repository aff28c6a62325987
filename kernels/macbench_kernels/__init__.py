"""The shared kernel layer: paged KV cache, attention over key spans with lse, merging of states, ring match.

It knows tensors only; no models, tasks, configuration or files.
"""

from macbench_kernels import kmeans
from macbench_kernels.cache import OutOfPages, PagedKVCache, PagePool
from macbench_kernels.dispatch import BACKENDS, Kernels, UnsupportedError, kernels
from macbench_kernels.mac import MacParams, MacStep
from macbench_kernels.one_by_one import one_by_one
from macbench_kernels.quantised import Codes, Scheme
from macbench_kernels.ring import Match, Ring, scanned_rows
from macbench_kernels.select import present
from macbench_kernels.state import State, empty_state, merge
from macbench_kernels.summaries import build_bounds, rounded
from macbench_kernels.torch_backend import visible_span

__all__ = [
    "BACKENDS",
    "Codes",
    "Kernels",
    "MacParams",
    "MacStep",
    "Match",
    "OutOfPages",
    "PagePool",
    "PagedKVCache",
    "Ring",
    "Scheme",
    "State",
    "UnsupportedError",
    "build_bounds",
    "empty_state",
    "kernels",
    "kmeans",
    "merge",
    "one_by_one",
    "present",
    "rounded",
    "scanned_rows",
    "visible_span",
]
