"""The model lane: decoded runs become transcripts, several open at once, by one model helper.

Says `model` in `health`. Restarts a helper that died, with growing pauses; gives up on a model that does not load until
an administrator asks again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whisperd.daemon.board import LiveRun
from whisperd.daemon.config import Config
from whisperd.daemon.helper import ExitReason, Helper
from whisperd.daemon.lanes.idleness import Idleness, keep_alive_s
from whisperd.daemon.lanes.recording import Recorder
from whisperd.daemon.ledger import Ledger
from whisperd.daemon.loop import Loop, Timer
from whisperd.daemon.scheduler import pick
from whisperd.daemon.store.rows import Change
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import (
    Cancel,
    Failed,
    Finished,
    Heartbeat,
    HelperMessage,
    ModelStatus,
    Prioritise,
    Progress,
    Segments,
    Transcribe,
)
from whisperd.protocol.jobs import JobState, Priority

log = logging.getLogger("whisperd.model")

_MAX_FAILED_LOADS = 3


@dataclass(eq=False, slots=True)
class _Open:
    """A run that the helper has, or is about to be given once its start is committed."""

    priority: Priority
    recorder: Recorder
    generation: int = 0  # 0: the start is not committed yet
    sent: bool = False
    closing: bool = False  # its last word has come, or its helper has gone: that is being committed
    overdue: Timer | None = field(default=None)


class ModelLane:
    """One model helper and its open runs."""

    def __init__(self, loop: Loop, config: Config, ledger: Ledger, env: Mapping[str, str]) -> None:
        self._loop, self._config, self._ledger, self._env = loop, config, ledger, env
        self._helper: Helper | None = None
        self._open: dict[int, _Open] = {}
        self._status = self._no_status("unloaded")
        self._loading_overdue: Timer | None = None
        self._restart: Timer | None = None
        self._failed_loads = 0
        self._last_beat = -1
        self._last_beat_at = 0.0
        self._ending = ""  # why we end the helper ourselves; such an end is nobody's fault
        self.held = False  # unloaded by an administrator: stays so until he loads it
        self.asleep = False  # unloaded for want of work: the next job loads it
        self._idleness = Idleness(loop, self._fall_asleep)
        self.paused = False  # by an administrator: what is open goes on, nothing is begun
        self._freed = False  # the pause has unloaded the model, so `resume` loads it
        self.identity: list[Any] = []  # what tells this model's results from another's
        self.starts = 0
        self.crashes = 0
        self.failed = 0
        self.gauges: dict[str, Any] = {}
        self.status_changed: Callable[[], None] = lambda: None

    # -- what others read ----------------------------------------------------------------------------------------

    def show(self) -> dict[str, Any]:
        """Return `model` as `health` shows it."""
        status = self._status
        return {
            "name": status.name,
            "state": status.state,
            "device": status.device,
            "dtype": status.dtype,
            "error": status.error,
        }

    @property
    def state(self) -> str:
        """`unloaded`, `loading`, `ready` or `failed`."""
        return self._status.state

    @property
    def error(self) -> str | None:
        """Why the model did not load."""
        return self._status.error

    @property
    def traits(self) -> Mapping[str, Any]:
        """What the loaded model can do; empty until it is ready."""
        return self._status.traits

    @property
    def helper(self) -> Helper | None:
        """The helper process, while there is one."""
        return self._helper

    @property
    def active(self) -> int:
        """How many runs are open."""
        return len(self._open)

    # -- loading and unloading -------------------------------------------------------------------------------------

    def load(self) -> None:
        """Start the helper, unless it is there."""
        self.held = self.asleep = False
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        self._failed_loads = 0
        if self._helper is None:
            self._spawn()
        elif self._ending or self._status.state == "failed":
            # `_on_exit` starts the next one.
            self._set_status(self._no_status("loading"))
            self._end("loading again")

    def unload(self) -> None:
        """End the helper, which gives all its memory back; running work returns to the queue."""
        self.held, self.asleep = True, False
        self._set_status(self._no_status("unloaded"))
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        if self._helper is not None:
            self._end("unloaded")

    def pause(self, *, free_gpu: bool) -> None:
        """Begin no run any more; with `free_gpu` also give the device's memory back, as `unload` does."""
        self.paused = True
        if free_gpu and not self.held:
            self._freed = True
            self.unload()

    def resume(self) -> None:
        """Begin runs again; load the model if the pause has unloaded it."""
        self.paused = False
        freed, self._freed = self._freed, False
        if freed and self.held:
            self.load()
        self.pump()

    def stop(self) -> None:
        """The daemon stops: return running work to the queue and end the helper."""
        self.held, self.asleep = True, False
        if self._helper is not None:
            self._end("the daemon stops")

    def _end(self, reason: str) -> None:
        self._ending = reason
        assert self._helper is not None
        self._helper.kill(reason)

    def _spawn(self) -> None:
        self.starts += 1
        self._ending = ""
        self._last_beat, self._last_beat_at = -1, self._loop.time()
        config = self._config
        self.identity = model_identity(config)
        self._set_status(self._no_status("loading"))
        try:
            self._helper = helper = self._start_helper()
        except OSError as error:  # no descriptor is left
            self._start_again_later(f"could not be started: {error}", was_ready=False)
            return
        self._loading_overdue = self._loop.call_later(
            config.model_load_timeout_s, lambda: helper.kill(f"did not load in {config.model_load_timeout_s:g} s")
        )

    def _start_helper(self) -> Helper:
        config = self._config
        return Helper(
            self._loop,
            role="model",
            module="whisperd.model.main",
            settings={
                "spool": str(self._ledger.spool.path),
                "cache_dir": str(config.cache_dir),
                "model": config.model,
                "device": config.device,
                "threads": config.threads,
                "dtype": config.dtype,
                "open_runs": config.open_runs,
            },
            nice=config.helper_nice,
            log_level=config.log_level,
            env=self._env,
            on_message=self._on_message,
            on_exit=self._on_exit,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
        )

    def _no_status(self, state: str, error: str | None = None) -> ModelStatus:
        return ModelStatus(
            state=state, name=self._config.model, device="", dtype="", error=error, capacity=0, traits={}
        )

    def _set_status(self, status: ModelStatus) -> None:
        if status.state != self._status.state:
            log.info("model=%s state=%s device=%s error=%s", status.name, status.state, status.device, status.error)
        self._status = status
        if status.state != "loading" and self._loading_overdue is not None:
            self._loading_overdue.cancel()
            self._loading_overdue = None
        self.status_changed()

    # -- giving out work -------------------------------------------------------------------------------------------

    def changed(self, change: Change) -> None:
        """Look at what a commit changed: stop runs that ended, tell changed priorities, start what came."""
        for run in change.runs:
            if run.state.ended and (open_ := self._open.get(run.id)) is not None and not open_.closing:
                self._cancel(run.id, open_)
        for run_id in {job.run_id for job in change.jobs}:
            self._tell_priority(run_id)
        self.pump()

    def pump(self) -> None:
        """Start what may start; load the model for it, or unload one that has had nothing to do for long."""
        if self.asleep and self._helper is None and not self.paused and self._work_waits():
            self.load()
        self._give_out()
        idle = self._is_idle()
        self._idleness.look(keep_alive_s(self._config.keep_alive_s, self._status.device) if idle else None)

    def _give_out(self) -> None:
        while self._status.state == "ready" and not self.paused and not self._ending:
            waiting = self._ledger.board.waiting(self.candidates())
            busy = dict.fromkeys(Priority, 0)
            for open_ in self._open.values():
                busy[open_.priority] += 1
            chosen = pick(waiting, self._ledger.board.turns, capacity=self._status.capacity, busy=busy)
            if chosen is None:
                return
            self._start(chosen.id, chosen.priority)

    def _is_idle(self) -> bool:
        return self._status.state == "ready" and not self._open and (self.paused or not self._work_waits())

    def _work_waits(self) -> bool:
        """True when audio is on hand: what is still decoded will need the model in a moment."""
        return any(run.row.state is JobState.QUEUED for run in self._ledger.board.runs.values())

    def _fall_asleep(self) -> None:
        if self._is_idle():
            self.asleep = True
            self._set_status(self._no_status("unloaded"))
            self._end("nothing to do")

    def candidates(self) -> list[LiveRun]:
        """Return the runs that wait for the model with their audio decoded."""
        return [
            run
            for run in self._ledger.board.runs.values()
            if run.row.state is JobState.QUEUED and run.row.decoded and run.row.id not in self._open
        ]

    def _start(self, run_id: int, priority: Priority) -> None:
        recorder = Recorder(self._loop, self._ledger, run_id, lambda: self._recorded(run_id))
        self._open[run_id] = open_ = _Open(priority, recorder)
        self._ledger.board.served(run_id)
        helper = self._helper

        def then(change: Change) -> None:
            # A helper that has come meanwhile has not loaded the model, and may not be able to.
            if not change.runs or helper is None or self._helper is not helper or self._ending:
                self._give_back(run_id, died=False)
                return
            row = change.runs[-1]
            open_.generation, open_.sent = row.starts, True
            live = self._ledger.board.runs.get(run_id)
            if live is None:  # cancelled while the start was being committed
                self._open.pop(run_id, None)
                return
            live.phase, live.done, live.total = "transcribing", 0.0, row.audio_s or 0.0
            open_.priority = self._ledger.board.priority(run_id)  # another job may have joined or left meanwhile
            helper.send(
                Transcribe(
                    run=run_id,
                    generation=row.starts,
                    folder=row.folder or "",
                    options=dict(row.options),
                    interactive=open_.priority is Priority.INTERACTIVE,
                    truncated=row.truncated,
                )
            )

        def failed(error: WhisperdError) -> None:
            # A full disk: nothing has changed, the run waits on. The next commit or the next second tries again.
            self._open.pop(run_id, None)
            self._loop.call_later(1.0, self.pump)

        self._ledger.commit(lambda db, now: self._ledger.store.start(db, run_id, now), then, failed)

    def _give_back(self, run_id: int, *, died: bool) -> None:
        """Return a run to the queue; it counts as open until that is committed."""

        def settled(change: Change) -> None:
            self._open.pop(run_id, None)
            live = self._ledger.board.runs.get(run_id)
            if live is not None:
                live.phase, live.done, live.eta_s = "waiting for the model", 0.0, None
            self.pump()

        self._ledger.commit(
            lambda db, now: self._ledger.store.put_back(db, run_id, now, died=died),
            settled,
            lambda error: self._loop.call_later(1.0, lambda: self._give_back(run_id, died=died)),
        )

    def _tell_priority(self, run_id: int) -> None:
        open_ = self._open.get(run_id)
        if open_ is None or not open_.sent or self._helper is None or not self._ledger.board.jobs_of(run_id):
            return
        priority = self._ledger.board.priority(run_id)
        if priority is not open_.priority:
            open_.priority = priority
            interactive = priority is Priority.INTERACTIVE
            self._helper.send(Prioritise(run=run_id, generation=open_.generation, interactive=interactive))

    def _cancel(self, run_id: int, open_: _Open) -> None:
        if not open_.sent or open_.overdue is not None or self._helper is None:
            return
        helper = self._helper
        helper.send(Cancel(run=run_id, generation=open_.generation))

        def replace() -> None:
            if self._open.get(run_id) is open_ and self._helper is helper:
                self._end("did not give up a cancelled run")

        open_.overdue = self._loop.call_later(self._config.cancel_grace_s, replace)

    def _close(self, run_id: int) -> None:
        open_ = self._open.pop(run_id, None)
        if open_ is not None and open_.overdue is not None:
            open_.overdue.cancel()

    # -- what the helper says --------------------------------------------------------------------------------------

    def _on_message(self, helper: Helper, message: HelperMessage) -> None:
        if helper is not self._helper or self._ending:
            return
        match message:
            case ModelStatus():
                if message.state == "ready":
                    self._failed_loads = 0
                self._set_status(message)
                self.pump()
            case Heartbeat():
                self._check_beat(message)
            case Progress() | Segments() | Finished() | Failed():
                open_ = self._open.get(message.run)
                if open_ is not None and open_.generation == message.generation and not open_.closing:
                    self._on_run_message(open_, message)

    def _check_beat(self, heartbeat: Heartbeat) -> None:
        """A helper whose work stands still is dead, however well its heart beats."""
        self.gauges = heartbeat.gauges
        now = self._loop.time()
        if heartbeat.beat != self._last_beat or not self._open:
            self._last_beat, self._last_beat_at = heartbeat.beat, now
        elif now - self._last_beat_at > self._config.stall_timeout_s and self._helper is not None:
            self._helper.kill(f"no progress for {self._config.stall_timeout_s:g} s")

    def _on_run_message(self, open_: _Open, message: Progress | Segments | Finished | Failed) -> None:
        run_id = message.run
        store = self._ledger.store
        match message:
            case Progress():
                self._progressed(run_id, message)
            case Segments():
                open_.recorder.add(message.segments)
            case Finished():
                transcript = message.transcript
                live = self._ledger.board.runs.get(run_id)
                self._ledger.metrics.transcribed_s += (live.row.audio_s or 0.0) if live else 0.0
                open_.closing = True
                open_.recorder.end(lambda db, now: store.finish(db, run_id, transcript, now))
            case Failed(code=ErrorCode.CANCELLED):
                self._close(run_id)
                self.pump()
            case Failed():
                self.failed += 1
                error = WhisperdError(message.code, message.message)
                open_.closing = True
                open_.recorder.end(lambda db, now: store.fail(db, run_id, error, now))

    def _recorded(self, run_id: int) -> None:
        self._close(run_id)
        self.pump()

    def _progressed(self, run_id: int, progress: Progress) -> None:
        live = self._ledger.board.runs.get(run_id)
        if live is None or live.row.state is not JobState.RUNNING:
            return
        live.done, live.total = progress.done, progress.total
        jobs = self._ledger.board.jobs_of(run_id)
        started = min((job.started_at for job in jobs if job.started_at is not None), default=None)
        if started is not None and live.progress > 0:
            elapsed_s = max(0.0, self._ledger.clock() - started)
            live.eta_s = elapsed_s * (1 - live.progress) / live.progress
        for job in jobs:
            if self._ledger.watchers.watched(job.id):
                payload = {"progress": live.progress, "phase": live.phase, "position": None, "eta_s": live.eta_s}
                self._ledger.watchers.publish_progress(job.id, payload)

    def _on_exit(self, helper: Helper, reason: ExitReason) -> None:
        if helper is not self._helper:
            return
        self._helper = None
        ours = bool(self._ending)
        was_ready = self._status.state == "ready"
        if not ours:
            self.crashes += 1
            log.error("model helper died reason=%s open=%s", reason.reason, sorted(self._open))
        self.gauges = {}
        for run_id, open_ in list(self._open.items()):
            if open_.closing or not open_.sent:
                continue  # its end, or its start, is on the way to the disk and will settle it
            if run_id not in self._ledger.board.runs:
                self._close(run_id)
            else:
                open_.closing = True
                open_.recorder.drop()
                self._give_back(run_id, died=not ours)
        self._ending = ""
        if self.held:
            self._set_status(self._no_status("unloaded"))
        elif self.asleep:
            self.pump()  # work may have come while it ended
        elif ours:
            self._spawn()
        else:
            self._start_again_later(reason.reason, was_ready=was_ready)

    def _start_again_later(self, reason: str, *, was_ready: bool) -> None:
        self._failed_loads = 0 if was_ready else self._failed_loads + 1
        if self._failed_loads >= _MAX_FAILED_LOADS:
            self._set_status(
                self._no_status(
                    "failed",
                    f"the model process ended {self._failed_loads} times while loading ({reason}): see the "
                    "daemon's log, free memory or choose a smaller model, then `whisperctl model load`",
                )
            )
            return
        self._set_status(self._no_status("loading"))
        config = self._config
        delay_s = min(config.helper_backoff_max_s, config.helper_backoff_s * 2**self._failed_loads)
        self._restart = self._loop.call_later(delay_s, self._spawn_again)

    def _spawn_again(self) -> None:
        self._restart = None
        if self._helper is None and not self.held:
            self._spawn()


def model_identity(config: Config) -> list[Any]:
    """Return what tells one model's results from another's: its name and type, and a file's size and age.

    As of the helper's start: a file that is replaced under a loaded model does not change what that answers.
    """
    identity: list[Any] = [config.model, config.dtype]
    for path in (Path(config.model, "model.bin"), Path(config.model)):
        with contextlib.suppress(OSError):  # not a folder; or a name, not a path
            status = path.stat()
            return [*identity, status.st_size, status.st_mtime_ns]
    return identity
