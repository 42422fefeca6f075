"""The durable queue: every change of jobs and runs, each one function over the rows, run in the store thread.

Knows no sockets and no helpers. A call checks the rows as they are when it runs, so two that cross are settled by the
order of their transactions. Where a call comes too late (the job has ended meanwhile) it changes nothing and says so by
an empty `Change`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from whisperd.daemon.rows import Change, Event, JobRow, NewJob, RunRow, job_row, pack, run_row, unpack
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.jobs import ENDED, JobState, check_move

DAY_S = 86_400
MAX_FETCH_RETRIES = 3
_ENDED_SQL = "('done', 'failed', 'cancelled')"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long things are kept after their end, in seconds."""

    jobs_s: float
    keys_s: float
    failed_audio_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A job with its transcript, packed, or None."""

    job: JobRow
    run: RunRow
    transcript: bytes | None


# Returns the key under which the work of a run is shared, with the model of now.
ModelKey = Callable[[RunRow], bytes]


def check_retry(job: JobRow) -> None:
    """Raise `bad_request` unless a job has failed or was cancelled."""
    if job.state not in (JobState.FAILED, JobState.CANCELLED):
        hint = "its transcript is there" if job.state is JobState.DONE else "cancel it first"
        raise WhisperdError(
            ErrorCode.BAD_REQUEST,
            f"job {job.id} is {job.state}, and only failed and cancelled ones are retried: {hint}",
        )


def not_found(job_id: int) -> WhisperdError:
    """Return the error for a job that is not there or somebody else's: the two must look alike."""
    return WhisperdError(ErrorCode.NOT_FOUND, f"no job {job_id} of yours; `whisperctl list` shows the jobs you have")


