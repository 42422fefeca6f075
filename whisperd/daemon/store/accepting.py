"""How a job comes to be: by a submit or a retry, with a run of its own or as one more of a run that is there."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import replace

from whisperd.daemon.store.moving import Moving
from whisperd.daemon.store.reading import all_rows, one_row
from whisperd.daemon.store.rows import Change, Event, JobRow, NewJob, RunRow, pack, unpack
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.jobs import JobState

# Returns the key under which the work of a job and its run is shared, with the model of now: of what it downloads, or
# of the audio.
ModelKey = Callable[[JobRow, RunRow], bytes]


def check_retry(job: JobRow) -> None:
    """Raise `bad_request` unless a job has failed or was cancelled."""
    if job.state not in (JobState.FAILED, JobState.CANCELLED):
        hint = "its transcript is there" if job.state is JobState.DONE else "cancel it first"
        raise WhisperdError(
            ErrorCode.BAD_REQUEST,
            f"job {job.id} is {job.state}, and only failed and cancelled ones are retried: {hint}",
        )


def key_conflict(key: str) -> WhisperdError:
    """Return the error for a key that stands for another source or other options."""
    return WhisperdError(
        ErrorCode.KEY_CONFLICT,
        f"the key {key!r} belongs to a job with another source or other options: use a new key for new work",
    )


class Accepting(Moving):
    """New jobs."""

    def accept(self, db: sqlite3.Connection, new: NewJob, now: float) -> Change:
        """Make a job, and a run unless one does the same work. `Change.job` is the job, also an older one of the key.

        Raises `key_conflict`, or `not_found` for a key whose job is gone. On an error the caller deletes the folder;
        `Change.folders` says whether it is still needed.
        """
        if new.key is not None and (again := self.rejoin(db, new.uid, new.key, new.fingerprint, now)) is not None:
            if new.folder is not None:
                again.folders.append(new.folder)
            return again
        change = Change()
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

    def rejoin(self, db: sqlite3.Connection, uid: int, key: str, fingerprint: bytes, now: float) -> Change | None:
        """Return the job of a key that is in force, or None. Changes nothing. Raises `key_conflict`, `not_found`."""
        known = self.known_key(db, uid, key, now)
        if known is None:
            return None
        if known.fingerprint != fingerprint:
            raise key_conflict(key)
        return Change(job=known.job, run=known.run, reused=True)

    def retry(self, db: sqlite3.Connection, job_id: int, now: float, *, uid: int | None, model_key: ModelKey) -> Change:
        """Make a new job for the source of a failed or cancelled one; `Change.job` is the new one.

        Its work is a new run, to which the old one hands its folder over, in this transaction: of several retries the
        first gets the audio and the others join its run, and whenever the daemon is killed one row names the folder.
        Raises `not_found`, also when the audio is gone, and `bad_request` for a job that has not ended so.
        """
        job = self.job(db, job_id, uid=uid)
        check_retry(job)
        old = self._run(db, job.run_id)
        key = model_key(job, old)
        new = NewJob(
            uid=job.uid,
            priority=job.priority,
            attached=False,
            key=None,
            source=job.source,
            options=job.options,
            fresh=False,
            fingerprint=b"",
            share_key=key,
            folder=None,
            sha256="" if job.is_download else old.sha256,
            size_bytes=0 if job.is_download else old.size_bytes,
            source_key=key if job.is_download else None,
        )
        run = self._shareable_run(db, new)
        if run is None and old.state not in (JobState.FAILED, JobState.CANCELLED):
            run = old  # only the job was cancelled; others kept the work, which is of another model than today's
        if run is None or (old.fresh and run.id < old.id):  # older results are what `fresh` asked not to have
            if job.is_download:  # a video is downloaded again
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

    def _shareable_run(self, db: sqlite3.Connection, new: NewJob) -> RunRow | None:
        if new.source_key is not None:
            return self._run_with(db, "source_key", new.source_key)
        return self._run_with(db, "share_key", new.share_key)

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

    def _check_kept(self, db: sqlite3.Connection, uid: int) -> None:
        """Raise `quota_exceeded` when a user has as many jobs, ended ones included, as are kept for him.

        The count in memory misses what was deleted: it is made anew before anybody is refused.
        """
        most = self._retention.jobs_per_user
        if self._retention.unlimited(uid):
            return
        if self._kept.get(uid, most) >= most:
            counted = one_row(db, "SELECT count(*) AS n FROM (SELECT 1 FROM jobs WHERE uid = ? LIMIT ?)", uid, most)
            assert counted is not None, "a count has a row"
            self._kept[uid] = int(counted["n"])
        if self._kept[uid] >= most:
            raise WhisperdError(
                ErrorCode.QUOTA_EXCEEDED,
                f"{most} jobs of yours are kept, and one user may have no more (setting jobs_per_user): forget some",
            )
        self._kept[uid] += 1

    def _insert_job(self, db: sqlite3.Connection, new: NewJob, run: RunRow, now: float) -> JobRow:
        self._check_kept(db, new.uid)
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

    def _catch_up(
        self, db: sqlite3.Connection, change: Change, job: JobRow, run: RunRow, now: float, *, followed: bool = False
    ) -> JobRow:
        """Bring a job that is new to its run to where that is: running or done, with the segments so far.

        These are told only where it may be `followed`, by who knows it already.
        """
        if job.state is JobState.PENDING and run.state is not JobState.DONE:
            step = JobState.FETCHING if run.state is JobState.FETCHING else JobState.QUEUED
            if run.state is not JobState.PENDING:
                job = self._move_job(db, change, job, step, now)
        if run.state is JobState.RUNNING:
            job = self._move_job(db, change, job, JobState.RUNNING, now)
        self._add_segments_so_far(db, change, job, run, told=followed)
        if run.state is JobState.DONE:
            job = self._move_job(db, change, job, JobState.DONE, now)
        job = self.job(db, job.id, uid=None)
        change.jobs.append(job)
        return job

    def _add_segments_so_far(
        self, db: sqlite3.Connection, change: Change, job: JobRow, run: RunRow, *, told: bool
    ) -> None:
        """Add an event for each segment. In one statement: a long recording has thousands, and all wait meanwhile."""
        job = self.job(db, job.id, uid=None)
        added = db.execute(
            """INSERT INTO events (job_id, seq, kind, start, number)
               SELECT ?, ? + row_number() OVER (ORDER BY number), 'segment', start, number
               FROM segments WHERE run_id = ? AND start = ?""",
            (job.id, job.last_seq, run.id, run.edition),
        )
        db.execute("UPDATE jobs SET last_seq = last_seq + ? WHERE id = ?", (added.rowcount, job.id))
        if told:
            said = "SELECT payload FROM segments WHERE run_id = ? AND start = ? ORDER BY number"
            for seq, row in enumerate(all_rows(db, said, run.id, run.edition), job.last_seq + 1):
                payload = {"segment": unpack(row["payload"])}
                change.events.append(Event(job_id=job.id, uid=job.uid, seq=seq, kind="segment", payload=payload))


def _first_state(new: NewJob) -> JobState:
    return JobState.QUEUED if new.source_key is None else JobState.PENDING
