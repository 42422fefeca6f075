"""What is deleted because its time is over: ended jobs, keys, kept audio. Only on a date that can be believed."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from whisperd.daemon.loop import Loop
from whisperd.daemon.state.ledger import Ledger
from whisperd.daemon.store.rows import Change

log = logging.getLogger("whisperd")

_EVERY_S = 60.0
_GO_ON_S = 0.1  # a full batch means that there is more; the queue stays open to others between batches
_BATCH = 200
_DAY_S = 86_400.0


def boot_time() -> float:
    """Return seconds since the machine was started, those asleep included, whatever its date says."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class ClockGuard:
    """Whether the machine's date may decide what is old.

    A date that has jumped ahead by more than a day (a dead battery, a typing error, years too late) would have all
    transcripts deleted. It is believed once it has stood for `grace_s`, by the clock that cannot be set. A date that is
    set back is believed at once: under it nothing looks older than it is.
    """

    def __init__(
        self,
        *,
        grace_s: float,
        seen_at: float | None,
        wall: Callable[[], float] = time.time,
        boot: Callable[[], float] = boot_time,
    ) -> None:
        """`seen_at` is the last date that was believed before this start, if there was one."""
        self._grace_s, self._wall, self._boot = grace_s, wall, boot
        self._believed = (wall() if seen_at is None else seen_at) - boot()  # the date of the machine's start by that
        self._doubted_at: float | None = None
        self.jump_s = 0.0

    @property
    def doubts(self) -> bool:
        """True while nothing is deleted."""
        return self._doubted_at is not None

    def believes(self) -> bool:
        """Look at both clocks; return whether what is old by the date may be deleted now."""
        now, offset = self._boot(), self._wall() - self._boot()
        self.jump_s = offset - self._believed
        if self.jump_s > _DAY_S and self._grace_s:
            if self._doubted_at is None:
                self._doubted_at = now
                log.warning("the date jumped ahead jump_s=%.0f: nothing is deleted for its age", self.jump_s)
            if now - self._doubted_at < self._grace_s:
                return False
        self._believed, self._doubted_at = offset, None
        return True


class Housekeeping:
    """Deletes in the store thread, once a minute. `mark` is a file whose date says when the date was last believed."""

    def __init__(self, loop: Loop, ledger: Ledger, guard: ClockGuard, mark: Path, grace_s: float) -> None:
        self._loop, self._ledger, self._guard, self._mark, self._grace_s = loop, ledger, guard, mark, grace_s

    @property
    def problem(self) -> str | None:
        """What `health` says of a date that is not believed."""
        if not self._guard.doubts:
            return None
        days, hours = self._guard.jump_s / _DAY_S, self._grace_s / 3600
        return (
            f"the machine's date has jumped ahead by {days:.0f} days, or whisperd was off for so long: nothing is "
            f"deleted for its age for {hours:g} hours; set the date right if it is wrong"
        )

    def go_on(self) -> None:
        """Delete what is over, and again in a minute."""
        if not self._guard.believes():
            self._loop.call_later(_EVERY_S, self.go_on)
            return

        def keep_house(db: sqlite3.Connection, now: float) -> Change:
            with contextlib.suppress(OSError):  # a read-only or full disk: the date is older, no more
                os.utime(self._mark, (now, now))
            return self._ledger.store.housekeep(db, now, limit=_BATCH)

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
