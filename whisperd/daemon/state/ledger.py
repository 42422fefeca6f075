"""Commit before effect: one place where store calls are made and what they changed is told on.

`commit` runs a store call in the store thread; after its commit the board takes the change over, doomed folders are
deleted, events are pushed, the lanes look for work, who waits hears of a moved queue, and only then the caller goes on.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from typing import Any, TypeVar

from whisperd.daemon.metrics import Metrics
from whisperd.daemon.state.board import Board
from whisperd.daemon.state.spool import Spool
from whisperd.daemon.state.telling import Teller
from whisperd.daemon.store import Store
from whisperd.daemon.store.database import Database
from whisperd.daemon.store.rows import Change
from whisperd.daemon.watchers import Watchers
from whisperd.daemon.wire.server import Peer
from whisperd.protocol.errors import WhisperdError, internal_error
from whisperd.protocol.jobs import JobState

log = logging.getLogger("whisperd.jobs")

T = TypeVar("T")
StoreCall = Callable[[sqlite3.Connection, float], T]


class Ledger:
    """The store and all that follows from a commit. `clock` gives Unix seconds, for rows only, never for deadlines."""

    def __init__(
        self,
        *,
        database: Database,
        store: Store,
        board: Board,
        watchers: Watchers,
        teller: Teller,
        spool: Spool,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self.store = store
        self.board = board
        self.watchers = watchers
        self.teller = teller
        self.spool = spool
        self.metrics = metrics
        self.clock = clock
        self.when_changed: list[Callable[[Change], None]] = []  # called in this order with each change that is told

    @property
    def full(self) -> bool:
        """The disk was full and its ballast is in use: what is there goes on, and nothing is begun that takes room."""
        return self._database.ballast.missing

    def commit(
        self,
        call: StoreCall[Change],
        then: Callable[[Change], None] = lambda change: None,
        failed: Callable[[WhisperdError], object] | None = None,
        *,
        by: Peer | None = None,
        new_work: bool = False,
    ) -> None:
        """Run a store call; `then` gets its change once it is durable and told, `failed` the error otherwise.

        `by` is the client whose user it is counted for: who asks for much at once is not read on. `new_work` is what a
        full disk refuses (`Database.call`).
        """

        def committed(change: Change) -> None:
            if change == Change():  # nothing that anybody waits for, and this comes with every window
                then(change)
                return
            self.board.apply(change)
            for folder in change.folders:
                self.spool.remove(folder)
            self._note(change)
            self.watchers.publish(change.events)
            for tell in self.when_changed:
                tell(change)
            self.teller.look()
            then(change)

        self._call(call, committed, failed, by=by, new_work=new_work)

    def read(
        self,
        call: StoreCall[T],
        then: Callable[[T], None],
        failed: Callable[[WhisperdError], object] | None = None,
        *,
        by: Peer | None = None,
    ) -> None:
        """Run a call that changes nothing, in order with those that do."""
        self._call(call, then, failed, by=by)

    def _call(
        self,
        call: StoreCall[T],
        then: Callable[[T], None],
        failed: Callable[[WhisperdError], object] | None,
        *,
        by: Peer | None,
        new_work: bool = False,
    ) -> None:
        if by is not None:
            by.began()

        def done(outcome: Any) -> None:
            if by is not None:
                by.ended()
            if not isinstance(outcome, Exception):
                then(outcome)
                return
            error = outcome
            if not isinstance(error, WhisperdError):
                error = internal_error()
            if failed is None:
                log.error("store call failed code=%s message=%s", error.code, error.message)
            else:
                failed(error)

        self._database.call(lambda db: call(db, self.clock()), done, new_work=new_work)

    def storage_failed(self, reason: str) -> None:
        """End the daemon: what was committed is safe, but nothing more can be."""
        self._database.failed(reason)

    def _note(self, change: Change) -> None:
        jobs = {job.id: job for job in change.jobs}
        for event in change.events:
            if event.kind == "segment":
                continue
            state, error = event.payload["state"], event.payload.get("error")
            self.metrics.moved(JobState(state), jobs.get(event.job_id))
            log.info("job=%d state=%s%s", event.job_id, state, f" error={error['code']}" if error else "")
