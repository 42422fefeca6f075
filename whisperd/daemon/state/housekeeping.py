"""What is deleted because its time is over: ended jobs, keys, kept audio. Only on a date that can be believed."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from whisperd.daemon.loop import Loop
from whisperd.daemon.state.ledger import Ledger
from whisperd.daemon.store.rows import Change

log = logging.getLogger("whisperd")

_EVERY_S = 60.0
_GO_ON_S = 0.1  # a full batch means that there is more; the queue stays open to others between batches
_BATCH = 200
_DAY_S = 86_400.0
# A doubt outlives so long an absence. A day would not do: four hours each weekday are never 24 between two weekends.
_ABSENCE_S = 7 * _DAY_S


def boot_time() -> float:
    """Return seconds since the machine was started, those asleep included, whatever its date says."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Doubt:
    """A date that is not believed yet: how long it has stood while whisperd ran, and what it was in the end."""

    stood_s: float
    date: float


class ClockGuard:
    """The date for rows, and whether it may decide what is old.

    A date that has jumped ahead by more than a day (a dead battery, a typing error, years too late) would have all
    transcripts deleted. It is believed once it has stood for `grace_s`, by the clock that cannot be set. A date that is
    set back by more than a day is not followed: what ends under it would be years old once it is set right. Rows then
    go on from the date before.
    """

    def __init__(
        self,
        *,
        grace_s: float,
        seen_at: float | None,
        doubt: Doubt | None = None,
        wall: Callable[[], float] = time.time,
        boot: Callable[[], float] = boot_time,
    ) -> None:
        """`seen_at` is the last date that was believed before this start, if there was one, `doubt` what was not."""
        self._grace_s, self._wall, self._boot = grace_s, wall, boot
        self._looked_at = boot()
        self._believed = (wall() if seen_at is None else seen_at) - self._looked_at  # the machine's start by that
        self.doubt = doubt  # while there is one nothing is deleted
        self.jump_s = 0.0

    @property
    def gone_back(self) -> bool:
        """True while the machine's date lies more than a day before that of the rows."""
        return self.jump_s < -_DAY_S and self._grace_s > 0

    @property
    def left_s(self) -> float:
        """For how long a date in doubt must still stand."""
        return self._grace_s if self.doubt is None else max(0.0, self._grace_s - self.doubt.stood_s)

    def date(self) -> float:
        """Return the date for rows, in Unix seconds; in any thread."""
        date, expected = self._wall(), self._believed + self._boot()
        return expected if date < expected - _DAY_S and self._grace_s else date

    def believes(self) -> bool:
        """Look at both clocks; return whether what is old by `date` may be deleted now."""
        now, date = self._boot(), self._wall()
        passed_s, self._looked_at = now - self._looked_at, now
        self.jump_s = date - now - self._believed
        if self.jump_s > _DAY_S and self._grace_s:
            self.doubt = self._still_doubt(date, passed_s)
            if self.doubt.stood_s < self._grace_s:
                return False
        self.doubt = None
        if not self.gone_back:
            self._believed = date - now
        return True

    def _still_doubt(self, date: float, passed_s: float) -> Doubt:
        known = self.doubt
        if known is not None and abs(date - known.date - passed_s) <= _ABSENCE_S:
            return Doubt(known.stood_s + passed_s, date)
        log.warning("the date jumped ahead jump_s=%.0f: nothing is deleted for its age", self.jump_s)
        return Doubt(0.0, date)


class Housekeeping:
    """Deletes in the store thread, once a minute. `mark` is a file whose date says when the date was last believed."""

    def __init__(self, loop: Loop, ledger: Ledger, guard: ClockGuard, mark: Path) -> None:
        self._loop, self._ledger, self._guard, self._mark = loop, ledger, guard, mark

    @property
    def problem(self) -> str | None:
        """What `health` says of a date that is not believed."""
        days = abs(self._guard.jump_s) / _DAY_S
        if self._guard.doubt is not None:
            return (
                f"the machine's date has jumped ahead by {days:.0f} days, or whisperd was off for so long: nothing is "
                f"deleted for its age until whisperd has run for {self._guard.left_s / 3600:.3g} hours more; set the "
                "date right if it is wrong"
            )
        if self._guard.gone_back:
            return (
                f"the machine's date lies {days:.0f} days before the one it had: whisperd goes on from that one; set "
                f"the date right, or if it is right now, stop whisperd, `touch {self._mark}` and start it"
            )
        return None

    def go_on(self) -> None:
        """Delete what is over, and again in a minute."""
        doubt = None if self._guard.believes() else self._guard.doubt
        date = self._guard.date()  # what was looked at; a jump until the store's turn is the next look's to see

        def keep_house(db: sqlite3.Connection, now: float) -> Change:
            with contextlib.suppress(OSError):  # a read-only or full disk: what it says is older, no more
                _remember(self._mark, date, doubt)
            return self._ledger.store.housekeep(db, date, limit=_BATCH) if doubt is None else Change()

        def then(change: Change) -> None:
            more = len(change.gone_jobs) >= _BATCH
            self._loop.call_later(_GO_ON_S if more else _EVERY_S, self.go_on)

        self._ledger.commit(keep_house, then, lambda error: self._loop.call_later(_EVERY_S, self.go_on))


def seen_at(mark: Path) -> float | None:
    """Return the date of the mark that an earlier life has left."""
    try:
        return mark.stat().st_mtime
    except OSError:
        return None


def doubt_at(mark: Path) -> Doubt | None:
    """Return the doubt of an earlier life, which lies beside its mark."""
    try:
        stood_s, date = map(int, _doubt_beside(mark).read_bytes().split())
    except (OSError, ValueError):  # there is none; or it could not be written, and begins anew
        return None
    return Doubt(stood_s, date)


def _doubt_beside(mark: Path) -> Path:
    return mark.with_suffix(".doubt")


def _remember(mark: Path, date: float, doubt: Doubt | None) -> None:
    if doubt is None:
        os.utime(mark, (date, date))
        _doubt_beside(mark).unlink(missing_ok=True)
        return
    fd = os.open(_doubt_beside(mark), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # Always as long, and written over itself: a full disk, where much is to be deleted, has room for that.
        os.pwrite(fd, b"%012d %012d\n" % (doubt.stood_s, doubt.date), 0)
    finally:
        os.close(fd)