class Store:
    """The operations. Every method takes the connection and runs inside the caller's transaction."""

    def __init__(self, retention: Retention, max_deaths: int = 3) -> None:
        self._retention = retention
        self._max_deaths = max_deaths

    # -- reading -----------------------------------------------------------------------------------------------

    def job(self, db: sqlite3.Connection, job_id: int, *, uid: int | None) -> JobRow:
        """Return a job; `uid` None is an admin's view. Raises `not_found`."""
        row = _one(db, "SELECT * FROM jobs WHERE id = ?", job_id)
        if row is None or (uid is not None and row["uid"] != uid):
            raise not_found(job_id)
        return job_row(row)

    def answer(self, db: sqlite3.Connection, job_id: int, *, uid: int | None, with_transcript: bool = True) -> Answer:
        """Return a job with its run and, once it is done, its transcript. Raises `not_found`."""
        job = self.job(db, job_id, uid=uid)
        transcript = None
        if with_transcript and job.state is JobState.DONE:
            transcript = _one(db, "SELECT payload FROM transcripts WHERE run_id = ?", job.run_id)["payload"]  # type: ignore[index]
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
        rows = _all(db, f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY id DESC LIMIT ?", *values, limit)
        jobs = [job_row(row) for row in rows]
        return [(job, self._run(db, job.run_id)) for job in jobs]

    def events(self, db: sqlite3.Connection, job_id: int, *, after_seq: int, limit: int) -> list[Event]:
        """Return up to `limit` events of a job with a `seq` over `after_seq`, in order."""
        rows = _all(
            db,
            """SELECT e.*, j.uid, s.payload AS segment FROM events e JOIN jobs j ON j.id = e.job_id
               LEFT JOIN segments s ON s.run_id = j.run_id AND s.start = e.start AND s.number = e.number
               WHERE e.job_id = ? AND e.seq > ? ORDER BY e.seq LIMIT ?""",
            job_id,
            after_seq,
            limit,
        )
        return [_event(row) for row in rows]

    def known_key(self, db: sqlite3.Connection, uid: int, key: str, now: float) -> sqlite3.Row | None:
        """Return the row of a key that is in force: not expired, and not free again because its job failed.

        Raises `not_found` when the key's job is gone already.
        """
        row = _one(db, "SELECT * FROM keys WHERE uid = ? AND key = ?", uid, key)
        if row is None or (row["expires_at"] is not None and row["expires_at"] <= now):
            return None
        if row["expires_at"] is not None:
            raise WhisperdError(
                ErrorCode.NOT_FOUND,
                f"the job {row['job_id']} of this key is past its retention: submit under a new key",
            )
        state = _one(db, "SELECT state FROM jobs WHERE id = ?", row["job_id"])
        return None if state is None or state["state"] == JobState.FAILED else row

    def totals(self, db: sqlite3.Connection) -> dict[str, int]:
        """Return how many jobs there are in each state."""
        return {row["state"]: row["n"] for row in _all(db, "SELECT state, count(*) AS n FROM jobs GROUP BY state")}

    def look_up(self, db: sqlite3.Connection, uid: int, key: str | None, now: float) -> tuple[sqlite3.Row | None, int]:
        """Return what a submit must know of its user: the row of its key in force, and `spool_bytes`."""
        return (None if key is None else self.known_key(db, uid, key, now)), self.spool_bytes(db, uid)

    def spool_bytes(self, db: sqlite3.Connection, uid: int) -> int:
        """Return what a user's audio takes in the spool: sources, and what is decoded of them (s16le, 16 kHz)."""
        total = 0
        for kept in (f"state NOT IN {_ENDED_SQL}", "audio_expires_at IS NOT NULL"):  # each with its partial index
            row = _one(
                db,
                f"""SELECT CAST(coalesce(sum(size_bytes + decoded * coalesce(audio_s, 0) * 32000), 0) AS INTEGER) AS n
                    FROM runs WHERE {kept} AND uid = ?""",
                uid,
            )
            assert row is not None, "a sum has a row"
            total += int(row["n"])
        return total

    # -- starting up -------------------------------------------------------------------------------------------

    def recover(self, db: sqlite3.Connection, now: float) -> tuple[Change, set[str]]:
        """Put interrupted work back into the queue; return all that lives, and every folder that a row names."""
        change = Change()
        for run in self._runs(db, "state = 'running'"):
            self._put_back(db, change, run)
        for run in self._runs(db, "state = 'fetching'"):
            self._unfetch(db, change, run, now)
        live = Change(runs=self._runs(db, f"state NOT IN {_ENDED_SQL}"), events=change.events)
        live.jobs = [job_row(row) for row in _all(db, f"SELECT * FROM jobs WHERE state NOT IN {_ENDED_SQL}")]
        named = {row["folder"] for row in _all(db, "SELECT folder FROM runs WHERE folder IS NOT NULL")}
        return live, named

    # -- a job's life ------------------------------------------------------------------------------------------

    def accept(self, db: sqlite3.Connection, new: NewJob, now: float) -> Change:
        """Make a job, and a run unless one does the same work. `Change.job` is the job, also an older one of the key.

        Raises `key_conflict`, or `not_found` for a key whose job is gone. On an error the caller deletes the folder;
        `Change.folders` says whether it is still needed.
        """
        change = Change()
        if new.key is not None and (known := self.known_key(db, new.uid, new.key, now)) is not None:
            if known["fingerprint"] != new.fingerprint:
                raise key_conflict(new.key)
            change.job, change.reused = self.job(db, known["job_id"], uid=None), True
            change.run = self._run(db, change.job.run_id)
            if new.folder is not None:
                change.folders.append(new.folder)
            return change
        run = None if new.fresh else self._shareable_run(db, new)
        change.reused = run is not None
        if run is None:
            run = self._insert_run(db, new, now)
            change.runs.append(run)
        elif new.folder is not None:
            change.folders.append(new.folder)
        job = self._insert_job(db, new, run, now)
        self._add_event(db, change, job, "state", {"state": job.state})
        job = self._catch_up(db, change, job, run, now)
        if new.key is not None:
            db.execute(
                "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, NULL)", (new.uid, new.key, job.id, new.fingerprint)
            )
        change.job, change.run = job, self._run(db, run.id)
        return change

    def fetch_started(self, db: sqlite3.Connection, run_id: int, folder: str, now: float) -> Change:
        """Move a pending run to `fetching`. Each try has a folder of its own: what an earlier one left is swept.

        Empty when the run has ended meanwhile.
        """
        change = Change()
        run = self._find_run(db, run_id)
        if run is not None and run.state is JobState.PENDING:
            db.execute("UPDATE runs SET folder = ? WHERE id = ?", (folder, run_id))
            self._move_run(db, change, run, JobState.FETCHING, now)
        return change

    def fetched(
        self,
        db: sqlite3.Connection,
        run_id: int,
        now: float,
        *,
        sha256: str,
        size_bytes: int,
        title: str | None,
        share_key: bytes,
    ) -> Change:
        """Move a run to `queued`: its audio is in its folder. Work that is known by now takes its jobs over."""
        change = Change()
        run = self._find_run(db, run_id)
        if run is None or run.state is not JobState.FETCHING:
            return change
        known = None if run.fresh else self._run_with(db, "share_key", share_key)
        if known is not None:
            self._hand_over(db, change, run, known, now)
            return change
        db.execute(
            "UPDATE runs SET sha256 = ?, size_bytes = ?, title = ?, share_key = ? WHERE id = ?",
            (sha256, size_bytes, title, share_key, run_id),
        )
        self._move_run(db, change, run, JobState.QUEUED, now)
        return change

    def fetch_failed(
        self, db: sqlite3.Connection, run_id: int, error: WhisperdError, now: float, *, counts: bool = True
    ) -> Change:
        """Return a run to `pending`, to be downloaded again; one failure too many (those that count) fails it."""
        change = Change()
        run = self._find_run(db, run_id)
        if run is None or run.state is not JobState.FETCHING:
            return change
        if counts and run.fetch_failures >= MAX_FETCH_RETRIES:
            self._move_run(db, change, run, JobState.FAILED, now, error=error)
            return change
        db.execute("UPDATE runs SET fetch_failures = fetch_failures + ? WHERE id = ?", (counts, run_id))
        self._unfetch(db, change, run, now)
        return change

    def decoded(self, db: sqlite3.Connection, run_id: int, *, audio_s: float, truncated: bool) -> Change:
        """Record that a run's PCM is in its folder."""
        db.execute(
            f"UPDATE runs SET decoded = 1, audio_s = ?, truncated = ? WHERE id = ? AND state NOT IN {_ENDED_SQL}",
            (audio_s, truncated, run_id),
        )
        return self._touched(db, run_id)

    def start(self, db: sqlite3.Connection, run_id: int, now: float) -> Change:
        """Move a queued run to `running`: the model begins it. Empty when the run has ended meanwhile."""
        change = Change()
        run = self._find_run(db, run_id)
        if run is None or run.state is not JobState.QUEUED:
            return change
        db.execute("UPDATE runs SET starts = starts + 1, segments = 0 WHERE id = ?", (run_id,))
        self._move_run(db, change, run, JobState.RUNNING, now)
        return change

    def add_segments(self, db: sqlite3.Connection, run_id: int, segments: Sequence[Mapping[str, Any]]) -> Change:
        """Store the segments of one window and tell every job of the run."""
        change = Change()
        run = self._find_run(db, run_id)
        if run is None or run.state is not JobState.RUNNING:
            return change
        for number, segment in enumerate(segments, start=run.segments):
            db.execute("INSERT INTO segments VALUES (?, ?, ?, ?)", (run_id, run.starts, number, pack(segment)))
            for job in self._live_jobs(db, run_id):
                self._add_segment_event(db, change, job, run, number, segment)
        db.execute("UPDATE runs SET segments = segments + ? WHERE id = ?", (len(segments), run_id))
        change.jobs = self._live_jobs(db, run_id)
        change.runs = [self._run(db, run_id)]
        return change

    def finish(self, db: sqlite3.Connection, run_id: int, transcript: bytes, now: float) -> Change:
        """End a running run with its transcript; its audio is not needed any more."""
        change = Change()
        run = self._find_run(db, run_id)
        if run is None or run.state is not JobState.RUNNING:
            return change
        db.execute("INSERT INTO transcripts VALUES (?, ?)", (run_id, transcript))
        self._release_audio(db, change, run)
        self._move_run(db, change, run, JobState.DONE, now)
        return change

    def fail(self, db: sqlite3.Connection, run_id: int, error: WhisperdError, now: float) -> Change:
        """End a run and its jobs with an error; the audio is kept for a while."""
        change = Change()
        run = self._find_run(db, run_id)
        if run is not None and not run.state.ended:
            self._move_run(db, change, run, JobState.FAILED, now, error=error)
        return change

    def put_back(self, db: sqlite3.Connection, run_id: int, now: float, *, died: bool) -> Change:
        """Return a run whose helper is gone to the queue; `died` counts against it, and the last death fails it."""
        change = Change()
        run = self._find_run(db, run_id)
        if run is None or run.state.ended:
            return change
        if died:
            db.execute("UPDATE runs SET deaths = deaths + 1 WHERE id = ?", (run_id,))
            if run.deaths + 1 >= self._max_deaths:
                error = WhisperdError(
                    ErrorCode.WORKER_CRASHED,
                    f"the process that worked on it died {run.deaths + 1} times; the daemon's log says how",
                )
                self._move_run(db, change, run, JobState.FAILED, now, error=error)
                return change
        if run.state is JobState.RUNNING:
            self._put_back(db, change, run)
        elif run.state is JobState.FETCHING:
            self._unfetch(db, change, run, now)
        else:
            change.runs = [self._run(db, run_id)]
        return change

    def cancel(self, db: sqlite3.Connection, job_id: int, now: float, *, uid: int | None) -> Change:
        """Cancel a job; the run ends with its last job. An ended job comes back unchanged. Raises `not_found`."""
        change = Change()
        job = self.job(db, job_id, uid=uid)
        if not job.state.ended:
            self._move_job(db, change, job, JobState.CANCELLED, now)
            if not self._live_jobs(db, job.run_id):
                self._move_run(db, change, self._run(db, job.run_id), JobState.CANCELLED, now)
        change.job, change.run = self.job(db, job_id, uid=None), self._run(db, job.run_id)
        return change

    def retry(self, db: sqlite3.Connection, job_id: int, now: float, *, uid: int | None, model_key: ModelKey) -> Change:
        """Make a new job for the source of a failed or cancelled one; `Change.job` is the new one.

        Its work is a new run, to which the old one hands its folder over, in this transaction: of several retries the
        first gets the audio and the others join its run, and whenever the daemon is killed one row names the folder.
        Raises `not_found`, also when the audio is gone, and `bad_request` for a job that has not ended so.
        """
        job = self.job(db, job_id, uid=uid)
        check_retry(job)
        old = self._run(db, job.run_id)
        is_file = old.source_key is None
        new = NewJob(
            uid=job.uid,
            priority=job.priority,
            attached=False,
            key=None,
            source=job.source,
            options=job.options,
            fresh=False,
            fingerprint=b"",
            share_key=model_key(old),
            folder=None,
            sha256=old.sha256 if is_file else "",
            size_bytes=old.size_bytes if is_file else 0,
            source_key=None if is_file else model_key(old),
        )
        run = self._shareable_run(db, new)
        if run is None and old.state not in (JobState.FAILED, JobState.CANCELLED):
            run = old  # only the job was cancelled; others kept the work, which is of another model than today's
        if run is None or (old.fresh and run.id < old.id):  # older results are what `fresh` asked not to have
            if not is_file:  # a video is downloaded again
                return self.accept(db, replace(new, fresh=old.fresh), now)
            giver = self._keeper(db, old)
            change = Change()
            new_run = self._insert_run(db, replace(new, folder=giver.folder, fresh=old.fresh), now)
            db.execute("UPDATE runs SET folder = NULL, audio_expires_at = NULL WHERE id = ?", (giver.id,))
            db.execute(
                "UPDATE runs SET decoded = ?, audio_s = ?, truncated = ? WHERE id = ?",
                (giver.decoded, giver.audio_s, giver.truncated, new_run.id),
            )
            run = self._run(db, new_run.id)
            change.runs.append(run)
        else:
            change = Change(reused=True)
        again = self._insert_job(db, new, run, now)
        self._add_event(db, change, again, "state", {"state": again.state})
        change.job, change.run = self._catch_up(db, change, again, run, now), run
        return change

    def _keeper(self, db: sqlite3.Connection, old: RunRow) -> RunRow:
        """Return the ended run that keeps this audio: the run itself, or a later one that got it for the same work."""
        found = self._runs(
            db,
            """audio_expires_at IS NOT NULL AND folder IS NOT NULL AND uid = ? AND sha256 = ? AND options = ?
               ORDER BY id DESC LIMIT 1""",
            old.uid,
            old.sha256,
            pack(old.options),
        )
        if not found:
            raise WhisperdError(
                ErrorCode.NOT_FOUND,
                "the audio of this job is not kept any more (setting keep_failed_audio_hours): submit the recording "
                "again",
            )
        return found[0]

    def forget(self, db: sqlite3.Connection, job_id: int, *, uid: int | None) -> Change:
        """Delete an ended job with its key, and its run when no other job has it. Raises `not_found`, `bad_request`."""
        change = Change()
        job = self.job(db, job_id, uid=uid)
        if not job.state.ended:
            raise WhisperdError(ErrorCode.BAD_REQUEST, f"job {job_id} is {job.state}: cancel it first, then forget it")
        change.job, change.run = job, self._run(db, job.run_id)
        db.execute("DELETE FROM keys WHERE uid = ? AND key = ? AND job_id = ?", (job.uid, job.key, job_id))
        self._delete_job(db, change, job)
        return change

    def housekeep(self, db: sqlite3.Connection, now: float, *, limit: int = 200) -> Change:
        """Delete jobs, keys and the audio of failed runs that are past their time; at most `limit` of each a call."""
        change = Change()
        keep = self._retention
        for row in _all(db, "SELECT * FROM jobs WHERE ended_at < ? LIMIT ?", now - keep.jobs_s, limit):
            job = job_row(row)
            db.execute(
                "UPDATE keys SET expires_at = ? WHERE uid = ? AND key = ? AND job_id = ?",
                (now + keep.keys_s, job.uid, job.key, job.id),
            )
            self._delete_job(db, change, job)
        db.execute("DELETE FROM keys WHERE expires_at <= ?", (now,))
        for run in self._runs(db, "audio_expires_at <= ? LIMIT ?", now, limit):
            self._release_audio(db, change, run)
        return change

    # -- pieces ------------------------------------------------------------------------------------------------

    def _runs(self, db: sqlite3.Connection, where: str, *values: Any) -> list[RunRow]:
        return [run_row(row) for row in _all(db, f"SELECT * FROM runs WHERE {where}", *values)]

    def _find_run(self, db: sqlite3.Connection, run_id: int) -> RunRow | None:
        row = _one(db, "SELECT * FROM runs WHERE id = ?", run_id)
        return None if row is None else run_row(row)

    def _run(self, db: sqlite3.Connection, run_id: int) -> RunRow:
        run = self._find_run(db, run_id)
        assert run is not None, "a job's run cannot be gone before the job"
        return run

    def _live_jobs(self, db: sqlite3.Connection, run_id: int) -> list[JobRow]:
        rows = _all(db, f"SELECT * FROM jobs WHERE run_id = ? AND state NOT IN {_ENDED_SQL} ORDER BY id", run_id)
        return [job_row(row) for row in rows]

    def _touched(self, db: sqlite3.Connection, run_id: int) -> Change:
        run = self._find_run(db, run_id)
        return Change(runs=[] if run is None else [run])

    def _shareable_run(self, db: sqlite3.Connection, new: NewJob) -> RunRow | None:
        if new.source_key is not None:
            return self._run_with(db, "source_key", new.source_key)
        return self._run_with(db, "share_key", new.share_key)

    def _run_with(self, db: sqlite3.Connection, column: str, key: bytes) -> RunRow | None:
        """Return the newest run with a key that did not end in vain."""
        rows = self._runs(db, f"{column} = ? AND state NOT IN ('failed', 'cancelled') ORDER BY id DESC LIMIT 1", key)
        return rows[0] if rows else None

    def _hand_over(self, db: sqlite3.Connection, change: Change, run: RunRow, known: RunRow, now: float) -> None:
        """Give a downloaded run's jobs to the run that does the same work already, and drop it."""
        change.reused = True
        for job in self._live_jobs(db, run.id):
            job = self._move_job(db, change, job, JobState.QUEUED, now)
            db.execute("UPDATE jobs SET run_id = ? WHERE id = ?", (known.id, job.id))
            self._catch_up(db, change, self.job(db, job.id, uid=None), known, now)
        # Jobs that were cancelled meanwhile keep their row, and with it a run.
        db.execute("UPDATE jobs SET run_id = ? WHERE run_id = ?", (known.id, run.id))
        db.execute(
            "UPDATE runs SET source_key = ?, title = coalesce(title, ?) WHERE id = ? AND source_key IS NULL",
            (run.source_key, run.title, known.id),
        )
        self._release_audio(db, change, run)
        db.execute("DELETE FROM runs WHERE id = ?", (run.id,))
        change.runs.append(self._run(db, known.id))
        change.gone_runs.append(run.id)

    def _unfetch(self, db: sqlite3.Connection, change: Change, run: RunRow, now: float) -> None:
        """`fetching` → `pending`. What was downloaded is not used again: the next try may be sent something else."""
        self._release_audio(db, change, run)
        self._move_run(db, change, run, JobState.PENDING, now)

    def _insert_run(self, db: sqlite3.Connection, new: NewJob, now: float) -> RunRow:
        cursor = db.execute(
            """INSERT INTO runs (uid, state, share_key, folder, sha256, size_bytes, options, source, source_key, fresh,
               created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
            (
                new.uid,
                _first_state(new),
                new.share_key,
                new.folder,
                new.sha256,
                new.size_bytes,
                pack(new.options),
                None if new.source_key is None else pack(new.source),
                new.source_key,
                new.fresh,
                now,
            ),
        )
        assert cursor.lastrowid is not None
        return self._run(db, cursor.lastrowid)

    def _insert_job(self, db: sqlite3.Connection, new: NewJob, run: RunRow, now: float) -> JobRow:
        cursor = db.execute(
            """INSERT INTO jobs (run_id, uid, state, priority, attached, key, source, options, submitted_at)
               VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)""",
            (
                run.id,
                new.uid,
                _first_state(new),
                new.priority,
                new.attached,
                new.key,
                pack(new.source),
                pack(new.options),
                now,
            ),
        )
        assert cursor.lastrowid is not None
        return self.job(db, cursor.lastrowid, uid=None)

    def _catch_up(self, db: sqlite3.Connection, change: Change, job: JobRow, run: RunRow, now: float) -> JobRow:
        """Bring a new job to where its run is: running or done, with the segments so far."""
        if job.state is JobState.PENDING and run.state is not JobState.DONE:
            step = JobState.FETCHING if run.state is JobState.FETCHING else JobState.QUEUED
            if run.state is not JobState.PENDING:
                job = self._move_job(db, change, job, step, now)
        if run.state is JobState.RUNNING:
            job = self._move_job(db, change, job, JobState.RUNNING, now)
        for row in _all(
            db, "SELECT * FROM segments WHERE run_id = ? AND start = ? ORDER BY number", run.id, run.starts
        ):
            self._add_segment_event(db, change, job, run, row["number"], unpack(row["payload"]))
        if run.state is JobState.DONE:
            job = self._move_job(db, change, job, JobState.DONE, now)
        job = self.job(db, job.id, uid=None)
        change.jobs.append(job)
        return job

    def _put_back(self, db: sqlite3.Connection, change: Change, run: RunRow) -> None:
        """`running` → `queued`. Segments told so far are void: the run begins again."""
        check_move(run.state, JobState.QUEUED)
        db.execute("UPDATE runs SET state = 'queued', segments = 0 WHERE id = ?", (run.id,))
        for job in self._live_jobs(db, run.id):
            check_move(job.state, JobState.QUEUED)
            db.execute("UPDATE jobs SET state = 'queued', started_at = NULL WHERE id = ?", (job.id,))
            payload = {"state": JobState.QUEUED} | ({"discard": True} if run.segments else {})
            self._add_event(db, change, job, "state", payload)
        change.runs.append(self._run(db, run.id))
        change.jobs.extend(self._live_jobs(db, run.id))

    def _move_run(
        self,
        db: sqlite3.Connection,
        change: Change,
        run: RunRow,
        state: JobState,
        now: float,
        *,
        error: WhisperdError | None = None,
    ) -> None:
        check_move(run.state, state)
        live = self._live_jobs(db, run.id)
        db.execute("UPDATE runs SET state = ? WHERE id = ?", (state, run.id))
        if state in ENDED:
            db.execute("UPDATE runs SET ended_at = ? WHERE id = ?", (now, run.id))
            if run.sha256 == "":  # nothing has been downloaded, or not all of it
                self._release_audio(db, change, run)
            elif state is not JobState.DONE:
                expires = now + self._retention.failed_audio_s
                db.execute("UPDATE runs SET audio_expires_at = ? WHERE id = ?", (expires, run.id))
        for job in live:
            self._move_job(db, change, job, state, now, error=error)
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
            self._add_event(db, change, job, "state", {"state": state})
        moved = self.job(db, job.id, uid=None)
        change.jobs.append(moved)
        return moved

    def _next_seq(self, db: sqlite3.Connection, job: JobRow) -> int:
        row = _one(db, "UPDATE jobs SET last_seq = last_seq + 1 WHERE id = ? RETURNING last_seq", job.id)
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
            (job.id, seq, run.starts, number),
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
        if _one(db, "SELECT 1 FROM jobs WHERE run_id = ? LIMIT 1", job.run_id) is None:
            self._release_audio(db, change, self._run(db, job.run_id))
            for table, column in (("segments", "run_id"), ("transcripts", "run_id"), ("runs", "id")):
                db.execute(f"DELETE FROM {table} WHERE {column} = ?", (job.run_id,))
            change.gone_runs.append(job.run_id)


def _first_state(new: NewJob) -> JobState:
    return JobState.QUEUED if new.source_key is None else JobState.PENDING


def key_conflict(key: str) -> WhisperdError:
    """Return the error for a key that stands for another source or other options."""
    return WhisperdError(
        ErrorCode.KEY_CONFLICT,
        f"the key {key!r} belongs to a job with another source or other options: use a new key for new work",
    )


def _event(row: sqlite3.Row) -> Event:
    payload = {"segment": unpack(row["segment"])} if row["kind"] == "segment" else unpack(row["payload"])
    return Event(job_id=row["job_id"], uid=row["uid"], seq=row["seq"], kind=row["kind"], payload=payload)


def _all(db: sqlite3.Connection, sql: str, *values: Any) -> Iterable[sqlite3.Row]:
    cursor = db.execute(sql, values)
    cursor.row_factory = sqlite3.Row
    return cursor.fetchall()


def _one(db: sqlite3.Connection, sql: str, *values: Any) -> sqlite3.Row | None:
    cursor = db.execute(sql, values)
    cursor.row_factory = sqlite3.Row
    row: sqlite3.Row | None = cursor.fetchone()
    return row
