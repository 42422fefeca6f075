"""The fetch lane: a video or an address becomes a durable file in the spool, a little ahead of the model."""

from __future__ import annotations

import itertools
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from whisperd.daemon.config import Config
from whisperd.daemon.keys import share_key
from whisperd.daemon.lanes.pool import Loss, Pool, Task
from whisperd.daemon.lanes.recording import give_up, record
from whisperd.daemon.loop import Loop
from whisperd.daemon.scheduler import Turns, pick
from whisperd.daemon.state.board import LiveRun
from whisperd.daemon.state.ledger import Ledger, StoreCall
from whisperd.daemon.store.rows import Change
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import Failed, Fetch, Fetched, FetchFailed, HelperMessage, Progress
from whisperd.protocol.jobs import Priority

log = logging.getLogger("whisperd.lanes")

_BACKOFF_FACTOR = 3
# While nothing can be had at all: the longest rest between two looks, and after how many (a day) failures count again.
_MAX_OUTAGE_REST_S = 600.0
_MAX_OUTAGE_RESTS = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rest:
    """Why no download is begun, and until when: by the loop's clock, and in Unix seconds for people."""

    reason: str
    until_s: float
    until: float
    outage: bool  # only for want of a network, so that an urgent download may try whether it is back


class FetchLane:
    """Downloads pending runs by priority and in turns."""

    def __init__(
        self,
        make_pool: Callable[[Callable[[], None]], Pool],
        ledger: Ledger,
        loop: Loop,
        config: Config,
        model: Callable[[], Sequence[Any]],
        paused: Callable[[], bool],
    ) -> None:
        self.pool = make_pool(self.pump)
        self._ledger, self._loop, self._config, self._model = ledger, loop, config, model
        self._paused = paused  # by an administrator: nothing is begun
        self._turns = Turns(config.interactive_in_a_row)
        self._generations = itertools.count(1)
        self._active: dict[int, Priority] = {}  # from the commit of the start to that of the end
        self._backing_off: set[int] = set()
        self._rest: _Rest | None = None
        self._failing: set[int] = set()  # runs whose last try was in vain, none having succeeded since
        self._outage_rests = 0  # in a row
        self._stopping = False
        self.failed = 0

    # -- what others read ----------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Runs that wait for their download, whatever they wait for."""
        return len(self._ledger.board.to_fetch)

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
        for run in change.runs:
            if run.state.ended:
                self._failing.discard(run.id)
                if run.id in self._active:
                    self.pool.cancel(run.id)
        if not self._failing:
            self._outage_rests = 0
        self.pump()

    def stop(self) -> None:
        """End the fetchers; their runs are downloaded anew after the next start."""
        self._stopping = True
        self.pool.stop()

    def pump(self) -> None:
        """Start what may start."""
        board = self._ledger.board
        while self._may_begin() and len(self._active) < self.pool.size:
            background = self._rest is None and board.fetched_bytes < self._config.fetch_ahead_bytes
            priorities = list(Priority) if background else [Priority.INTERACTIVE]
            waiting = board.to_fetch.heads(priorities, self._may_start)
            busy = dict.fromkeys(Priority, 0) | Counter(self._active.values())
            chosen = pick(waiting, self._turns, capacity=self.pool.size, busy=busy)
            if chosen is None:
                return
            self._turns.serve(chosen.priority, chosen.uid)
            self._start(chosen.id, chosen.priority)

    def _may_begin(self) -> bool:
        rests = self._rest is not None and not self._rest.outage
        return not rests and not self._stopping and not self._ledger.full and not self._paused()

    def _may_start(self, run_id: int) -> bool:
        waits = self._rest is not None and run_id in self._failing
        return not waits and run_id not in self._active and run_id not in self._backing_off

    def _start(self, run_id: int, priority: Priority) -> None:
        self._active[run_id] = priority
        store, folder = self._ledger.store, self._ledger.spool.new_folder()

        def then(change: Change) -> None:
            live = self._ledger.board.runs.get(run_id)
            if not change.runs or live is None or self._stopping:  # cancelled meanwhile, or all stops
                self._dropped(run_id)
                return
            live.phase = "downloading"
            self._hand_out(live, folder, priority)

        def failed(error: WhisperdError) -> None:
            if error.code != ErrorCode.STORAGE_FULL:
                give_up(self._loop, self._ledger, run_id, error, lambda change: self._dropped(run_id))
                return
            self._rest_for(self._config.full_disk_pause_s, error.message)
            self._dropped(run_id)

        self._ledger.commit(lambda db, now: store.fetch_started(db, run_id, folder, now), then, failed, new_work=True)

    def _dropped(self, run_id: int) -> None:
        self._active.pop(run_id, None)
        self.pump()

    def _hand_out(self, live: LiveRun, folder: str, priority: Priority) -> None:
        row, generation = live.row, next(self._generations)
        self.pool.run(
            Task(
                run=row.id,
                generation=generation,
                priority=priority,
                message=Fetch(
                    run=row.id, generation=generation, folder=folder, source=dict(row.source or {}), uid=row.uid
                ),
                progressed=lambda progress: self._progressed(row.id, progress),
                done=lambda message: self._answered(live, folder, message),
                lost=lambda loss: self._lost(row.id, loss),
            )
        )

    # -- what the helpers say --------------------------------------------------------------------------------------

    def _progressed(self, run_id: int, progress: Progress) -> None:
        live = self._ledger.board.runs.get(run_id)
        if live is None:
            return
        live.phase = _downloading(progress)
        self._ledger.teller.tell(run_id)

    def _answered(self, live: LiveRun, folder: str, message: HelperMessage) -> None:
        run_id, store = live.row.id, self._ledger.store
        match message:
            case Fetched():
                self._succeeded()
                self._settle(run_id, self._take_over(live, folder, message), "waiting for decoding")
            case FetchFailed():
                self._failed(live, message)
            case Failed(code=ErrorCode.CANCELLED):
                # The folder was doomed when the run ended; the helper may have made it after that.
                self._ledger.spool.remove(folder)
                self._active.pop(run_id, None)
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
            self._rest_for(self._config.full_disk_pause_s, message.message)
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

    def _lost(self, run_id: int, loss: Loss) -> None:
        self.failed += 1
        store = self._ledger.store
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
        """A try has failed, and the next may do better. Of several in a row that is no fault of theirs: all rest."""
        if run_id in self._ledger.board.runs:  # else it was cancelled meanwhile
            self._failing.add(run_id)
        if len(self._failing) < 2 or self._outage_rests == _MAX_OUTAGE_RESTS:
            self._back_off(run_id, delay_s)
            self._try_again(run_id, error, f"trying again in {delay_s:.0f} s: {error.message}")
            return
        if self._rest is None:
            rest_s = min(self._config.fetch_backoff_s * _BACKOFF_FACTOR**self._outage_rests, _MAX_OUTAGE_REST_S)
            self._outage_rests += 1
            self._rest_for(rest_s, "several in a row have failed; check the network", outage=True)
        self._try_again(run_id, error, f"waiting, as others have failed too: {error.message}", counts=False)

    def _try_again(self, run_id: int, error: WhisperdError, phase: str, *, counts: bool = True) -> None:
        store = self._ledger.store
        self._settle(run_id, lambda db, now: store.fetch_failed(db, run_id, error, now, counts=counts), phase)

    def _succeeded(self) -> None:
        """The network is there: what fails now does so by itself."""
        self._failing.clear()
        self._outage_rests = 0
        if self._rest is not None and self._rest.outage:
            self._rest = None

    def _settle(self, run_id: int, call: StoreCall[Change], phase: str) -> None:
        """Commit what became of a run; until then it stays active. A full disk only delays that."""

        def then(change: Change) -> None:
            self._active.pop(run_id, None)
            live = self._ledger.board.runs.get(run_id)
            if live is not None:
                live.phase = phase
                self._ledger.teller.tell(run_id)
            self.pump()

        record(self._loop, self._ledger, run_id, call, then)

    # -- standing still ---------------------------------------------------------------------------------------------

    def _back_off(self, run_id: int, delay_s: float) -> None:
        def go_on() -> None:
            self._backing_off.discard(run_id)
            self.pump()

        self._backing_off.add(run_id)
        self._loop.call_later(delay_s, go_on)

    def _rest_for(self, delay_s: float, reason: str, *, outage: bool = False) -> None:
        """Begin no download for a while; of several reasons the one that lasts longest counts."""
        until_s, until = self._loop.time() + delay_s, self._ledger.clock() + delay_s
        rest = _Rest(reason=reason, until_s=until_s, until=until, outage=outage)
        if self._rest is not None and self._rest.until_s >= until_s:
            return
        log.warning("fetch lane rests for_s=%.0f reason=%s", delay_s, reason)
        self._rest = rest

        def go_on() -> None:
            if self._rest is rest:
                log.info("fetch lane goes on")
                self._rest = None
                self.pump()

        self._loop.call_later(delay_s, go_on)


def _downloading(progress: Progress) -> str:
    done_mb, total_mb = progress.done / 1e6, progress.total / 1e6
    if progress.done <= 0:
        return "looking the recording up"
    return f"downloading ({done_mb:.1f} of {total_mb:.1f} MB)" if total_mb else f"downloading ({done_mb:.1f} MB)"
