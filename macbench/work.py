"""What is left of a run, dealt out group by group among all processes that work on it."""

from collections.abc import Callable, Iterable, Iterator
from time import sleep

from macbench.leases import Leases
from macbench.records import RunDirectory, part_name

# Seconds between looks at examples that other processes have.
_SHORTEST, _LONGEST = 0.1, 2.0


class Work:
    """Examples (subtask, index) to make. ``stamps``: of the sample parts, taken before it was decided what is left to make."""

    def __init__(self, directory: RunDirectory, left: Iterable[tuple[str, int]], stamps: dict[str, tuple[int, int]]):
        self.directory, self.stamps = directory, stamps
        self.left = {place: part_name(place[0], str(place[1])) for place in left}
        self._mine: set[tuple[str, int]] = set()  # of these, what this process makes or records just now

    def __len__(self) -> int:
        return len(self.left)

    def groups(self, leases: Leases, size: int, waiting: Callable[[int], None], settle: Callable[[], None]) -> Iterator[list[tuple[str, int]]]:
        """Lists of at most ``size`` examples that are this process's alone until they are ``finished``.

        Ends when every example is recorded, by whomever. ``settle()`` is called when nothing is left to begin: it finishes what this process
        has begun. ``waiting(n)`` is called while other processes make the last n.
        """
        wait = _SHORTEST
        while self.left:
            group = self._claim(leases, size)
            if group:
                yield group
                wait = _SHORTEST
            elif self._mine:
                settle()
            elif self.left:
                waiting(len(self.left))
                sleep(wait)
                wait = min(2 * wait, _LONGEST)

    def finished(self, leases: Leases, group: Iterable[tuple[str, int]]) -> None:
        """A group is recorded; what another process has taken over meanwhile is left to it."""
        for place in group:
            self._mine.discard(place)
            leases.release(self.left[place])
            if self.made(place):
                del self.left[place]

    def made(self, place: tuple[str, int]) -> bool:
        """Whether another process has recorded the example since this one looked."""
        part = self.left[place]
        return self.directory.stamp(part) != self.stamps.get(part)

    def _claim(self, leases: Leases, size: int) -> list[tuple[str, int]]:
        group, made = [], []
        for place, part in self.left.items():
            if place in self._mine:
                continue
            if self.made(place):
                made.append(place)
            elif leases.claim(part):
                if self.made(place):  # between the look and the claim
                    leases.release(part)
                    made.append(place)
                else:
                    group.append(place)
                    if len(group) == size:
                        break
        for place in made:
            del self.left[place]
        self._mine.update(group)
        return group
