"""Has a daemon run every store call twice, the first time in vain, as a commit that meets a full disk does.

A place on PYTHONPATH: Python imports it at its start.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def rehearsed(function: Callable[[sqlite3.Connection], T]) -> Callable[[sqlite3.Connection], T]:
    """Return a call that runs `function` twice and undoes what the first time wrote."""
    from whisperd.protocol.errors import WhisperdError

    def call(db: sqlite3.Connection) -> T:
        db.execute("SAVEPOINT rehearsal")
        with suppress(WhisperdError):  # the second time says it again
            function(db)
        db.execute("ROLLBACK TO rehearsal")
        db.execute("RELEASE rehearsal")
        return function(db)

    return call


def _rehearse_all() -> None:
    from whisperd.daemon.store.database import Database

    original = Database.call

    def call(self: Database, function: Callable[[sqlite3.Connection], Any], done: Any, **how: Any) -> None:
        original(self, rehearsed(function), done, **how)

    Database.call = call  # type: ignore[method-assign]


if sys.orig_argv[1:3] == ["-m", "whisperd"]:
    _rehearse_all()
