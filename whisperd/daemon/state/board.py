"""The board: the loop's own view of all that lives, as of the last commit, with what only memory knows (progress).

`health`, positions and the lanes read it; nothing here touches a disk. `apply` is the only way rows get in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from whisperd.daemon.scheduler import Turns, Waiting
from whisperd.daemon.state.line import Line
from whisperd.daemon.store.rows import Change, JobRow, RunRow
from whisperd.protocol.jobs import WAITING, Job, JobState, Priority

_FIRST_PHASES = {JobState.PENDING: "waiting for its download", JobState.FETCHING: "downloading"}


@dataclass(slots=True)
class LiveRun:
    """A run that has not ended. `phase` is a few words for people, `done` of `total` its lane's own unit."""

    row: RunRow
    phase: str
    done: float = 0.0
    total: float = 0.0
    eta_s: float | None = None

    @property
    def progress(self) -> float:
        """How far the model is, 0...1: decoding does not count."""
        if self.row.state is not JobState.RUNNING or self.total <= 0:
            return 0.0
        return min(1.0, self.done / self.total)


class Board:
    """Live jobs and runs by id."""

    def __init__(self, turns: Turns) -> None:
        self.jobs: dict[int, JobRow] = {}
        self.runs: dict[int, LiveRun] = {}
        self.turns = turns  # the model lane's: positions are told by them
        self.moves = 0  # grows with whatever may change what those who wait are told
        self._model_words = ""
        # What waits for each lane, and what the fetchers have. `_line` is all of it, in the order of the model.
        self.to_fetch, self.fetching, self.to_decode, self.to_transcribe, self._line = (Line() for _ in range(5))
        self.fetched_bytes = 0  # of downloaded audio that waits for the model
        self._fetched: dict[int, int] = {}  # of each run
        self._jobs_of: dict[int, set[int]] = {}
        self._waiting: Counter[tuple[int, Priority]] | None = None

    def apply(self, change: Change) -> None:
        """Take over what a committed call changed."""
        self._waiting = None
        touched = {run.id for run in change.runs} | {job.run_id for job in change.jobs} | set(change.gone_runs)
        for run in change.runs:
            if run.state.ended:
                self.runs.pop(run.id, None)
            elif (live := self.runs.get(run.id)) is not None:
                self.moves += live.row.state is not run.state
                live.row = run
            else:
                first = "waiting for the model" if run.decoded else "waiting for decoding"
                self.runs[run.id] = LiveRun(run, _FIRST_PHASES.get(run.state, first))
        for run_id in change.gone_runs:
            self.runs.pop(run_id, None)
        for job in change.jobs:
            known = self.jobs.get(job.id)
            if known is not None and known.run_id != job.run_id:  # its work was found to be another run's
                self._leave(known)
                touched.add(known.run_id)
            if job.state.ended:
                self.jobs.pop(job.id, None)
                self._leave(job)
            else:
                self.jobs[job.id] = job
                self._jobs_of.setdefault(job.run_id, set()).add(job.id)
        for run_id in touched:
            self._line_up(run_id)

    def _line_up(self, run_id: int) -> None:
        live = self.runs.get(run_id)
        stage = None if live is None else self._stage(live.row)
        for line in (self.to_fetch, self.fetching, self.to_decode, self.to_transcribe):
            if line is not stage:
                line.remove(run_id)
        self.fetched_bytes -= self._fetched.pop(run_id, 0)
        if live is None or stage is None:
            self.moves += self._line.remove(run_id)
            return
        priority = self.priority(run_id)
        stage.put(run_id, live.row.uid, priority)
        self.moves += self._line.put(run_id, live.row.uid, priority)
        if live.row.source is not None and live.row.state is JobState.QUEUED:
            self._fetched[run_id] = live.row.size_bytes
            self.fetched_bytes += live.row.size_bytes

    def _stage(self, row: RunRow) -> Line | None:
        match row.state:
            case JobState.PENDING:
                return self.to_fetch
            case JobState.FETCHING:
                return self.fetching
            case JobState.QUEUED:
                return self.to_transcribe if row.decoded else self.to_decode
        return None

    def _leave(self, job: JobRow) -> None:
        mates = self._jobs_of.get(job.run_id, set())
        mates.discard(job.id)
        if not mates:
            self._jobs_of.pop(job.run_id, None)

    def jobs_of(self, run_id: int) -> list[JobRow]:
        """Return the live jobs of a run."""
        return [self.jobs[job_id] for job_id in sorted(self._jobs_of.get(run_id, ()))]

    def priority(self, run_id: int) -> Priority:
        """Return a run's priority: the highest of its jobs."""
        interactive = any(job.priority is Priority.INTERACTIVE for job in self.jobs_of(run_id))
        return Priority.INTERACTIVE if interactive else Priority.BACKGROUND

    def waiting(self, runs: Iterable[LiveRun]) -> list[Waiting]:
        """Return runs as the scheduler sees them."""
        return [
            Waiting(id=run.row.id, uid=run.row.uid, priority=self.priority(run.row.id), order=run.row.id)
            for run in runs
        ]

    def waiting_jobs(self) -> Counter[tuple[int, Priority]]:
        """Return how many jobs wait (are accepted and not running), by user and priority."""
        if self._waiting is None:
            waiting = (job for job in self.jobs.values() if job.state in WAITING)
            self._waiting = Counter((job.uid, job.priority) for job in waiting)
        return self._waiting

    def joined_jobs(self, uid: int) -> int:
        """Return how many live jobs of a user are for a run that another one of his is for already."""
        runs = [job.run_id for job in self.jobs.values() if job.uid == uid]
        return len(runs) - len(set(runs))

    def position(self, run_id: int) -> int | None:
        """Return a waiting run's place in the order of the model lane, 1 = next; None for one that does not wait."""
        return self._line.place(run_id, self.turns)

    def served(self, run_id: int) -> None:
        """Note that the model lane took a run: its user's turn is over."""
        self.turns.serve(self.priority(run_id), self.runs[run_id].row.uid)
        self.moves += 1

    def note_model(self, words: str) -> None:
        """Note for people why the model cannot work yet (it is being loaded); "" when that is not so."""
        self.moves += words != self._model_words
        self._model_words = words

    def phase(self, live: LiveRun) -> str:
        """Return in a few words, for people, what a run does or waits for."""
        waits_for_the_model = live.row.state is JobState.QUEUED and live.row.decoded
        return self._model_words if waits_for_the_model and self._model_words else live.phase

    def progress(self, live: LiveRun) -> dict[str, Any]:
        """Return what a `progress` event says of a run."""
        return {
            "progress": live.progress,
            "phase": self.phase(live),
            "position": self.position(live.row.id),
            "eta_s": live.eta_s,
        }

    def show(self, job: JobRow, run: RunRow) -> Job:
        """Return a job as replies show it, with progress and position where it lives."""
        live = self.runs.get(run.id) if not job.state.ended else None
        # Who shares somebody else's work has the same bytes, and need not learn what that one's download is called.
        titled = run.title is not None and (job.uid == run.uid or job.source == run.source)
        return Job(
            id=job.id,
            state=job.state,
            priority=job.priority,
            uid=job.uid,
            source={**job.source, "title": run.title} if titled else job.source,
            options=job.options,
            submitted_at=job.submitted_at,
            started_at=job.started_at,
            ended_at=job.ended_at,
            position=None if live is None else self.position(run.id),
            phase=str(job.state) if live is None else self.phase(live),
            progress=live.progress if live else float(job.state is JobState.DONE),
            eta_s=None if live is None else live.eta_s,
            audio_s=run.audio_s,
            attempts=run.starts,
            retried=run.retried,
            error=None if job.error_code is None else {"code": job.error_code, "message": job.error_message or ""},
        )
