"""The retry operation: a failed or cancelled job's source once more, as a new job."""

from __future__ import annotations

import sqlite3

from whisperd.daemon.keys import share_key, source_key
from whisperd.daemon.operations.call import Call
from whisperd.daemon.store import check_retry
from whisperd.daemon.store.rows import Change, JobRow, RunRow, about
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.messages import Retry


def retry(call: Call, params: Retry) -> None:
    """Answer with a new job of the old one's owner, which waits like any other: admission and quotas apply.

    Raises `stopping`. Its bytes are in the spool already, so they count once.
    """
    house, job_id = call.house, params.job
    house.refuse_when_stopping()
    store, view = house.ledger.store, call.view()
    model = list(house.model.identity)

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
            place = house.admission.enter(job.uid, job.priority, stored_bytes=stored_bytes)
        except WhisperdError as error:
            call.fail(error)
            return

        def done(change: Change) -> None:
            house.admission.leave(place)
            call.reply({"job": call.show(*about(change))})

        def refused(error: WhisperdError) -> None:
            house.admission.leave(place)
            call.fail(error)

        house.ledger.commit(
            lambda db, now: store.retry(db, job_id, now, uid=view, model_key=key),
            done,
            refused,
            by=call.peer,
            new_work=True,
        )

    house.ledger.read(look, admit, call.fail, by=call.peer)
