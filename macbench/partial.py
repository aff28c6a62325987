"""Generations that are not finished yet, kept on disk so that an interruption costs a few hundred tokens and not an hour.

    <run>/partial/<example>/<call>/part-00000.npz ...

A part holds the tokens, times and counts of the steps since the part before, and is written whole. To go on, the engine prefills
prompt + tokens and decodes from there. What differs from a generation that was never interrupted: prefill computes the K and V of
generated tokens exactly and in chunks, so they agree with decoded ones to rounding under full attention, and MAC's ring is filled from
exact states of the last queries, where an uninterrupted run would hold amended states (chains of reuse start again at depth 0). The
sample row says so: ``meta.resumed_at`` lists the token counts at which a generation was taken up.
"""

import contextlib
import hashlib
import json
import math
import shutil
import sys
import zipfile
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np

from macbench.counting import COUNTS
from macbench.engine import Generation
from macbench.errors import one_line, printable
from macbench.files import make_folder, write_whole
from macbench.records import RunDirectory
from macbench.tasks.base import Example

EVERY = 512  # decode steps between parts
MOST = 16 << 20  # bytes of one of a part's arrays: 512 steps of 128 layers have half a megabyte


class Partial:
    """One call of one variant on one example: ``every``, ``save`` (the engine's Keeper) and ``load``."""

    def __init__(self, run: Path, method: str, variant: str, example: Example, every: int = EVERY):
        self.every = every
        self._place = run, method, variant, example
        kept = example_folder(run, example).is_dir()
        self.earlier = self.load() if kept else None
        # Later parts are numbered and counted from here on.
        self._parts = len(self._files()) if kept else 0
        self._tokens = len(self.earlier.tokens) if self.earlier else 0
        self._steps = 0

    @cached_property
    def folder(self) -> Path:
        """Named by a digest of the whole prompt, which takes longer than to see that the example has no folder at all."""
        run, method, variant, example = self._place
        call = _digest(method, variant, example.input_ids, example.max_new_tokens, repr(example.sampling))  # a follow-up has other ids
        return example_folder(run, example) / call

    def save(self, generation: Generation) -> None:
        """Add what is new since the last ``save``. ``generation``: the engine's, whose steps begin where ``earlier`` ends."""
        new = slice(self._steps, None)
        arrays = {
            "tokens": np.array(generation.tokens[self._tokens :], np.int64),
            "seconds": generation.step_seconds[new],
            "positions": generation.positions[new],
            "setup": np.array(generation.setup_seconds if not self._steps else 0.0),
            "reason": np.array(generation.finish_reason),
        } | {name: generation.counts[name][new] for name in COUNTS}
        while not self.folder.is_dir():
            with contextlib.suppress(FileNotFoundError):  # another process has just removed the empty folder above
                make_folder(self.folder)
        write_whole(self.folder / f"part-{self._parts:05}.npz", lambda file: np.savez_compressed(file, **arrays))
        self._parts, self._tokens, self._steps = self._parts + 1, len(generation.tokens), len(generation.step_seconds)

    def discard(self) -> None:
        """Forget what was saved: the generation starts anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.earlier, self._parts, self._tokens, self._steps = None, 0, 0, 0

    def finish(self, generation: Generation) -> Generation:
        """The whole generation, earlier steps included; kept as well if parts of it are, in case other variants are interrupted."""
        if self._parts:
            self.save(generation)
        if self.earlier is None:
            return generation
        whole = Generation([], *_rest(self.earlier)).then(generation)
        return whole

    def load(self) -> Generation | None:
        """What the parts on disk hold, or None. A part that cannot be read ends it, which a line says: the ones before it are still good."""
        whole = None
        for file in self._files():
            try:
                _judge(file)
                with np.load(file, allow_pickle=False) as data:
                    counts = {name: data[name] for name in COUNTS}
                    tokens, seconds, positions = data["tokens"].tolist(), data["seconds"], data["positions"]
                    part = Generation(tokens, str(data["reason"]), seconds, float(data["setup"]), counts, positions)
            except Exception as error:  # whatever a damaged file makes zipfile, zlib or numpy raise
                print(f"macbench: note: {printable(f'{file}: cannot be read ({one_line(error)}); its steps are made again')}", file=sys.stderr)
                for bad in self._files()[self._files().index(file) :]:
                    bad.unlink()
                break
            whole = part if whole is None else whole.then(part)
        return whole

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.npz"))


def example_folder(run: Path, example: Example) -> Path:
    return _folder(run, example.subtask, example.example_id)


def _folder(run: Path, subtask: str, example_id: str) -> Path:
    return run / "partial" / _digest(subtask, example_id)


def clear(run: Path, example: Example) -> None:
    """Forget the parts of an example whose rows are recorded."""
    _clear(run, [(example.subtask, example.example_id)])


def tidy(directory: RunDirectory, variants: int) -> None:
    """Forget the parts of examples whose rows are recorded for all ``variants``: of a process that was killed between one and the other."""
    if (directory.path / "partial").is_dir():
        made = Counter(key[2:] for key in directory.done(retry_failed=True))
        _clear(directory.path, [place for place, number in made.items() if number == variants])


def _clear(run: Path, places: list[tuple[str, str]]) -> None:
    for place in places:
        shutil.rmtree(_folder(run, *place), ignore_errors=True)
    with contextlib.suppress(OSError):  # others' parts are in it, or another process was faster
        (run / "partial").rmdir()


def _judge(file: Path) -> None:
    """Raise a ValueError, before any array is read, if one would take more than ``MOST`` bytes: a header of a few can promise any number."""
    with zipfile.ZipFile(file) as members:
        for name in members.namelist():
            with members.open(name) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
            size = math.prod(shape) * dtype.itemsize
            if size > MOST:
                raise ValueError(f"{name} would take {size / 1e6:.1f} MB of memory, and may take {MOST / 1e6:.1f} MB")


def _rest(generation: Generation) -> tuple:
    """All fields but the tokens: those of later generations repeat the earlier tokens."""
    return generation.finish_reason, generation.step_seconds, generation.setup_seconds, generation.counts, generation.positions


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
