"""What a run has come to so far: the model's answers, and the segments that followed from them.

Both stay with a run that is cut off, and the next start goes on where they end. They belong to an *edition*: what one
model says of the recording. Another model begins another edition, and what was told of the one before is void.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from whisperd.daemon.store.moving import Moving
from whisperd.daemon.store.rows import Change, RunRow, pack
from whisperd.protocol.jobs import JobState


class Journaling(Moving):
    """The journals of runs, whose entries only the model helper understands."""

    def add_segments(
        self,
        db: sqlite3.Connection,
        run_id: int,
        segments: Sequence[Mapping[str, Any]],
        *,
        entries: Sequence[bytes] = (),
    ) -> Change:
        """Store what the model answered, and the segments that came of it, which every job of the run is told."""
        change = Change()
        run = self._find_run(db, run_id)
        if run is None or run.state is not JobState.RUNNING:
            return change
        db.executemany("INSERT INTO journal (run_id, entry) VALUES (?, ?)", [(run_id, entry) for entry in entries])
        live = self._live_jobs(db, run_id) if segments else []
        for number, segment in enumerate(segments, start=run.segments):
            db.execute("INSERT INTO segments VALUES (?, ?, ?, ?)", (run_id, run.edition, number, pack(segment)))
            for job in live:
                self._add_segment_event(db, change, job, run, number, segment)
        if segments:
            db.execute("UPDATE runs SET segments = segments + ? WHERE id = ?", (len(segments), run_id))
            change.jobs = [replace(job, last_seq=job.last_seq + len(segments)) for job in live]
            change.runs = [self._run(db, run_id)]
        return change

    def journal(self, db: sqlite3.Connection, run_id: int) -> list[bytes]:
        """Return the entries of a run, in order."""
        return [entry for (entry,) in db.execute("SELECT entry FROM journal WHERE run_id = ? ORDER BY id", (run_id,))]

    def void_journal(self, db: sqlite3.Connection, run_id: int) -> Change:
        """Return a run, whose journal the model helper cannot use, to the queue; its next start begins anew."""
        change = Change()
        run = self._find_run(db, run_id)
        if run is not None and run.state is JobState.RUNNING:
            db.execute("UPDATE runs SET made_by = NULL WHERE id = ?", (run_id,))
            self._put_back(db, change, run)
        return change

    def _begin(self, db: sqlite3.Connection, run: RunRow, made_by: str) -> bool:
        """Count a start of `run` by the model `made_by`. True when segments that were told are void."""
        db.execute("UPDATE runs SET starts = starts + 1 WHERE id = ?", (run.id,))
        if run.made_by == made_by:
            return False
        self._delete_journal(db, run.id)
        db.execute("UPDATE runs SET made_by = ?, edition = starts, segments = 0 WHERE id = ?", (made_by, run.id))
        return run.segments > 0
