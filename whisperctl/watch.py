"""Watching a job until it ends: a status line that says what is waited for, and each segment once."""

from __future__ import annotations

from collections.abc import Callable

from whisperctl.client import Client
from whisperctl.render import what_happens
from whisperctl.results import Event, Segment
from whisperctl.terminal import Screen
from whisperctl.words import safe
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.jobs import Job, JobState


class LiveText:
    """Prints segments as they come, each once, also when the work begins anew and sends them again."""

    def __init__(self, show: Callable[[Segment], None], note: Callable[[str], None]) -> None:
        self._show = show
        self._note = note
        self._shown: list[tuple[float, str]] = []
        self._place = 0

    def discard(self) -> None:
        """What came so far is void: the work begins anew."""
        self._place = 0

    def add(self, segment: Segment) -> None:
        """Show a segment unless it stands there already."""
        entry = (segment.start, segment.text)
        if self._place < len(self._shown):
            if self._shown[self._place] == entry:
                self._place += 1
                return
            # The second attempt came out differently: what stood there cannot be taken back from a terminal.
            self._note("(the work began anew and came out differently; from here on:)")
            del self._shown[self._place :]
        self._shown.append(entry)
        self._place += 1
        if segment.text.strip():
            self._show(segment)

    def complete(self, segments: list[Segment]) -> None:
        """Show what the finished transcript has and no event brought (a result that was known already)."""
        self._place = 0
        for segment in segments:
            self.add(segment)


class JobWatch:
    """Follows one job and keeps the status line true."""

    def __init__(self, client: Client, screen: Screen, *, prefix: str) -> None:
        self._client = client
        self._screen = screen
        self._prefix = prefix
        self._state = JobState.QUEUED
        self._progress: float | None = None
        self._position: int | None = None
        self._eta_s: float | None = None
        self._phase = ""

    def follow(
        self, job: Job, live: LiveText | None = None, *, after_seq: int = 0, timeout_s: float | None = None
    ) -> None:
        """Return when the job has ended. Raises as `Client.follow` does."""
        self._take_job(job)
        for event in self._client.follow(job.id, after_seq, timeout_s=timeout_s):
            self._take(event)
            if live is not None:
                if event.discard:
                    live.discard()
                if event.segment is not None:
                    live.add(event.segment)
        self._screen.status("")

    def _take_job(self, job: Job) -> None:
        self._state, self._phase = job.state, job.phase
        self._progress, self._position, self._eta_s = job.progress, job.position, job.eta_s
        self._show()

    def _take(self, event: Event) -> None:
        match event.kind:
            case "state" if event.state is not None:
                # The past comes first, and says nothing of where the job is by now: that stands until it has moved.
                if event.state is not self._state:
                    self._state, self._phase, self._progress, self._eta_s = event.state, "", None, None
                    self._position = None
            case "progress":
                self._progress, self._phase = event.progress, event.phase
                self._position, self._eta_s = event.position, event.eta_s
            case _:
                return
        self._show()

    def _show(self) -> None:
        if self._state.ended:
            return
        words = what_happens(
            self._state,
            phase=self._phase or self._model_words(),
            progress=self._progress,
            position=self._position,
            eta_s=self._eta_s,
        )
        self._screen.status(f"{self._prefix}{words}")

    def _model_words(self) -> str:
        """Return what the model is doing, where a job without a phase of its own waits for it."""
        if self._state is not JobState.QUEUED or not self._screen.has_status:
            return ""
        try:
            model = self._client.health().get("model") or {}
        except WhisperdError:
            return ""
        words = {
            "loading": "loading model",
            "downloading": "downloading model",
            "failed": "waiting for model",
            "unloaded": "waiting for model",
        }.get(str(model.get("state")))
        progress = model.get("progress")
        part = "" if progress is None else f" {progress:.0%}"
        return f"{words} {safe(model.get('name', ''))}{part}" if words else ""
