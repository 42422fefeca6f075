"""A ledger in the test's own process: a real database, a real loop."""

from __future__ import annotations

from whisperd.daemon.loop import Loop
from whisperd.daemon.metrics import Metrics
from whisperd.daemon.scheduler import Turns
from whisperd.daemon.state.board import Board
from whisperd.daemon.state.ledger import Ledger
from whisperd.daemon.state.spool import Spool
from whisperd.daemon.state.telling import Teller
from whisperd.daemon.store import Retention, Store
from whisperd.daemon.store.database import Database
from whisperd.daemon.watchers import Watchers


def ledger_on(loop: Loop, database: Database, spool: Spool) -> Ledger:
    """Return a ledger of no jobs. The database is not started yet."""
    board, watchers = Board(Turns(16)), Watchers(most_per_user=1, unlimited=lambda uid: True)
    return Ledger(
        database=database,
        store=Store(Retention(jobs_s=1, keys_s=1, failed_audio_s=1)),
        board=board,
        watchers=watchers,
        teller=Teller(loop, board, watchers),
        spool=spool,
        metrics=Metrics(),
    )
