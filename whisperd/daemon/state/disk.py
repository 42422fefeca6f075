"""What is known of the disk that holds the state. The store thread looks, so that a disk that hangs stops nobody."""

from __future__ import annotations

import logging
from collections.abc import Callable

from whisperd.daemon.config import Config
from whisperd.daemon.loop import Loop
from whisperd.daemon.state.ledger import Ledger
from whisperd.daemon.store.ballast import Ballast, free_bytes, refuse_read_only
from whisperd.protocol.errors import ErrorCode, WhisperdError

log = logging.getLogger("whisperd.disk")


class Disk:
    """Free room and the ballast. `roomy` is called when the disk was full and is not any more."""

    def __init__(
        self, loop: Loop, config: Config, ledger: Ledger, ballast: Ballast, roomy: Callable[[], object]
    ) -> None:
        self._loop, self._config, self._ledger, self._ballast, self._roomy = loop, config, ledger, ballast, roomy
        self._was_full = False
        self._times_made = 0  # of the ballast, when it was looked at last
        self._unusable = ""  # why nothing can be put there
        self.free_bytes = 0

    @property
    def full(self) -> bool:
        """The ballast is in use (or could never be made): no new work is taken, what is there goes on."""
        # It is full at once, and has room once the loop knows how much: never both "not full" and "0 bytes free".
        return self._ledger.full or self._was_full

    @property
    def problem(self) -> str | None:
        """What `health` says of it."""
        if self.full:
            return (
                f"the disk of {self._config.state_dir} is full: new work is refused and no download or decoding is "
                f"begun until {2 * self._config.ballast_bytes} bytes are free; make room"
            )
        if self._unusable:
            return f"{self._config.state_dir} cannot be used ({self._unusable}): submits are refused; look at its disk"
        if self.free_bytes < self._config.kept_free_bytes:
            return f"{self._config.state_dir} is nearly full: submits are refused until there is room"
        return None

    def prepare(self) -> None:
        """Look for the first time, before the loop runs. Raises `OSError`."""
        self._ballast.make()
        self.free_bytes = free_bytes(self._config.state_dir)
        self._was_full, self._times_made = self._ledger.full, self._ballast.times_made

    def refuse_when_full(self) -> None:
        """Raise `storage_full` while no new work can be taken."""
        if self._unusable:
            raise WhisperdError(
                ErrorCode.STORAGE_FULL,
                f"{self._config.state_dir} cannot be used ({self._unusable}): an administrator must look at its disk; "
                "submit again then",
            )
        if self.full:
            raise WhisperdError(
                ErrorCode.STORAGE_FULL,
                f"the disk that holds {self._config.state_dir} is full: make room and submit again",
            )

    def look(self) -> None:
        """Look now, and again every `disk_check_s` seconds: who makes room tells nobody."""
        spool, ballast = self._ledger.spool, self._ballast

        def look(db: object, now: float) -> tuple[int, str]:
            try:
                spool.make()
                refuse_read_only(self._config.state_dir)
                ballast.make()
                return free_bytes(self._config.state_dir), ""
            except OSError as error:
                return 0, error.strerror or str(error)

        def then(found: tuple[int, str]) -> None:
            self.free_bytes, unusable = found
            if unusable != self._unusable:
                log.error("the state folder can%s be used error=%s", "not" if unusable else "", unusable or None)
            self._unusable = unusable
            self._loop.call_later(self._config.disk_check_s, self.look)
            self._was_full = self._ledger.full
            # Not by what it was at the last look: it may have been full, and begun nothing, since then.
            times_made, self._times_made = self._times_made, self._ballast.times_made
            if times_made != self._times_made:
                log.info("the disk has room again free_bytes=%d", self.free_bytes)
                self._roomy()

        self._ledger.read(look, then, lambda error: self._loop.call_later(self._config.disk_check_s, self.look))
