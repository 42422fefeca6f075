"""What only the disk knows, for `stats`: counted in the store thread, for all who ask at once, and not all the time."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from whisperd.daemon.loop import Loop
from whisperd.daemon.state.ledger import Ledger
from whisperd.protocol.errors import WhisperdError

Then = Callable[[Mapping[str, Any]], None]
Fail = Callable[[WhisperdError], None]


class Inventory:
    """Counts jobs and bytes. It walks the spool and a table, so whoever asks while it counts waits for the next count.

    After a count it rests for as long as that took: however often clients ask, half of the store's time stays free.
    """

    def __init__(self, loop: Loop, ledger: Ledger, database_path: str) -> None:
        self._loop, self._ledger, self._database_path = loop, ledger, database_path
        self._asked: list[tuple[Then, Fail]] = []
        self._busy = False

    def ask(self, then: Then, failed: Fail) -> None:
        """Call `then` with `totals`, `spool_bytes` and `database_bytes`, none older than this call."""
        self._asked.append((then, failed))
        if not self._busy:
            self._count()

    def _count(self) -> None:
        self._busy = bool(self._asked)
        if not self._busy:
            return
        asked, self._asked = self._asked, []
        began_at = self._loop.time()

        def rest() -> None:
            self._loop.call_later(self._loop.time() - began_at, self._count)

        def counted(found: Mapping[str, Any]) -> None:
            rest()
            # A turn of its own for each: thousands may have asked, and the loop has others to serve.
            for then, _ in asked:
                self._loop.call_soon(partial(then, found))

        def failed(error: WhisperdError) -> None:
            rest()
            for _, fail in asked:
                self._loop.call_soon(partial(fail, error))

        self._ledger.read(self._look, counted, failed)

    def _look(self, db: sqlite3.Connection, now: float) -> dict[str, Any]:
        paths = (self._database_path, f"{self._database_path}-wal")
        return {
            "totals": self._ledger.store.totals(db),
            "spool_bytes": self._ledger.spool.used_bytes(),
            "database_bytes": sum(os.stat(path).st_size for path in paths if os.path.exists(path)),
        }
