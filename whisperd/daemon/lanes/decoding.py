"""The decode lane: a run's source becomes 16 kHz PCM, a little ahead of the model."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

from whisperd.daemon.lanes.pool import Loss, Pool, Task
from whisperd.daemon.lanes.recording import record
from whisperd.daemon.loop import Loop
from whisperd.daemon.scheduler import Turns, pick
from whisperd.daemon.state.ledger import Ledger
from whisperd.daemon.store.rows import Change
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import Decode, Decoded, Failed, HelperMessage, Progress
from whisperd.protocol.jobs import JobState, Priority

log = logging.getLogger("whisperd.lanes")


class DecodeLane:
    """Decodes queued runs by priority and in turns, `ahead` background runs more than the model works on.

    That keeps the model busy, without a thousand recordings as PCM on the disk.
    """

    def __init__(
        self,
        make_pool: Callable[[Callable[[], None]], Pool],
        ledger: Ledger,
        loop: Loop,
        *,
        ahead: int,
        full_disk_pause_s: float,
        turns: Turns,
    ) -> None:
        self.pool = make_pool(self.pump)
        self._ledger = ledger
        self._loop = loop
        self._ahead = ahead
        self._full_disk_pause_s = full_disk_pause_s
        self._turns = turns
        self._generations = itertools.count(1)
        self._active: dict[int, str] = {}  # run → its folder: a retried run has the folder of the one before it
        self._paused = False
        self.failed = 0

    @property
    def waiting(self) -> int:
        """Runs that wait for a decoder."""
        return len(self._candidates())

    @property
    def problem(self) -> str | None:
        """Why the lane stands still, for `health`."""
        return "decoding waits: the disk of the spool is full; make room" if self._paused else self.pool.problem

    def changed(self, change: Change) -> None:
        """Look at what a commit changed: give up runs that ended, start what came."""
        for run in change.runs:
            if run.state.ended and run.id in self._active:
                self.pool.cancel(run.id)
        self.pump()

    def stop(self) -> None:
        """End the decoders; their runs are decoded anew after the next start."""
        self.pool.stop()

    def pump(self) -> None:
        """Start what may start."""
        while not self._paused and not self._ledger.full:
            waiting = self._ledger.board.waiting(self._candidates())
            chosen = pick(waiting, self._turns, capacity=self.pool.size, busy=self.pool.busy)
            if chosen is None:
                return
            self._turns.serve(chosen.priority, chosen.uid)
            self._start(chosen.id, chosen.priority)

    def _candidates(self) -> list:  # type: ignore[type-arg]
        board = self._ledger.board
        queued = [run for run in board.runs.values() if run.row.state is JobState.QUEUED]
        ahead = sum(run.row.decoded and board.priority(run.row.id) is Priority.BACKGROUND for run in queued)
        busy = set(self._active.values())
        return [
            run
            for run in queued
            if not run.row.decoded
            and run.row.id not in self._active
            and run.row.folder not in busy
            and (ahead < self._ahead or board.priority(run.row.id) is Priority.INTERACTIVE)
        ]

    def _start(self, run_id: int, priority: Priority) -> None:
        live = self._ledger.board.runs[run_id]
        self._active[run_id] = live.row.folder or ""
        live.phase = "decoding"
        self._ledger.teller.tell(run_id)
        generation = next(self._generations)
        self.pool.run(
            Task(
                run=run_id,
                generation=generation,
                priority=priority,
                message=Decode(run=run_id, generation=generation, folder=live.row.folder or ""),
                progressed=lambda progress: self._progressed(run_id, progress),
                done=lambda message: self._answered(run_id, message),
                lost=lambda loss: self._lost(run_id, loss),
            )
        )

    def _progressed(self, run_id: int, progress: Progress) -> None:
        live = self._ledger.board.runs.get(run_id)
        if live is not None:
            live.phase = f"decoding ({progress.done:.0f} s so far)"
            self._ledger.teller.tell(run_id)

    def _answered(self, run_id: int, message: HelperMessage) -> None:
        if isinstance(message, Decoded):
            audio_s, truncated = message.audio_s, message.truncated
            self._settle(
                run_id,
                lambda db, now: self._ledger.store.decoded(db, run_id, audio_s=audio_s, truncated=truncated),
                "waiting for the model",
            )
        elif isinstance(message, Failed) and message.code == ErrorCode.STORAGE_FULL:
            self._active.pop(run_id, None)
            self._pause()
        elif isinstance(message, Failed) and message.code == ErrorCode.CANCELLED:
            self._active.pop(run_id, None)
        elif isinstance(message, Failed):
            self.failed += 1
            error = WhisperdError(message.code, message.message)
            self._settle(run_id, lambda db, now: self._ledger.store.fail(db, run_id, error, now), "failed")

    def _lost(self, run_id: int, loss: Loss) -> None:
        self.failed += 1
        self._settle(
            run_id,
            lambda db, now: self._ledger.store.put_back(db, run_id, now, died=loss.began),
            "waiting for decoding",
        )

    def _settle(self, run_id: int, call: Callable[..., Change], phase: str) -> None:
        """Commit what became of a run; until then it stays active, so that nobody starts it again."""

        def then(change: Change) -> None:
            self._active.pop(run_id, None)
            live = self._ledger.board.runs.get(run_id)
            if live is not None:
                live.phase = phase
                self._ledger.teller.tell(run_id)
            self.pump()

        record(self._loop, self._ledger, run_id, call, then)

    def _pause(self) -> None:
        if not self._paused:
            log.warning("decode lane paused: the disk is full")
            self._paused = True
            self._loop.call_later(self._full_disk_pause_s, self._go_on)

    def _go_on(self) -> None:
        log.info("decode lane goes on")
        self._paused = False
        self.pump()
