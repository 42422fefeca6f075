"""A run that begins with a download, until its audio is on hand."""

from __future__ import annotations

import sqlite3

from whisperd.daemon.store.accepting import Accepting
from whisperd.daemon.store.rows import Change, RunRow
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.jobs import JobState

MAX_FETCH_RETRIES = 3


class Fetching(Accepting):
    """Downloads: begun, done, failed. What is downloaded may turn out to be work that is known already."""

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

    def _hand_over(self, db: sqlite3.Connection, change: Change, run: RunRow, known: RunRow, now: float) -> None:
        """Give a downloaded run's jobs to the run that does the same work already, and drop it."""
        change.reused = True
        for job in self._live_jobs(db, run.id):
            job = self._move_job(db, change, job, JobState.QUEUED, now)
            db.execute("UPDATE jobs SET run_id = ? WHERE id = ?", (known.id, job.id))
            self._catch_up(db, change, self.job(db, job.id, uid=None), known, now, followed=True)
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
