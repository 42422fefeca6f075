"""What a helper says of one run, on its way to the disk: in order, and only delayed where the disk is full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from whisperd.daemon.ledger import Ledger, StoreCall
from whisperd.daemon.loop import Loop
from whisperd.daemon.store.rows import Change
from whisperd.protocol.errors import ErrorCode, WhisperdError

_TRY_AGAIN_S = 1.0


class Recorder:
    """Commits the segments and the end of one start of a run, one commit at a time.

    What a full disk refuses is kept and tried again: the work is done, only its record is missing, and who follows the
    job must miss nothing. `ended` is called once the end is recorded.
    """

    def __init__(self, loop: Loop, ledger: Ledger, run_id: int, ended: Callable[[], None]) -> None:
        self._loop, self._ledger, self._run_id, self._ended = loop, ledger, run_id, ended
        self._segments: list[Any] = []  # not recorded yet
        self._end: StoreCall[Change] | None = None
        self._busy = False  # a commit is under way, or waits to be tried again
        self._dropped = False

    def add(self, segments: Sequence[Any]) -> None:
        """Record the segments of one window."""
        self._segments.extend(segments)
        self._go_on()

    def end(self, call: StoreCall[Change]) -> None:
        """Record the end of the run, by `call`, after all its segments."""
        self._end = call
        self._go_on()

    def drop(self) -> None:
        """Record nothing more: the run goes back to the queue, and what it said is void."""
        self._dropped = True

    def _go_on(self) -> None:
        if self._busy or self._dropped:
            return
        if self._segments:
            segments, self._segments = self._segments, []
            run_id, store = self._run_id, self._ledger.store
            self._commit(lambda db, now: store.add_segments(db, run_id, segments), self._go_on)
        elif self._end is not None:
            self._commit(self._end, self._ended)

    def _commit(self, call: StoreCall[Change], then: Callable[[], None]) -> None:
        self._busy = True

        def done(change: Change) -> None:
            self._busy = False
            then()

        record(self._loop, self._ledger, self._run_id, call, done, wanted=lambda: not self._dropped)


def record(
    loop: Loop,
    ledger: Ledger,
    run_id: int,
    call: StoreCall[Change],
    then: Callable[[Change], None],
    *,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Commit what became of a run; a full disk delays that, as long as it is `wanted`.

    A call that fails otherwise would fail for ever: the run fails in its stead.
    """

    def failed(error: WhisperdError) -> None:
        if error.code != ErrorCode.STORAGE_FULL:
            give_up(loop, ledger, run_id, error, then)
        else:
            loop.call_later(_TRY_AGAIN_S, again)

    def again() -> None:
        if wanted():
            record(loop, ledger, run_id, call, then, wanted=wanted)

    ledger.commit(call, then, failed)


def give_up(loop: Loop, ledger: Ledger, run_id: int, error: WhisperdError, then: Callable[[Change], None]) -> None:
    """Fail a run whose rows cannot be brought further. Where even that is impossible, storage has failed."""

    def failed(second: WhisperdError) -> None:
        if second.code != ErrorCode.STORAGE_FULL:
            ledger.storage_failed(f"run {run_id} cannot be brought to an end")
        else:
            loop.call_later(_TRY_AGAIN_S, lambda: give_up(loop, ledger, run_id, error, then))

    ledger.commit(lambda db, now: ledger.store.fail(db, run_id, error, now), then, failed)
