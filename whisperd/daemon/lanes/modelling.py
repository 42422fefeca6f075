"""The model lane: decoded runs become transcripts, several open at once, by one model helper."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from whisperd.daemon.config import Config
from whisperd.daemon.helpers.helper import Helper
from whisperd.daemon.lanes.idleness import Idleness, keep_alive_s
from whisperd.daemon.lanes.model_process import ModelProcess
from whisperd.daemon.lanes.recording import Recorder, give_up, record
from whisperd.daemon.lanes.trials import Trials
from whisperd.daemon.lanes.weights import WeightsLane
from whisperd.daemon.loop import Loop, Timer
from whisperd.daemon.scheduler import pick
from whisperd.daemon.state.board import LiveRun
from whisperd.daemon.state.ledger import Ledger, StoreCall
from whisperd.daemon.store.rows import Change
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import (
    MAX_JOURNAL_ENTRY_BYTES,
    Cancel,
    Failed,
    Finished,
    HelperMessage,
    JournalEntry,
    JournalVoid,
    Prioritise,
    Progress,
    Segments,
    Transcribe,
)
from whisperd.protocol.jobs import JobState, Priority

log = logging.getLogger("whisperd.model")

_RunMessage = Progress | JournalEntry | JournalVoid | Segments | Finished | Failed


@dataclass(eq=False, slots=True)
class _Open:
    """A run that the helper has, or is about to be given once its start is committed."""

    priority: Priority
    recorder: Recorder
    generation: int = 0  # 0: the start is not committed yet
    sent: bool = False
    yields: bool = False  # it goes back to the queue, so that another can be alone
    closing: bool = False  # its last word has come, or its helper has gone: that is being committed
    overdue: Timer | None = field(default=None)

    def conclude(self, end: StoreCall[Change]) -> None:
        """Commit its end by `end`. The helper owes no answer any more: from here on it is the disk that takes time."""
        self.closing = True
        if self.overdue is not None:
            self.overdue.cancel()
        self.recorder.end(end)


class ModelLane:
    """The open runs of one model helper. `process` is that helper, from load to unload; `make_helper` is for tests."""

    def __init__(
        self,
        loop: Loop,
        config: Config,
        ledger: Ledger,
        env: Mapping[str, str],
        weights: WeightsLane,
        *,
        make_helper: Callable[..., Helper] = Helper,
    ) -> None:
        self._loop, self._config, self._ledger = loop, config, ledger
        self.process = ModelProcess(
            loop,
            config,
            spool=ledger.spool.path,
            env=env,
            weights=weights,
            on_status=self._status_changed,
            on_message=self._on_message,
            on_gone=self._on_gone,
            on_sample=self._on_sample,
            is_busy=lambda: bool(self._open),
            make_helper=make_helper,
        )
        self._open: dict[int, _Open] = {}
        self._trials = Trials(config.suspect_windows)
        self._idleness = Idleness(loop, self._fall_asleep)
        self.paused = False  # by an administrator: what is open goes on, nothing is begun
        self._freed = False  # the pause has unloaded the model, and nobody else: `resume` loads it
        self.failed = 0
        self.when_status_changed: list[Callable[[], None]] = []
        self.left: Callable[[], None] = lambda: None  # the process has gone, or a run is settled, while all stops
        self.process.left = lambda: self.left()

    # -- what others read ----------------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """How many runs are open."""
        return len(self._open)

    # -- what administrators ask -----------------------------------------------------------------------------------

    def load(self) -> None:
        """Load the model, unless it is there."""
        self.process.load()

    def unload(self) -> None:
        """Give all the helper's memory back until `load`, also beyond a pause; running work returns to the queue."""
        self._freed = False
        self.process.unload()

    def pause(self, *, free_gpu: bool) -> None:
        """Begin no run any more; with `free_gpu` also give the device's memory back, as `unload` does."""
        self.paused = True
        if free_gpu and not self.process.held:
            self.unload()
            self._freed = True

    def resume(self) -> None:
        """Begin runs again; load the model if the pause has unloaded it."""
        self.paused = False
        freed, self._freed = self._freed, False
        if freed and self.process.held:
            self.load()
        self.pump()

    def stop(self) -> None:
        """The daemon stops: return running work to the queue and end the helper."""
        self.process.stop()

    def _status_changed(self) -> None:
        for tell in self.when_status_changed:
            tell()
        words = self.process.arrival.words
        if not words and self.process.status.state == "loading":
            words = f"loading the model {Path(self.process.status.name).name}"
        self._ledger.board.note_model(words)
        self._ledger.teller.look()
        self.pump()

    # -- giving out work -------------------------------------------------------------------------------------------

    def changed(self, change: Change) -> None:
        """Look at what a commit changed: stop runs that ended, tell changed priorities, start what came."""
        for run in change.runs:
            if run.state.ended:
                self._trials.forget(run.id)
            if run.state.ended and (open_ := self._open.get(run.id)) is not None and not open_.closing:
                self._cancel(run.id, open_)
        for run_id in {job.run_id for job in change.jobs}:
            self._tell_priority(run_id)
        self.pump()

    def pump(self) -> None:
        """Start what may start; load the model for it, or unload one that has had nothing to do for long."""
        if self.process.asleep and self.process.helper is None and not self.paused and self._work_waits():
            self.load()
        self._give_out()
        idle = self._is_idle()
        self._idleness.look(keep_alive_s(self._config.keep_alive_s, self.process.status.device) if idle else None)

    def _give_out(self) -> None:
        while (helper := self.process.ready) is not None and not self.paused and self._trials.accused is None:
            candidates = self.candidates()
            suspects = [run for run in candidates if self._trials.is_suspect(run.row)]
            if suspects or self._on_trial():
                self._try_alone(helper, suspects)
                return
            waiting = self._ledger.board.waiting(candidates)
            busy = dict.fromkeys(Priority, 0)
            for open_ in self._open.values():
                busy[open_.priority] += 1
            chosen = pick(waiting, self._ledger.board.turns, capacity=self.process.status.capacity, busy=busy)
            if chosen is None:
                return
            self._start(helper, chosen.id, chosen.priority)

    def _on_trial(self) -> bool:
        runs = self._ledger.board.runs
        return any(run_id in runs and self._trials.is_suspect(runs[run_id].row) for run_id in self._open)

    def _try_alone(self, helper: Helper, suspects: list[LiveRun]) -> None:
        """Start one of the suspects once nothing else is open; who is not on trial makes room for it."""
        if not self._open:
            board = self._ledger.board
            chosen = pick(board.waiting(suspects), board.turns, capacity=1, busy=dict.fromkeys(Priority, 0))
            assert chosen is not None, "a free place and somebody who waits for it"
            log.warning("model: run=%d is tried alone", chosen.id)
            self._start(helper, chosen.id, chosen.priority)
        elif not self._on_trial():
            for run_id, open_ in self._open.items():
                if open_.sent and not open_.closing and open_.overdue is None:
                    open_.yields = True
                    self._cancel(run_id, open_)

    def _is_idle(self) -> bool:
        return self.process.status.state == "ready" and not self._open and (self.paused or not self._work_waits())

    def _work_waits(self) -> bool:
        """True when audio is on hand (what is still decoded will need the model in a moment), or somebody waits for it.

        A background download does not count: it may take hours.
        """
        board = self._ledger.board
        on_hand = len(board.to_decode) + len(board.to_transcribe)
        return on_hand > 0 or board.fetching.count(Priority.INTERACTIVE) > 0

    def _fall_asleep(self) -> None:
        if self._is_idle():
            self.process.fall_asleep()

    def candidates(self) -> list[LiveRun]:
        """Return the runs that wait for the model with their audio decoded: not many, however many wait in all."""
        board = self._ledger.board
        return [board.runs[run_id] for run_id in board.to_transcribe if run_id not in self._open]

    def _start(self, helper: Helper, run_id: int, priority: Priority) -> None:
        recorder = Recorder(self._loop, self._ledger, run_id, lambda: self._recorded(run_id))
        self._open[run_id] = open_ = _Open(priority, recorder)
        self._ledger.board.served(run_id)

        store, spool, made_by = self._ledger.store, self._ledger.spool, self.process.status.fingerprint
        journal: list[bytes] = []

        def begin(db: sqlite3.Connection, now: float) -> Change:
            change = store.start(db, run_id, now, made_by)
            if change.runs:
                journal[:] = store.journal(db, run_id)
                spool.lay_out_journal(change.runs[-1].folder or "", journal)
            return change

        def then(change: Change) -> None:
            # A helper that has come meanwhile has not loaded the model, and may not be able to.
            if not change.runs or self.process.ready is not helper:
                self._give_back(run_id)
                return
            row = change.runs[-1]
            open_.generation, open_.sent = row.starts, True
            live = self._ledger.board.runs.get(run_id)
            if live is None:  # cancelled while the start was being committed
                self._close(run_id)
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
                    journal=len(journal),
                    told=row.segments,
                )
            )

        def failed(error: WhisperdError) -> None:
            if error.code != ErrorCode.STORAGE_FULL:
                give_up(self._loop, self._ledger, run_id, error, lambda change: self._recorded(run_id))
                return
            # Nothing has changed, the run waits on. The next commit or the next second tries again.
            self._close(run_id)
            self._loop.call_later(1.0, self.pump)

        self._ledger.commit(begin, then, failed)

    def _give_back(self, run_id: int, *, suspect: bool = False) -> None:
        """Return a run to the queue, with all that the helper said of it; it counts as open until that is committed."""
        open_, store = self._open[run_id], self._ledger.store
        open_.conclude(lambda db, now: store.put_back(db, run_id, now, suspect=suspect))

    def _tell_priority(self, run_id: int) -> None:
        open_ = self._open.get(run_id)
        helper = self.process.helper
        if open_ is None or not open_.sent or helper is None or not self._ledger.board.jobs_of(run_id):
            return
        priority = self._ledger.board.priority(run_id)
        if priority is not open_.priority:
            open_.priority = priority
            interactive = priority is Priority.INTERACTIVE
            helper.send(Prioritise(run=run_id, generation=open_.generation, interactive=interactive))

    def _cancel(self, run_id: int, open_: _Open) -> None:
        helper = self.process.helper
        if not open_.sent or open_.overdue is not None or helper is None:
            return
        helper.send(Cancel(run=run_id, generation=open_.generation))

        def replace() -> None:
            if self._open.get(run_id) is open_ and self.process.helper is helper:
                self.process.end("did not give up a cancelled run")

        open_.overdue = self._loop.call_later(self._config.cancel_grace_s, replace)

    def _close(self, run_id: int) -> None:
        open_ = self._open.pop(run_id, None)
        if open_ is not None and open_.overdue is not None:
            open_.overdue.cancel()
        self.left()

    # -- what the helper says --------------------------------------------------------------------------------------

    def _on_message(self, message: HelperMessage) -> None:
        if isinstance(message, _RunMessage):
            open_ = self._open.get(message.run)
            if open_ is not None and open_.generation == message.generation and not open_.closing:
                self._on_run_message(open_, message)

    def _on_run_message(self, open_: _Open, message: _RunMessage) -> None:
        run_id = message.run
        store = self._ledger.store
        match message:
            case Progress():
                self._progressed(run_id, message)
            case JournalEntry():
                if len(message.entry) > MAX_JOURNAL_ENTRY_BYTES and self.process.helper is not None:
                    self.process.helper.kill(f"sent an answer of {len(message.entry)} bytes for the journal")
                    return
                open_.recorder.note(message.entry)
                live = self._ledger.board.runs.get(run_id)
                if live is not None and self._trials.answered(live.row):
                    log.info("model: run=%d is no longer suspected", run_id)
                    self.pump()
            case Segments():
                open_.recorder.add(message.segments)
            case JournalVoid():
                open_.conclude(lambda db, now: store.void_journal(db, run_id))
            case Finished():
                transcript = message.transcript
                live = self._ledger.board.runs.get(run_id)
                self._ledger.metrics.transcribed_s += (live.row.audio_s or 0.0) if live else 0.0
                open_.conclude(lambda db, now: store.finish(db, run_id, transcript, now))
            case Failed(code=ErrorCode.CANCELLED):
                if open_.yields and run_id in self._ledger.board.runs:
                    self._give_back(run_id)
                    return
                self._close(run_id)
                self.pump()
            case Failed():
                self.failed += 1
                error = WhisperdError(message.code, message.message)
                open_.conclude(lambda db, now: store.fail(db, run_id, error, now))

    def _recorded(self, run_id: int) -> None:
        """The end of a run, or its return to the queue, is committed."""
        self._close(run_id)
        if (live := self._ledger.board.runs.get(run_id)) is not None:
            live.phase, live.done, live.eta_s = "waiting for the model", 0.0, None
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
        self._ledger.teller.tell(run_id)

    def _on_gone(self, died: bool) -> None:
        """Return what the helper had to the queue; if it died, all that was in it are suspects."""
        log.info("model helper gone open=%s", sorted(self._open))
        present = [run_id for run_id, open_ in self._open.items() if open_.sent and not open_.closing]
        if died and self._trials.died(present):
            self.process.try_sample()
        for run_id, open_ in list(self._open.items()):
            if open_.closing or not open_.sent:
                continue  # its end, or its start, is on the way to the disk and will settle it
            if run_id not in self._ledger.board.runs:
                self._close(run_id)
            else:
                self._give_back(run_id, suspect=died)

    def _on_sample(self, well: bool) -> None:
        """The sample has shown whether the last death was the accused run's, or the device's."""
        accused = self._trials.accused
        if accused is None:
            return
        if not well:
            self._trials.accused = None
            return

        def then(change: Change) -> None:
            self._trials.accused = None
            self.pump()

        store = self._ledger.store
        record(self._loop, self._ledger, accused, lambda db, now: store.count_death(db, accused, now), then)
