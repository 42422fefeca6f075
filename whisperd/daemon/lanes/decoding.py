"""The decode lane: a run's source becomes 16 kHz PCM, a little ahead of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from whisperd.daemon.lanes.pool import Loss, Pool
from whisperd.daemon.lanes.run_lane import Active, RunLane
from whisperd.daemon.loop import Loop
from whisperd.daemon.scheduler import Turns
from whisperd.daemon.state.board import LiveRun
from whisperd.daemon.state.ledger import Ledger
from whisperd.daemon.store.rows import Change
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import Decode, Decoded, Failed, HelperMessage, NoRoom, Progress
from whisperd.protocol.jobs import Priority

log = logging.getLogger("whisperd.lanes")

_MAX_REST_S = 600.0


class DecodeLane(RunLane):
    """Decodes queued runs, `ahead` background runs more than the model works on.

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
        super().__init__(make_pool, ledger, loop, ledger.board.to_decode, turns)
        self._ahead = ahead
        self._full_disk_pause_s, self._room = full_disk_pause_s, room
        self._paused = False
        self._aside: set[int] = set()  # runs that did not fit on the disk, and wait until they may
        self._rests_s: dict[int, float] = {}  # of each that did not fit, how long it was aside at least

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
            if run.state.ended or run.decoded:
                self._aside.discard(run.id)
                self._rests_s.pop(run.id, None)
        super().changed(change)

    def _begins(self) -> Sequence[Priority]:
        if self._paused or self._ledger.full:
            return ()
        ahead = self._ledger.board.to_transcribe.count(Priority.BACKGROUND)
        return tuple(Priority) if ahead < self._ahead else (Priority.INTERACTIVE,)

    def _may_start(self, run_id: int) -> bool:
        # A retried run has the folder of the one before it, whose decoder may not have let go of it.
        folder = self._ledger.board.runs[run_id].row.folder
        return run_id not in self._aside and all(active.live.row.folder != folder for active in self._active.values())

    def _start(self, active: Active) -> None:
        run_id, folder = active.live.row.id, active.live.row.folder or ""
        self._tell(run_id, "decoding")
        self._hand_out(active, lambda generation: Decode(run=run_id, generation=generation, folder=folder))

    def _doing(self, progress: Progress) -> str:
        return f"decoding ({progress.done:.0f} s so far)"

    def _answered(self, live: LiveRun, message: HelperMessage) -> None:
        run_id, store = live.row.id, self._ledger.store
        match message:
            case Decoded(audio_s=audio_s, truncated=truncated):
                self._settle(
                    run_id,
                    lambda db, now: store.decoded(db, run_id, audio_s=audio_s, truncated=truncated),
                    "waiting for the model",
                )
            case NoRoom(needed_bytes=needed_bytes):
                self._set_aside(run_id, needed_bytes)
                self._drop(run_id)
            case Failed(code=ErrorCode.STORAGE_FULL):
                self._pause()
                self._drop(run_id)
            case Failed(code=ErrorCode.CANCELLED):
                self._drop(run_id)
            case Failed():
                self.failed += 1
                error = WhisperdError(message.code, message.message)
                self._settle(run_id, lambda db, now: store.fail(db, run_id, error, now), "failed")

    def _lost(self, live: LiveRun, loss: Loss) -> None:
        self.failed += 1
        run_id, store = live.row.id, self._ledger.store
        self._settle(run_id, lambda db, now: store.put_back(db, run_id, now, died=loss.began), "waiting for decoding")

    # -- a disk without room ---------------------------------------------------------------------------------------

    def _set_aside(self, run_id: int, needed_bytes: int) -> None:
        """Leave a run that does not fit on the disk until it may; the others go on.

        It may need more than it has told by now, and then fills the disk in vain: each time it waits twice as long.
        """
        if run_id not in self._ledger.board.runs:  # cancelled meanwhile
            return
        rest_s = min(2 * self._rests_s[run_id], _MAX_REST_S) if run_id in self._rests_s else self._full_disk_pause_s
        log.warning("run=%d does not fit on the disk needed_bytes=%d rest_s=%.0f", run_id, needed_bytes, rest_s)
        self._tell(run_id, f"waiting for room on the disk: decoded it has {needed_bytes / 1e6:.0f} MB or more")
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
