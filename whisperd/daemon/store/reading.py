"""Questions to the rows, which change nothing, and how rows are found."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from whisperd.daemon.store.rows import Event, JobRow, RunRow, job_row, run_row, unpack
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.jobs import JobState

SELECT_RUNS = """
    SELECT *, state IN ('failed', 'cancelled') AND EXISTS (
        SELECT 1 FROM runs AS later
        WHERE later.id > runs.id AND (later.share_key = runs.share_key OR later.source_key = runs.source_key)
    ) AS retried FROM runs
"""
ENDED_SQL = "('done', 'failed', 'cancelled')"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A job with its transcript, packed, or None."""

    job: JobRow
    run: RunRow
    transcript: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A key in force: its job, with its run, and the fingerprint of what it was submitted with."""

    fingerprint: bytes
    job: JobRow
    run: RunRow


@dataclass(frozen=True, slots=True, kw_only=True)
class LookedUp:
    """What a submit must know before anything else: its key, if that has a job, and its user's `spool_bytes`."""

    known: Known | None
    stored_bytes: int


def not_found(job_id: int) -> WhisperdError:
    """Return the error for a job that is not there or somebody else's: the two must look alike."""
    return WhisperdError(ErrorCode.NOT_FOUND, f"no job {job_id} of yours; `whisperctl list` shows the jobs you have")


