"""Jobs: their states, the only moves between them, and how one looks on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any


class Priority(StrEnum):
    """Interactive work goes before background work in every lane."""

    INTERACTIVE = "interactive"
    BACKGROUND = "background"


class JobState(StrEnum):
    """Where a job is. The last three are ends."""

    PENDING = "pending"  # waits for its download
    FETCHING = "fetching"  # is being downloaded
    QUEUED = "queued"  # its audio is on hand; waits for decoding or for the model
    RUNNING = "running"  # the model works on it
    DONE = "done"  # has a transcript
    FAILED = "failed"  # has an error
    CANCELLED = "cancelled"  # its user, or the end of its last holder, stopped it

    @property
    def ended(self) -> bool:
        """True for `done`, `failed` and `cancelled`."""
        return self in ENDED


ENDED = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED})
WAITING = frozenset({JobState.PENDING, JobState.FETCHING, JobState.QUEUED})

TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.PENDING: frozenset(
        {JobState.FETCHING, JobState.QUEUED, JobState.DONE, JobState.FAILED, JobState.CANCELLED}
    ),
    JobState.FETCHING: frozenset({JobState.QUEUED, JobState.PENDING, JobState.FAILED, JobState.CANCELLED}),
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.DONE, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.DONE, JobState.FAILED, JobState.CANCELLED}),
    JobState.DONE: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


class IllegalMove(Exception):
    """A job was asked to make a move that `TRANSITIONS` does not know: a defect of the daemon."""


def check_move(old: JobState, new: JobState) -> None:
    """Raise `IllegalMove` unless a job may go from `old` to `new`. Every change of state passes here."""
    if new not in TRANSITIONS[old]:
        raise IllegalMove(f"{old} -> {new}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Somebody's request, as replies show it. Times are Unix seconds, `progress` is 0...1, `position` 1 = next."""

    id: int
    state: JobState
    priority: Priority
    uid: int
    source: Mapping[str, Any]
    options: Mapping[str, Any]
    submitted_at: float
    started_at: float | None = None
    ended_at: float | None = None
    position: int | None = None
    phase: str = ""
    progress: float = 0.0
    eta_s: float | None = None
    audio_s: float | None = None
    attempts: int = 0
    retried: bool = False
    error: Mapping[str, str] | None = None

    @property
    def ended(self) -> bool:
        """True once the job is done, failed or cancelled."""
        return self.state.ended

    def to_wire(self) -> dict[str, Any]:
        """Return the map that the protocol calls Job."""
        wire = asdict(self)
        wire["state"], wire["priority"] = str(self.state), str(self.priority)
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Job:
        """Read a Job map; keys that this version does not know are ignored, as the protocol asks."""
        known = {field.name: wire[field.name] for field in fields(cls) if field.name in wire}
        known["state"], known["priority"] = JobState(known["state"]), Priority(known["priority"])
        return cls(**known)
