"""Rows of the database as values: what store calls return and the board holds."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import msgpack

from whisperd.protocol.jobs import JobState, Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """The work: audio in a spool folder and what is to be done with it."""

    id: int
    uid: int
    state: JobState
    share_key: bytes
    folder: str | None
    sha256: str
    size_bytes: int
    options: Mapping[str, Any]
    decoded: bool
    audio_s: float | None
    truncated: bool
    starts: int
    segments: int
    deaths: int
    source: Mapping[str, Any] | None  # what to download; None for a file
    source_key: bytes | None
    fresh: bool
    fetch_failures: int
    title: str | None
    made_by: str | None
    edition: int
    suspicion: int
    created_at: float
    ended_at: float | None
    audio_expires_at: float | None
    retried: bool  # it ended in vain, and the same work was begun again since; not a column


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """Somebody's request."""

    id: int
    run_id: int
    uid: int
    state: JobState
    priority: Priority
    attached: bool
    key: str | None
    source: Mapping[str, Any]
    options: Mapping[str, Any]
    submitted_at: float
    started_at: float | None
    ended_at: float | None
    error_code: str | None
    error_message: str | None
    last_seq: int

    @property
    def is_download(self) -> bool:
        """True for a video or an address. Its run may have begun with a file, and the run of a file with a download."""
        return self.source["kind"] in ("video", "url")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One numbered event of a job. `payload` is what the pushed map holds beside id, event, job and seq."""

    job_id: int
    uid: int
    seq: int
    kind: str  # state | segment | end
    payload: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """What `Store.accept` makes a job of: audio that is durable in the spool, or what is to be downloaded.

    Of the latter `source_key` is set, and `folder`, `sha256` and `size_bytes` say nothing yet.
    """

    uid: int
    priority: Priority
    attached: bool
    key: str | None
    source: Mapping[str, Any]
    options: Mapping[str, Any]
    fresh: bool
    fingerprint: bytes
    share_key: bytes
    folder: str | None
    sha256: str
    size_bytes: int
    source_key: bytes | None = None


@dataclass(slots=True, kw_only=True)
class Change:
    """What a store call changed, in the order in which it happened; applied to the board after the commit."""

    jobs: list[JobRow] = field(default_factory=list)
    runs: list[RunRow] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)  # no row names them any more: delete them now
    gone_jobs: list[int] = field(default_factory=list)
    gone_runs: list[int] = field(default_factory=list)
    job: JobRow | None = None  # the job that the call was about, and its run
    run: RunRow | None = None
    reused: bool = False


_BLOBS = {"source", "options"}
_BOOLEANS = {"decoded", "truncated", "attached", "fresh", "retried"}


def _values(kind: type[Any], row: sqlite3.Row) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for column in fields(kind):
        value = row[column.name]
        if column.name in _BLOBS and value is not None:
            value = unpack(value)
        elif column.name in _BOOLEANS:
            value = bool(value)
        elif column.name == "state":
            value = JobState(value)
        elif column.name == "priority":
            value = Priority(value)
        values[column.name] = value
    return values


def run_row(row: sqlite3.Row) -> RunRow:
    """Read a row of `SELECT_RUNS`."""
    return RunRow(**_values(RunRow, row))


def job_row(row: sqlite3.Row) -> JobRow:
    """Read a row of `jobs`."""
    return JobRow(**_values(JobRow, row))


def pack(value: Any) -> bytes:
    """Return a value as the database keeps it."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack(blob: bytes) -> Any:
    """Read what `pack` wrote."""
    return msgpack.unpackb(blob, raw=False)


def about(change: Change) -> tuple[JobRow, RunRow]:
    """Return the job that a call was about, with its run."""
    assert change.job is not None, "the call was about a job"
    assert change.run is not None, "a job has a run"
    return change.job, change.run