class Reading:
    """What can be asked. Every method takes the connection and runs inside the caller's transaction."""

    def job(self, db: sqlite3.Connection, job_id: int, *, uid: int | None) -> JobRow:
        """Return a job; `uid` None is an admin's view. Raises `not_found`."""
        row = one_row(db, "SELECT * FROM jobs WHERE id = ?", job_id)
        if row is None or (uid is not None and row["uid"] != uid):
            raise not_found(job_id)
        return job_row(row)

    def answer(self, db: sqlite3.Connection, job_id: int, *, uid: int | None, with_transcript: bool = True) -> Answer:
        """Return a job with its run and, once it is done, its transcript. Raises `not_found`."""
        job = self.job(db, job_id, uid=uid)
        transcript = None
        if with_transcript and job.state is JobState.DONE:
            transcript = one_row(db, "SELECT payload FROM transcripts WHERE run_id = ?", job.run_id)["payload"]  # type: ignore[index]
        return Answer(job=job, run=self._run(db, job.run_id), transcript=transcript)

    def jobs(
        self, db: sqlite3.Connection, *, uid: int | None, state: JobState | None, before: int | None, limit: int
    ) -> list[tuple[JobRow, RunRow]]:
        """Return up to `limit` jobs with their runs, newest first."""
        where, values = ["1"], []
        for condition, value in (("uid = ?", uid), ("state = ?", state), ("id < ?", before)):
            if value is not None:
                where.append(condition)
                values.append(value)
        rows = all_rows(db, f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY id DESC LIMIT ?", *values, limit)
        jobs = [job_row(row) for row in rows]
        return [(job, self._run(db, job.run_id)) for job in jobs]

    def events(self, db: sqlite3.Connection, job_id: int, *, after_seq: int, limit: int) -> list[Event]:
        """Return up to `limit` events of a job with a `seq` over `after_seq`, in order."""
        rows = all_rows(
            db,
            """SELECT e.*, j.uid, s.payload AS segment FROM events e JOIN jobs j ON j.id = e.job_id
               LEFT JOIN segments s ON s.run_id = j.run_id AND s.start = e.start AND s.number = e.number
               WHERE e.job_id = ? AND e.seq > ? ORDER BY e.seq LIMIT ?""",
            job_id,
            after_seq,
            limit,
        )
        return [_event(row) for row in rows]

    def known_key(self, db: sqlite3.Connection, uid: int, key: str, now: float) -> Known | None:
        """Return what a key that is in force stands for: not expired, and not free again because its job failed.

        Raises `not_found` when the key's job is gone already.
        """
        row = one_row(db, "SELECT * FROM keys WHERE uid = ? AND key = ?", uid, key)
        if row is None or (row["expires_at"] is not None and row["expires_at"] <= now):
            return None
        if row["expires_at"] is not None:
            raise WhisperdError(
                ErrorCode.NOT_FOUND,
                f"the job {row['job_id']} of this key is past its retention: submit under a new key",
            )
        found = one_row(db, "SELECT * FROM jobs WHERE id = ?", row["job_id"])
        if found is None or found["state"] == JobState.FAILED:
            return None
        job = job_row(found)
        return Known(fingerprint=row["fingerprint"], job=job, run=self._run(db, job.run_id))

    def totals(self, db: sqlite3.Connection) -> dict[str, int]:
        """Return how many jobs there are in each state."""
        return {row["state"]: row["n"] for row in all_rows(db, "SELECT state, count(*) AS n FROM jobs GROUP BY state")}

    def look_up(self, db: sqlite3.Connection, uid: int, key: str | None, now: float) -> LookedUp:
        """Return what a submit must know of its user and its key. Raises what `known_key` raises."""
        known = None if key is None else self.known_key(db, uid, key, now)
        return LookedUp(known=known, stored_bytes=self.spool_bytes(db, uid))

    def spool_bytes(self, db: sqlite3.Connection, uid: int) -> int:
        """Return what a user's audio takes in the spool: sources, and what is decoded of them (s16le, 16 kHz)."""
        total = 0
        for kept in (f"state NOT IN {ENDED_SQL}", "audio_expires_at IS NOT NULL"):  # each with its partial index
            row = one_row(
                db,
                f"""SELECT CAST(coalesce(sum(size_bytes + decoded * coalesce(audio_s, 0) * 32000), 0) AS INTEGER) AS n
                    FROM runs WHERE {kept} AND uid = ?""",
                uid,
            )
            assert row is not None, "a sum has a row"
            total += int(row["n"])
        return total

    def _runs(self, db: sqlite3.Connection, where: str, *values: Any) -> list[RunRow]:
        return [run_row(row) for row in all_rows(db, f"{SELECT_RUNS} WHERE {where}", *values)]

    def _find_run(self, db: sqlite3.Connection, run_id: int) -> RunRow | None:
        row = one_row(db, f"{SELECT_RUNS} WHERE id = ?", run_id)
        return None if row is None else run_row(row)

    def _run(self, db: sqlite3.Connection, run_id: int) -> RunRow:
        run = self._find_run(db, run_id)
        assert run is not None, "a job's run cannot be gone before the job"
        return run

    def _live_jobs(self, db: sqlite3.Connection, run_id: int) -> list[JobRow]:
        rows = all_rows(db, f"SELECT * FROM jobs WHERE run_id = ? AND state NOT IN {ENDED_SQL} ORDER BY id", run_id)
        return [job_row(row) for row in rows]

    def _run_with(self, db: sqlite3.Connection, column: str, key: bytes) -> RunRow | None:
        """Return the newest run with a key that did not end in vain."""
        rows = self._runs(db, f"{column} = ? AND state NOT IN ('failed', 'cancelled') ORDER BY id DESC LIMIT 1", key)
        return rows[0] if rows else None


def _event(row: sqlite3.Row) -> Event:
    payload = {"segment": unpack(row["segment"])} if row["kind"] == "segment" else unpack(row["payload"])
    return Event(job_id=row["job_id"], uid=row["uid"], seq=row["seq"], kind=row["kind"], payload=payload)


def all_rows(db: sqlite3.Connection, sql: str, *values: Any) -> Iterable[sqlite3.Row]:
    """Return all rows of a query."""
    cursor = db.execute(sql, values)
    cursor.row_factory = sqlite3.Row
    return cursor.fetchall()


def one_row(db: sqlite3.Connection, sql: str, *values: Any) -> sqlite3.Row | None:
    """Return the first row of a query, or None."""
    cursor = db.execute(sql, values)
    cursor.row_factory = sqlite3.Row
    row: sqlite3.Row | None = cursor.fetchone()
    return row
