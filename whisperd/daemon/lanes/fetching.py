"""The fetch lane: a video or an address becomes a durable file in the spool, a little ahead of the model."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from whisperd.daemon.config import Config
from whisperd.daemon.keys import share_key
from whisperd.daemon.lanes.pool import Loss, Pool
from whisperd.daemon.lanes.recording import give_up
from whisperd.daemon.lanes.run_lane import Active, RunLane
from whisperd.daemon.loop import Loop
from whisperd.daemon.scheduler import Turns
from whisperd.daemon.state.board import LiveRun
from whisperd.daemon.state.ledger import Ledger, StoreCall
from whisperd.daemon.store.rows import Change
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import Failed, Fetch, Fetched, FetchFailed, HelperMessage, Progress
from whisperd.protocol.jobs import Priority

log = logging.getLogger("whisperd.lanes")

_BACKOFF_FACTOR = 3
# While nothing can be had: the longest rest between two tries, and after how many (two hours) failures count again.
_MAX_REST_S = 600.0
_MAX_OUTAGE_RESTS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rest:
    """Why no download is begun, and until when: by the loop's clock, and in Unix seconds for people."""

    reason: str
    until_s: float
    until: float
    outage: bool  # only for want of a network, so that an urgent download may try whether it is back


class FetchLane(RunLane):
    """Downloads pending runs. One is active from the commit of its start on.

    `room` tells how many bytes of the disk it may take now.
    """

    def __init__(
        self,
        make_pool: Callable[[Callable[[], None]], Pool],
        ledger: Ledger,
        loop: Loop,
        config: Config,
        model: Callable[[], Sequence[Any]],
        paused: Callable[[], bool],
        room: Callable[[], int],
    ) -> None:
        super().__init__(make_pool, ledger, loop, ledger.board.to_fetch, Turns(config.interactive_in_a_row))
        self._config, self._model, self._room = config, model, room
        self._paused = paused  # by an administrator: nothing is begun
        self._backing_off: set[int] = set()
        self._rest: _Rest | None = None
        self._failing: set[int] = set()  # runs whose last try was in vain, none having succeeded since
        self._outage_rests = 0  # in a row
        self._full_rest_s = 0.0  # the last one for want of room on the disk, no download having succeeded since
        self._stopping = False

    # -- what others read ----------------------------------------------------------------------------------------

    @property
    def problem(self) -> str | None:
        """Why the lane stands still, for `health`."""
        if self._rest is None:
            return self.pool.problem
        until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._rest.until))
        return f"downloads rest until {until}: {self._rest.reason}"

    def show(self) -> dict[str, Any]:
        """Return the lane as `stats` shows it. What is known of yt-dlp comes from a helper, once there is one."""
        about = {"yt_dlp": None, "yt_dlp_age_days": None, "js_runtime": None} | self.pool.gauges
        return {
            "active": len(self._active),
            "waiting": self.waiting,
            "failed": self.failed,
            "extractors": list(self._config.fetch_extractors),
            "rests_until": None if self._rest is None else self._rest.until,
            **about,
        }

    # -- giving out work -------------------------------------------------------------------------------------------

    def changed(self, change: Change) -> None:
        """Look at what a commit changed: give up runs that ended, start what came."""
        self._failing.difference_update(run.id for run in change.runs if run.state.ended)
        if not self._failing:
            self._outage_rests = 0
        super().changed(change)

    def stop(self) -> None:
        """End the fetchers; their runs are downloaded anew after the next start."""
        self._stopping = True
        super().stop()

    def _begins(self) -> Sequence[Priority]:
        if self._stopping or self._ledger.full or self._paused() or (self._rest is not None and not self._rest.outage):
            return ()
        roomy = self._ledger.board.fetched_bytes < self._config.fetch_ahead_bytes
        return tuple(Priority) if roomy and self._rest is None else (Priority.INTERACTIVE,)

    def _may_start(self, run_id: int) -> bool:
        waits = self._rest is not None and run_id in self._failing and not self._is_urgent(run_id)
        return not waits and run_id not in self._backing_off

    def _is_urgent(self, run_id: int) -> bool:
        return self._ledger.board.priority(run_id) is Priority.INTERACTIVE

    def _start(self, active: Active) -> None:
        row, store, folder = active.live.row, self._ledger.store, self._ledger.spool.new_folder()
        run_id = row.id

        def then(change: Change) -> None:
            if not change.runs or run_id not in self._ledger.board.runs or self._stopping:  # cancelled, or all stops
                self._drop(run_id)
                return
            active.live.phase = "downloading"
            source = dict(row.source or {})
            self._hand_out(
                active,
                lambda generation: Fetch(run=run_id, generation=generation, folder=folder, source=source, uid=row.uid),
            )

        def failed(error: WhisperdError) -> None:
            if error.code != ErrorCode.STORAGE_FULL:
                give_up(self._loop, self._ledger, run_id, error, lambda change: self._drop(run_id))
                return
            self._rest_until_room(error.message)
            self._drop(run_id)

        self._ledger.commit(lambda db, now: store.fetch_started(db, run_id, folder, now), then, failed, new_work=True)

    # -- what the helpers say --------------------------------------------------------------------------------------

    def _doing(self, progress: Progress) -> str:
        done_mb, total_mb = progress.done / 1e6, progress.total / 1e6
        if progress.done <= 0:
            return "looking the recording up"
        return f"downloading ({done_mb:.1f} of {total_mb:.1f} MB)" if total_mb else f"downloading ({done_mb:.1f} MB)"

    def _answered(self, live: LiveRun, message: HelperMessage) -> None:
        run_id, folder, store = live.row.id, live.row.folder, self._ledger.store
        assert folder, "the commit of its start named it"
        match message:
            case Fetched():
                self._succeeded()
                self._settle(run_id, self._take_over(live, folder, message), "waiting for decoding")
            case FetchFailed():
                self._failed(live, message)
            case Failed(code=ErrorCode.CANCELLED):
                # The folder was doomed when the run ended; the helper may have made it after that.
                self._ledger.spool.remove(folder)
                self._drop(run_id)
            case Failed():
                self.failed += 1
                error = WhisperdError(message.code, message.message)
                self._settle(run_id, lambda db, now: store.fail(db, run_id, error, now), "failed")

    def _take_over(self, live: LiveRun, folder: str, found: Fetched) -> StoreCall[Change]:
        """Return the call that moves what was downloaded into the spool, and then records it."""
        store, spool, run_id = self._ledger.store, self._ledger.spool, live.row.id
        key = share_key(self._config, live.row.uid, found.sha256, live.row.options, self._model())

        def call(db: sqlite3.Connection, now: float) -> Change:
            try:
                spool.adopt(folder)
            except OSError as error:
                spool.remove(folder)
                text = f"what was downloaded cannot be moved into the spool ({error}): tell who runs whisperd"
                return store.fail(db, run_id, WhisperdError(ErrorCode.INTERNAL, text), now)
            change = store.fetched(
                db,
                run_id,
                now,
                sha256=found.sha256,
                size_bytes=found.size_bytes,
                title=found.title or None,
                share_key=key,
            )
            if change == Change():  # cancelled meanwhile, and its folder swept before it was here
                spool.remove(folder)
            return change

        return call

    def _failed(self, live: LiveRun, message: FetchFailed) -> None:
        run_id, store = live.row.id, self._ledger.store
        error = WhisperdError(message.code, message.message)
        self.failed += 1
        if not message.transient:
            self._settle(run_id, lambda db, now: store.fail(db, run_id, error, now), "failed")
        elif message.code == ErrorCode.STORAGE_FULL:
            self._rest_until_room(message.message)
            self._settle(
                run_id,
                lambda db, now: store.fetch_failed(db, run_id, error, now, counts=False),
                "waiting for room on the disk",
            )
        elif message.code == ErrorCode.FETCH_RATE_LIMITED:
            self._rest_for(message.wait_s or self._config.fetch_rest_s, message.message)
            self._try_again(run_id, error, "waiting: the site has had too many requests")
        else:
            delay_s = max(message.wait_s, self._config.fetch_backoff_s * _BACKOFF_FACTOR**live.row.fetch_failures)
            self._in_vain(run_id, error, delay_s)

    def _lost(self, live: LiveRun, loss: Loss) -> None:
        self.failed += 1
        run_id, store = live.row.id, self._ledger.store
        if loss.hung:
            text = f"the download stood still ({loss.reason}): try again later, or submit the file"
            self._in_vain(run_id, WhisperdError(ErrorCode.TIMED_OUT, text), self._config.fetch_backoff_s)
        else:
            self._settle(
                run_id,
                lambda db, now: store.put_back(db, run_id, now, died=loss.began),
                "waiting for its download",
            )

    def _in_vain(self, run_id: int, error: WhisperdError, delay_s: float) -> None:
        """A try has failed, and the next may do better. Of several in a row that is no fault of theirs: all rest.

        But not what somebody waits for: he is told after the usual tries.
        """
        lives = run_id in self._ledger.board.runs  # else it was cancelled meanwhile
        if lives:
            self._failing.add(run_id)
        alone = len(self._failing) < 2 or self._outage_rests == _MAX_OUTAGE_RESTS
        if alone or (lives and self._is_urgent(run_id)):
            self._back_off(run_id, delay_s)
            self._try_again(run_id, error, f"trying again in {delay_s:.0f} s: {error.message}")
            return
        if self._rest is None:
            rest_s = min(self._config.fetch_backoff_s * _BACKOFF_FACTOR**self._outage_rests, _MAX_REST_S)
            self._outage_rests += 1
            self._rest_for(rest_s, "several in a row have failed; check the network", outage=True)
        self._try_again(run_id, error, f"waiting, as others have failed too: {error.message}", counts=False)

    def _try_again(self, run_id: int, error: WhisperdError, phase: str, *, counts: bool = True) -> None:
        store = self._ledger.store
        self._settle(run_id, lambda db, now: store.fetch_failed(db, run_id, error, now, counts=counts), phase)

    def _succeeded(self) -> None:
        """The network is there, and room: what fails now does so by itself."""
        self._failing.clear()
        self._outage_rests, self._full_rest_s = 0, 0.0
        if self._rest is not None and self._rest.outage:
            self._rest = None

    # -- standing still ---------------------------------------------------------------------------------------------

    def _back_off(self, run_id: int, delay_s: float) -> None:
        def go_on() -> None:
            self._backing_off.discard(run_id)
            self.pump()

        self._backing_off.add(run_id)
        self._loop.call_later(delay_s, go_on)

    def _rest_until_room(self, reason: str) -> None:
        """Rest while the disk has no room at all, and each time twice as long: a download may need more than there is.

        A look at the disk costs nothing, but a try asks the site for all but the recording, and sites count that.
        """
        if self._rest is None or not self._full_rest_s:  # else several have met the full disk together
            self._full_rest_s = max(self._config.full_disk_pause_s, min(2 * self._full_rest_s, _MAX_REST_S))
        self._rest_for(self._full_rest_s, reason, until_room=True)

    def _rest_for(self, delay_s: float, reason: str, *, outage: bool = False, until_room: bool = False) -> None:
        """Begin no download for a while; of several reasons the one that lasts longest counts.

        An outage gives way to any other: that one holds also for what somebody waits for, and a network is there.
        """
        until_s, until = self._loop.time() + delay_s, self._ledger.clock() + delay_s
        rest = _Rest(reason=reason, until_s=until_s, until=until, outage=outage)
        if self._rest is not None and not self._rest.outage and self._rest.until_s >= until_s:
            return
        if self._rest is None or self._rest.reason != reason:
            log.warning("fetch lane rests for_s=%g reason=%s", delay_s, reason)
        self._rest = rest

        def go_on() -> None:
            if self._rest is not rest:
                return
            if until_room and self._room() <= 0:
                self._rest_for(self._config.full_disk_pause_s, reason, until_room=True)
                return
            log.info("fetch lane goes on")
            self._rest = None
            self.pump()

        self._loop.call_later(delay_s, go_on)
