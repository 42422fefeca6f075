"""The oracle's memory: what the daemon has acknowledged, and what is still unsure because an answer got lost."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A submit as its client means it: asked again, it is asked exactly so."""

    key: str
    recording: Path
    interactive: bool
    fresh: bool


class Book:
    """Acknowledged jobs by id. `tokens` has what each recording's transcript must hold. May be used by threads."""

    def __init__(self, tokens: Mapping[Path, list[list[int]]]) -> None:
        self.tokens = tokens
        self.acknowledged: dict[int, Path] = {}
        self.forgotten: set[int] = set()
        self.may_be_forgotten: set[int] = set()  # asked for, and the answer got lost
        self.unsure: dict[str, Request] = {}
        self.lost_answers = 0  # submits that were sent and neither acknowledged nor refused
        self.unanswered_retries = 0  # a retry has no key: when its answer gets lost, its job is nobody's
        self.replaced: list[tuple[str, int, int]] = []  # a key's job, and the later one of the same key
        self._ids: dict[str, int] = {}
        self._lock = threading.Lock()

    def ask(self, request: Request) -> bool:
        """Note a submit before it is sent; return whether an earlier answer under its key got lost."""
        with self._lock:
            asked_before = request.key in self.unsure
            self.unsure[request.key] = request
            self.lost_answers += 1  # until it is answered
            return asked_before

    def refused(self, request: Request, *, asked_before: bool) -> None:
        """Note that it was refused: no job of it may be there, but of an earlier submit of its key."""
        with self._lock:
            self.lost_answers -= 1
            if not asked_before:
                self.unsure.pop(request.key, None)

    def acknowledge(self, request: Request, job_id: int, *, asked_before: bool) -> None:
        """Note an acknowledgement: from now on the job must not get lost. One key must be one job.

        Asked before, it stays unsure: the earlier submit may still be copied when this job has been forgotten, and with
        it its key.
        """
        with self._lock:
            self.lost_answers -= 1
            if not asked_before:
                self.unsure.pop(request.key, None)
            known = self._ids.get(request.key)
            if known is not None and known != job_id:  # allowed when that one had failed, or was forgotten
                self.replaced.append((request.key, known, job_id))
            self._ids[request.key] = job_id
            self.acknowledged[job_id] = request.recording

    def ask_retry(self) -> None:
        """Note a retry before it is sent."""
        with self._lock:
            self.unanswered_retries += 1

    def retry_answered(self, job_id: int | None, recording: Path) -> None:
        """Note the answer: a job, or None when it was refused."""
        with self._lock:
            self.unanswered_retries -= 1
            if job_id is not None:
                self.acknowledged[job_id] = recording

    def recording(self, job_id: int) -> Path:
        """Return what a job transcribes."""
        return self.acknowledged[job_id]

    def forget(self, job_id: int) -> None:
        """Note that a job will be asked to be forgotten: until the answer it may be there or not."""
        with self._lock:
            self.may_be_forgotten.add(job_id)

    def forget_answered(self, job_id: int, *, gone: bool) -> None:
        """Note the answer."""
        with self._lock:
            self.may_be_forgotten.discard(job_id)
            if gone:
                self.forgotten.add(job_id)

    def sample(self) -> list[int]:
        """Return the jobs that must be there now."""
        with self._lock:
            return [job for job in self.acknowledged if job not in self.forgotten | self.may_be_forgotten]
