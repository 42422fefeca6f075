"""What a helper says of one run, on its way to the disk: in order, and only delayed where the disk is full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from whisperd.daemon.loop import Loop
from whisperd.daemon.state.ledger import Ledger, StoreCall
from whisperd.daemon.store.rows import Change
from whisperd.protocol.errors import ErrorCode, WhisperdError

_TRY_AGAIN_S = 1.0


class Recorder:
    """Commits the model's answers, the segments and the end of one start of a run, one commit at a time.

    What a full disk refuses is kept and tried again: the work is done, only its record is missing, and who follows the
    job must miss nothing. `ended` is called once the end is recorded.
    """

    def __init__(self, loop: Loop, ledger: Ledger, run_id: int, ended: Callable[[], None]) -> None:
        self._loop, self._ledger, self._run_id, self._ended = loop, ledger, run_id, ended
        self._segments: list[Any] = []  # not recorded yet
        self._entries: list[bytes] = []
        self._end: StoreCall[Change] | None = None
        self._busy = False  # a commit is under way, or waits to be tried again

    def note(self, entry: bytes) -> None:
        """Record one answer of the model: with the segments that follow from it, or before them."""
        self._entries.append(entry)
        self._go_on()

    def add(self, segments: Sequence[Any]) -> None:
        """Record the segments of one window."""
        self._segments.extend(segments)
        self._go_on()

    def end(self, call: StoreCall[Change]) -> None:
        """Record the end of the run, or its return to the queue, by `call`, after all that came before it."""
        self._end = call
        self._go_on()

    def _go_on(self) -> None:
        if self._busy:
            return
        if self._segments or self._entries:
            segments, self._segments = self._segments, []
            entries, self._entries = self._entries, []
            run_id, store = self._run_id, self._ledger.store
            self._commit(lambda db, now: store.add_segments(db, run_id, segments, entries=entries), self._go_on)
        elif self._end is not None:
            self._commit(self._end, self._ended)

    def _commit(self, call: StoreCall[Change], then: Callable[[], None]) -> None:
        self._busy = True

        def done(change: Change) -> None:
            self._busy = False
            then()

        record(self._loop, self._ledger, self._run_id, call, done)


def record(loop: Loop, ledger: Ledger, run_id: int, call: StoreCall[Change], then: Callable[[Change], None]) -> None:
    """Commit what became of a run; a full disk only delays that.

    A call that fails otherwise would fail for ever: the run fails in its stead.
    """

    def failed(error: WhisperdError) -> None:
        if error.code != ErrorCode.STORAGE_FULL:
            give_up(loop, ledger, run_id, error, then)
        else:
            loop.call_later(_TRY_AGAIN_S, lambda: record(loop, ledger, run_id, call, then))

    ledger.commit(call, then, failed)


def give_up(loop: Loop, ledger: Ledger, run_id: int, error: WhisperdError, then: Callable[[Change], None]) -> None:
    """Fail a run whose rows cannot be brought further. Where even that is impossible, storage has failed."""

    def failed(second: WhisperdError) -> None:
        if second.code != ErrorCode.STORAGE_FULL:
            ledger.storage_failed(f"run {run_id} cannot be brought to an end")
        else:
            loop.call_later(_TRY_AGAIN_S, lambda: give_up(loop, ledger, run_id, error, then))

    ledger.commit(lambda db, now: ledger.store.fail(db, run_id, error, now), then, failed)
