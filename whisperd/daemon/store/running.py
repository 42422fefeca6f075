"""A run's way through decoder and model to its end, and back into the queue when a process dies."""

from __future__ import annotations

import sqlite3

from whisperd.daemon.store.journal import Journaling
from whisperd.daemon.store.reading import ENDED_SQL, all_rows
from whisperd.daemon.store.rows import Change, RunRow, job_row
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.jobs import JobState

_MAX_DEATHS = 3


class Running(Journaling):
    """The work on a run. A run at which `_MAX_DEATHS` helper processes died is given up."""

    def recover(self, db: sqlite3.Connection, now: float) -> tuple[Change, set[str]]:
        """Put interrupted work back into the queue; return all that lives, and every folder that a row names."""
        change = Change()
        for run in self._runs(db, "state = 'running'"):
            self._put_back(db, change, run)
        for run in self._runs(db, "state = 'fetching'"):
            self._unfetch(db, change, run, now)
        live = Change(runs=self._runs(db, f"state NOT IN {ENDED_SQL}"), events=change.events)
        live.jobs = [job_row(row) for row in all_rows(db, f"SELECT * FROM jobs WHERE state NOT IN {ENDED_SQL}")]
        named = {row["folder"] for row in all_rows(db, "SELECT folder FROM runs WHERE folder IS NOT NULL")}
        return live, named

    def decoded(self, db: sqlite3.Connection, run_id: int, *, audio_s: float, truncated: bool) -> Change:
        """Record that a run's PCM is in its folder. Decoders that died at it before are forgiven."""
        db.execute(
            f"""UPDATE runs SET decoded = 1, deaths = 0, audio_s = ?, truncated = ?
                WHERE id = ? AND state NOT IN {ENDED_SQL}""",
            (audio_s, truncated, run_id),
        )
        run = self._find_run(db, run_id)
        return Change(runs=[] if run is None else [run])

    def start(self, db: sqlite3.Connection, run_id: int, now: float, made_by: str = "") -> Change:
        """Move a queued run to `running`: the model with the fingerprint `made_by` begins it, or goes on with it.

        Empty when the run has ended meanwhile.
        """
        change = Change()
        run = self._find_run(db, run_id)
        if run is None or run.state is not JobState.QUEUED:
            return change
        void = self._begin(db, run, made_by)
        self._move_run(db, change, run, JobState.RUNNING, now, discard=void)
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

    def put_back(
        self, db: sqlite3.Connection, run_id: int, now: float, *, died: bool = False, suspect: bool = False
    ) -> Change:
        """Return a run whose helper is gone to the queue.

        `died`: the helper died and worked on nothing else, which counts against the run. `suspect`: it is not known yet
        whether this run was the reason.
        """
        change = Change()
        run = self._find_run(db, run_id)
        if run is None or run.state.ended:
            return change
        db.execute("UPDATE runs SET suspicion = suspicion + ? WHERE id = ?", (suspect, run_id))
        if died and self._count_death(db, change, run, now):
            return change
        if run.state is JobState.RUNNING:
            self._put_back(db, change, run)
        elif run.state is JobState.FETCHING:
            self._unfetch(db, change, run, now)
        else:
            change.runs = [self._run(db, run_id)]
        return change

    def count_death(self, db: sqlite3.Connection, run_id: int, now: float) -> Change:
        """Count a death of the model's process against the run that was alone with it; the last one fails it."""
        change = Change()
        run = self._find_run(db, run_id)
        if run is not None and not run.state.ended and not self._count_death(db, change, run, now):
            change.runs = [self._run(db, run_id)]
        return change

    def _count_death(self, db: sqlite3.Connection, change: Change, run: RunRow, now: float) -> bool:
        """Count, and return whether that was one too many."""
        db.execute("UPDATE runs SET deaths = deaths + 1 WHERE id = ?", (run.id,))
        if run.deaths + 1 < _MAX_DEATHS:
            return False
        error = WhisperdError(
            ErrorCode.WORKER_CRASHED,
            f"the process that worked on it, and on nothing else, died {run.deaths + 1} times; the daemon's log says "
            "how. Other recordings are not affected",
        )
        self._move_run(db, change, run, JobState.FAILED, now, error=error)
        return True

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
