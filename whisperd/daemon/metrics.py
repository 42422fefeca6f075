"""Counters since start, and the recent past for percentiles. Memory only."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from whisperd.daemon.store.rows import JobRow
from whisperd.protocol.jobs import JobState, Priority

_RECENT = 1000


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the value below which `share` (0...1) of `values` lie (nearest rank), or None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Metrics:
    """What `stats` tells of the time since start."""

    def __init__(self) -> None:
        self.states: Counter[JobState] = Counter()
        self.cache_hits = 0
        self.transcribed_s = 0.0
        self._wait_s = {priority: deque[float](maxlen=_RECENT) for priority in Priority}
        self._run_s = {priority: deque[float](maxlen=_RECENT) for priority in Priority}

    def moved(self, state: JobState, job: JobRow | None) -> None:
        """Count a job's arrival in a state; take its wait when it starts, its run time when it is done."""
        self.states[state] += 1
        if job is None or job.started_at is None:
            return
        if state is JobState.RUNNING:
            self._wait_s[job.priority].append(max(0.0, job.started_at - job.submitted_at))
        elif state is JobState.DONE and job.ended_at is not None:
            self._run_s[job.priority].append(max(0.0, job.ended_at - job.started_at))

    def waits(self) -> dict[str, dict[str, float | None]]:
        """Return wait times in seconds by priority."""
        return _percentiles(self._wait_s)

    def runs(self) -> dict[str, dict[str, float | None]]:
        """Return run times in seconds by priority."""
        return _percentiles(self._run_s)


def _percentiles(values: dict[Priority, deque[float]]) -> dict[str, dict[str, float | None]]:
    return {
        str(priority): {"p50": percentile(recent, 0.5), "p95": percentile(recent, 0.95)}
        for priority, recent in values.items()
    }
