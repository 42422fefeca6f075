"""How rows and audio go: when somebody asks for it, and when their time is over."""

from __future__ import annotations

import sqlite3

from whisperd.daemon.store.moving import Moving
from whisperd.daemon.store.reading import all_rows
from whisperd.daemon.store.rows import Change, JobRow, job_row
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.jobs import JobState

DAY_S = 86_400


class Forgetting(Moving):
    """Deleting."""

    def forget(self, db: sqlite3.Connection, job_id: int, *, uid: int | None) -> Change:
        """Delete an ended job with its key, and its run when no other job has it. Raises `not_found`, `bad_request`."""
        change = Change()
        job = self.job(db, job_id, uid=uid)
        if not job.state.ended:
            raise WhisperdError(ErrorCode.BAD_REQUEST, f"job {job_id} is {job.state}: cancel it first, then forget it")
        change.job, change.run = job, self._run(db, job.run_id)
        self._delete_key(db, job)
        self._delete_job(db, change, job)
        return change

    def housekeep(self, db: sqlite3.Connection, now: float, *, limit: int = 200) -> Change:
        """Delete jobs, keys and the audio of failed runs that are past their time; at most `limit` of each a call."""
        change = Change()
        keep = self._retention
        for row in all_rows(db, "SELECT * FROM jobs WHERE ended_at < ? LIMIT ?", now - keep.jobs_s, limit):
            job = job_row(row)
            if job.state is JobState.FAILED:  # free already, as long as its job was here, and not to be taken now
                self._delete_key(db, job)
            else:
                db.execute(
                    "UPDATE keys SET expires_at = ? WHERE uid = ? AND key = ? AND job_id = ?",
                    (now + keep.keys_s, job.uid, job.key, job.id),
                )
            self._delete_job(db, change, job)
        expired = "SELECT uid, key FROM keys WHERE expires_at <= ? LIMIT ?"
        db.execute(f"DELETE FROM keys WHERE (uid, key) IN ({expired})", (now, limit))
        for run in self._runs(db, "audio_expires_at <= ? LIMIT ?", now, limit):
            self._release_audio(db, change, run)
        return change

    def _delete_key(self, db: sqlite3.Connection, job: JobRow) -> None:
        """Delete a job's key, unless another job has it by now."""
        db.execute("DELETE FROM keys WHERE uid = ? AND key = ? AND job_id = ?", (job.uid, job.key, job.id))
