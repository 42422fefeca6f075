"""The steps every change is made of: moving a run and its jobs, telling it to followers, letting go of audio."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from whisperd.daemon.store.reading import Reading, one_row
from whisperd.daemon.store.rows import Change, Event, JobRow, RunRow, pack
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.jobs import ENDED, JobState, check_move


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long things are kept after their end, in seconds, and how many jobs of one user who is not `unlimited`."""

    jobs_s: float
    keys_s: float
    failed_audio_s: float
    jobs_per_user: int = 2**53
    unlimited: Callable[[int], bool] = lambda uid: False


class Moving(Reading):
    """Moves of runs and jobs, each with its events. The callers have seen that the rows are still as they think."""

    def __init__(self, retention: Retention) -> None:
        self._retention = retention
        self._kept: dict[int, int] = {}  # jobs by user, at least as many as there are

    def _put_back(self, db: sqlite3.Connection, change: Change, run: RunRow) -> None:
        """`running` → `queued`. What it has come to stays with it."""
        check_move(run.state, JobState.QUEUED)
        db.execute("UPDATE runs SET state = 'queued' WHERE id = ?", (run.id,))
        for job in self._live_jobs(db, run.id):
            check_move(job.state, JobState.QUEUED)
            db.execute("UPDATE jobs SET state = 'queued', started_at = NULL WHERE id = ?", (job.id,))
            self._add_event(db, change, job, "state", {"state": JobState.QUEUED})
        change.runs.append(self._run(db, run.id))
        change.jobs.extend(self._live_jobs(db, run.id))

    def _unfetch(self, db: sqlite3.Connection, change: Change, run: RunRow, now: float) -> None:
        """`fetching` → `pending`. What was downloaded is not used again: the next try may be sent something else."""
        self._release_audio(db, change, run)
        self._move_run(db, change, run, JobState.PENDING, now)

    def _move_run(
        self,
        db: sqlite3.Connection,
        change: Change,
        run: RunRow,
        state: JobState,
        now: float,
        *,
        error: WhisperdError | None = None,
        discard: bool = False,
    ) -> None:
        check_move(run.state, state)
        live = self._live_jobs(db, run.id)
        db.execute("UPDATE runs SET state = ? WHERE id = ?", (state, run.id))
        if state in ENDED:
            db.execute("UPDATE runs SET ended_at = ? WHERE id = ?", (now, run.id))
            self._delete_journal(db, run.id)
            if run.sha256 == "":  # nothing has been downloaded, or not all of it
                self._release_audio(db, change, run)
            elif state is not JobState.DONE:
                expires = now + self._retention.failed_audio_s
                db.execute("UPDATE runs SET audio_expires_at = ? WHERE id = ?", (expires, run.id))
        for job in live:
            self._move_job(db, change, job, state, now, error=error, discard=discard)
        change.runs.append(self._run(db, run.id))

    def _move_job(
        self,
        db: sqlite3.Connection,
        change: Change,
        job: JobRow,
        state: JobState,
        now: float,
        *,
        error: WhisperdError | None = None,
        discard: bool = False,
    ) -> JobRow:
        check_move(job.state, state)
        db.execute("UPDATE jobs SET state = ? WHERE id = ?", (state, job.id))
        if state is JobState.RUNNING:
            db.execute("UPDATE jobs SET started_at = ? WHERE id = ?", (now, job.id))
        if state in ENDED:
            code, message = (error.code, error.message) if error else (None, None)
            db.execute(
                "UPDATE jobs SET ended_at = ?, error_code = ?, error_message = ? WHERE id = ?",
                (now, code, message, job.id),
            )
            self._add_event(db, change, job, "end", {"state": state, "error": error.to_wire() if error else None})
        else:
            self._add_event(db, change, job, "state", {"state": state} | ({"discard": True} if discard else {}))
        moved = self.job(db, job.id, uid=None)
        change.jobs.append(moved)
        return moved

    def _delete_journal(self, db: sqlite3.Connection, run_id: int) -> None:
        db.execute("DELETE FROM journal WHERE run_id = ?", (run_id,))

    def _next_seq(self, db: sqlite3.Connection, job: JobRow) -> int:
        row = one_row(db, "UPDATE jobs SET last_seq = last_seq + 1 WHERE id = ? RETURNING last_seq", job.id)
        assert row is not None
        return int(row["last_seq"])

    def _add_event(
        self, db: sqlite3.Connection, change: Change, job: JobRow, kind: str, payload: Mapping[str, Any]
    ) -> None:
        seq = self._next_seq(db, job)
        values = (job.id, seq, kind, pack(payload))
        db.execute("INSERT INTO events (job_id, seq, kind, payload) VALUES (?, ?, ?, ?)", values)
        change.events.append(Event(job_id=job.id, uid=job.uid, seq=seq, kind=kind, payload=payload))

    def _add_segment_event(
        self, db: sqlite3.Connection, change: Change, job: JobRow, run: RunRow, number: int, segment: Mapping[str, Any]
    ) -> None:
        seq = self._next_seq(db, job)
        db.execute(
            "INSERT INTO events (job_id, seq, kind, start, number) VALUES (?, ?, 'segment', ?, ?)",
            (job.id, seq, run.edition, number),
        )
        change.events.append(Event(job_id=job.id, uid=job.uid, seq=seq, kind="segment", payload={"segment": segment}))

    def _release_audio(self, db: sqlite3.Connection, change: Change, run: RunRow) -> None:
        if run.folder is not None:
            change.folders.append(run.folder)
        db.execute("UPDATE runs SET folder = NULL, audio_expires_at = NULL WHERE id = ?", (run.id,))

    def _delete_job(self, db: sqlite3.Connection, change: Change, job: JobRow) -> None:
        db.execute("DELETE FROM events WHERE job_id = ?", (job.id,))
        db.execute("DELETE FROM jobs WHERE id = ?", (job.id,))
        change.gone_jobs.append(job.id)
        if one_row(db, "SELECT 1 FROM jobs WHERE run_id = ? LIMIT 1", job.run_id) is None:
            self._release_audio(db, change, self._run(db, job.run_id))
            for table, column in (("segments", "run_id"), ("transcripts", "run_id"), ("runs", "id")):
                db.execute(f"DELETE FROM {table} WHERE {column} = ?", (job.run_id,))
            change.gone_runs.append(job.run_id)
