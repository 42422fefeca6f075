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
from whisperd.protocol.helper_messages import Decode, Decoded, Failed, HelperMessage, NoRoom, Progress
from whisperd.protocol.jobs import Priority

log = logging.getLogger("whisperd.lanes")

_MAX_REST_S = 600.0


class DecodeLane:
    """Decodes queued runs by priority and in turns, `ahead` background runs more than the model works on.

    That keeps the model busy, without a thousand recordings as PCM on the disk. `room` tells how many bytes of the
    disk it may take now.
    """

    def __init__(
        self,
        make_pool: Callable[[Callable[[], None]], Pool],
        ledger: Ledger,
        loop: Loop,
        *,
        ahead: int,
        full_disk_pause_s: float,
        room: Callable[[], int],
        turns: Turns,
    ) -> None:
        self.pool = make_pool(self.pump)
        self._ledger = ledger
        self._loop = loop
        self._ahead = ahead
        self._full_disk_pause_s, self._room = full_disk_pause_s, room
        self._turns = turns
        self._generations = itertools.count(1)
        self._active: dict[int, str] = {}  # run → its folder: a retried run has the folder of the one before it
        self._paused = False
        self._aside: set[int] = set()  # runs that did not fit on the disk, and wait until they may
        self._rests_s: dict[int, float] = {}  # of each that did not fit, how long it was aside at least
        self.failed = 0

    @property
    def waiting(self) -> int:
        """Runs that wait for a decoder."""
        line = self._ledger.board.to_decode
        return len(line) - sum(run_id in line for run_id in self._active)

    @property
    def problem(self) -> str | None:
        """Why the lane stands still, for `health`."""
        if self._paused:
            return "decoding waits: the disk of the spool is full; make room"
        if self._aside and not self.pool.problem:
            return "decoding waits: the disk of the spool has no room for some recordings; make room"
        return self.pool.problem

    def changed(self, change: Change) -> None:
        """Look at what a commit changed: give up runs that ended, start what came."""
        for run in change.runs:
            if run.state.ended and run.id in self._active:
                self.pool.cancel(run.id)
            if run.state.ended or run.decoded:
                self._aside.discard(run.id)
                self._rests_s.pop(run.id, None)
        self.pump()

    def stop(self) -> None:
        """End the decoders; their runs are decoded anew after the next start."""
        self.pool.stop()

    def pump(self) -> None:
        """Start what may start."""
        board = self._ledger.board
        while not self._paused and not self._ledger.full and sum(self.pool.busy.values()) < self.pool.size:
            ahead = board.to_transcribe.count(Priority.BACKGROUND)
            priorities = list(Priority) if ahead < self._ahead else [Priority.INTERACTIVE]
            waiting = board.to_decode.heads(priorities, self._may_start)
            chosen = pick(waiting, self._turns, capacity=self.pool.size, busy=self.pool.busy)
            if chosen is None:
                return
            self._turns.serve(chosen.priority, chosen.uid)
            self._start(chosen.id, chosen.priority)

    def _may_start(self, run_id: int) -> bool:
        folder = self._ledger.board.runs[run_id].row.folder
        return run_id not in self._active and run_id not in self._aside and folder not in self._active.values()

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
        elif isinstance(message, NoRoom):
            self._active.pop(run_id, None)
            self._set_aside(run_id, message.needed_bytes)
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

    def _set_aside(self, run_id: int, needed_bytes: int) -> None:
        """Leave a run that does not fit on the disk until it may; the others go on.

        It may need more than it has told by now, and then fills the disk in vain: each time it waits twice as long.
        """
        live = self._ledger.board.runs.get(run_id)
        if live is None:  # cancelled meanwhile
            return
        rest_s = min(2 * self._rests_s[run_id], _MAX_REST_S) if run_id in self._rests_s else self._full_disk_pause_s
        log.warning("run=%d does not fit on the disk needed_bytes=%d rest_s=%.0f", run_id, needed_bytes, rest_s)
        live.phase = f"waiting for room on the disk: decoded it has {needed_bytes / 1e6:.0f} MB or more"
        self._ledger.teller.tell(run_id)
        self._aside.add(run_id)
        self._rests_s[run_id] = rest_s

        def look() -> None:
            if run_id not in self._aside:
                return
            if self._room() < needed_bytes:
                self._loop.call_later(self._full_disk_pause_s, look)
                return
            self._aside.discard(run_id)
            self.pump()

        self._loop.call_later(rest_s, look)

    def _pause(self) -> None:
        if not self._paused:
            log.warning("decode lane paused: the disk is full")
            self._paused = True
            self._loop.call_later(self._full_disk_pause_s, self._go_on)

    def _go_on(self) -> None:
        log.info("decode lane goes on")
        self._paused = False
        self.pump()
