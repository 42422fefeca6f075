"""What `stats --watch` remembers: the last minutes, for its plots and for speeds of now."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from whisperd.protocol.jobs import Job

SPAN_S = 300.0
_NOW_S = 20.0  # the model tells its progress a window at a time: what is shorter jumps


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The daemon at one moment; `at_s` on a monotonic clock. `jobs` are those that have not ended, by state."""

    at_s: float
    stats: Mapping[str, Any]
    health: Mapping[str, Any]
    jobs: Mapping[str, list[Job]] = field(default_factory=dict)

    def number(self, key: str) -> float | None:
        """Return a number of `stats` by its dotted key; None for what the daemon does not tell."""
        value: Any = self.stats
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value if isinstance(value, int | float) else None

    @property
    def waiting(self) -> float:
        """Jobs that wait, of both priorities."""
        return sum(self.number(f"queue.{priority}") or 0 for priority in ("interactive", "background"))


class History:
    """Snapshots of the last minutes, oldest first."""

    def __init__(self) -> None:
        self._snapshots: deque[Snapshot] = deque()

    def add(self, snapshot: Snapshot) -> None:
        """Take one in, and let go of what is too old."""
        self._snapshots.append(snapshot)
        while self._snapshots[0].at_s < snapshot.at_s - SPAN_S - _NOW_S:
            self._snapshots.popleft()

    @property
    def last(self) -> Snapshot:
        """The newest one."""
        return self._snapshots[-1]

    def rate(self, key: str, *, until: Snapshot | None = None) -> float | None:
        """Return how fast a counter grows, a second, over the 20 s before `until` (None: now).

        None where there is nothing to compare, and across a restart, which sets counters back.
        """
        until = until or self.last
        first = next((each for each in self._snapshots if each.at_s >= until.at_s - _NOW_S), until)
        before, after = first.number(key), until.number(key)
        passed_s = until.at_s - first.at_s
        if before is None or after is None or passed_s <= 0 or after < before:
            return None
        return (after - before) / passed_s

    def series(self, value: Callable[[Snapshot], float | None], width: int) -> list[float | None]:
        """Return the span as `width` values, the newest last; None where nothing was seen.

        Where several snapshots fall together it is their mean.
        """
        step_s = SPAN_S / width
        heaps: list[list[float]] = [[] for _ in range(width)]
        for snapshot in self._snapshots:
            place = width - 1 - int((self.last.at_s - snapshot.at_s) / step_s)
            if place >= 0 and (number := value(snapshot)) is not None:
                heaps[place].append(number)
        means = [sum(heap) / len(heap) if heap else None for heap in heaps]
        return _bridged(means, [bool(heap) for heap in heaps])


def _bridged(means: list[float | None], seen: list[bool]) -> list[float | None]:
    """Fill single gaps from the left: a narrow column may fall between two looks."""
    return [
        means[place - 1] if place and not seen[place] and seen[place - 1] and any(seen[place:]) else mean
        for place, mean in enumerate(means)
    ]
