"""Submits of kind `video` and `url`: nothing to copy, so admission, one commit and the acknowledgement."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from whisperd.daemon.house import House
from whisperd.daemon.keys import fingerprints, source_key
from whisperd.daemon.operations.accepting import Fail, Reply, options_of
from whisperd.daemon.store import key_conflict
from whisperd.daemon.store.rows import Change, NewJob, about
from whisperd.daemon.wire.server import Peer
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.messages import Submit, source_to_wire


def submit_fetch(house: House, peer: Peer, params: Submit, reply: Reply, fail: Fail) -> None:
    """Handle one submit of what is to be downloaded; answers through `reply` or `fail`, once.

    The key is looked up first: a retry of an accepted submit is never refused for want of room.
    """
    same = fingerprints([source_to_wire(params.source)], params.options)
    new = _new_job(house, peer, params, same[0])
    key, store = params.key, house.ledger.store

    def look_up() -> None:
        house.ledger.read(lambda db, now: store.look_up(db, peer.uid, key, now), then, fail, by=peer)

    def then(found: tuple[Any, int]) -> None:
        row, stored_bytes = found
        if key is not None and row is not None and row["fingerprint"] not in same:
            fail(key_conflict(key))
            return
        try:
            house.refuse_when_stopping()
        except WhisperdError as error:
            fail(error)
            return
        try:
            if row is None:
                house.admit(new.uid, new.priority, size_bytes=0, stored_bytes=stored_bytes)
        except WhisperdError as error:
            if not house.under_way.maybe_wait(peer.uid, key, look_up):
                fail(error)
            return
        _accept(house, peer, new if row is None else replace(new, fingerprint=row["fingerprint"]), reply, fail)

    look_up()


def _new_job(house: House, peer: Peer, params: Submit, fingerprint: bytes) -> NewJob:
    source, options = source_to_wire(params.source), options_of(house, params)
    key = source_key(house.config, peer.uid, source, options, house.modelling.identity)
    return NewJob(
        uid=peer.uid,
        priority=params.priority,
        attached=params.attached,
        key=params.key,
        source=source,
        options=options,
        fresh=params.fresh,
        fingerprint=fingerprint,
        share_key=key,
        source_key=key,
        folder=None,
        sha256="",
        size_bytes=0,
    )


def _accept(house: House, peer: Peer, new: NewJob, reply: Reply, fail: Fail) -> None:
    # It takes its place of the queue now: the commit may be a while, and others are admitted meanwhile.
    house.accepting[new.uid, new.priority] += 1
    house.under_way.began(new.uid, new.key)

    def over() -> None:
        house.accepting[new.uid, new.priority] -= 1
        house.under_way.ended(new.uid, new.key)

    def accepted(change: Change) -> None:
        over()
        job, run = about(change)
        if change.reused:
            house.metrics.cache_hits += 1
        if new.attached:
            house.hold(job.id, peer)
        reply({"job": house.board.show(job, run).to_wire(), "reused": change.reused})

    def refused(error: WhisperdError) -> None:
        over()
        fail(error)

    store = house.ledger.store
    house.ledger.commit(lambda db, now: store.accept(db, new, now), accepted, refused, new_work=True)
