"""The retry operation: a failed or cancelled job's source once more, as a new job."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from typing import Any

from whisperd.daemon.house import House
from whisperd.daemon.keys import share_key, source_key
from whisperd.daemon.store import check_retry
from whisperd.daemon.store.rows import Change, JobRow, RunRow, about
from whisperd.daemon.wire.server import Peer
from whisperd.protocol.errors import WhisperdError


def retry(
    house: House,
    peer: Peer,
    job_id: int,
    reply: Callable[[Mapping[str, Any]], None],
    fail: Callable[[WhisperdError], None],
) -> None:
    """Answer with a new job of the old one's owner, which waits like any other: admission and quotas apply.

    Raises `stopping`. Its bytes are in the spool already, so they count once.
    """
    house.refuse_when_stopping()
    store, view = house.ledger.store, house.view_of(peer)
    model = list(house.modelling.identity)

    def key(job: JobRow, run: RunRow) -> bytes:
        if job.is_download:
            return source_key(house.config, job.uid, job.source, job.options, model)
        return share_key(house.config, job.uid, run.sha256, job.options, model)

    def look(db: sqlite3.Connection, now: float) -> tuple[JobRow, int]:
        job = store.job(db, job_id, uid=view)
        check_retry(job)
        return job, store.spool_bytes(db, job.uid)

    def admit(found: tuple[JobRow, int]) -> None:
        job, stored_bytes = found
        try:
            house.refuse_when_stopping()
            house.admit(job.uid, job.priority, size_bytes=0, stored_bytes=stored_bytes)
        except WhisperdError as error:
            fail(error)
            return
        place = (job.uid, job.priority)
        house.accepting[place] += 1

        def done(change: Change) -> None:
            house.accepting[place] -= 1
            again, run = about(change)
            reply({"job": house.board.show(again, run).to_wire()})

        def refused(error: WhisperdError) -> None:
            house.accepting[place] -= 1
            fail(error)

        house.ledger.commit(
            lambda db, now: store.retry(db, job_id, now, uid=view, model_key=key), done, refused, new_work=True
        )

    house.ledger.read(look, admit, fail, by=peer)
