"""Submits of kind `video` and `url`: nothing to copy, so admission, one commit and the acknowledgement."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from whisperd.daemon.admission import Place
from whisperd.daemon.keys import fingerprints, source_key
from whisperd.daemon.operations.accepting import options_of
from whisperd.daemon.operations.call import Call
from whisperd.daemon.store import key_conflict
from whisperd.daemon.store.rows import Change, NewJob, about
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.messages import Submit, source_to_wire


def submit_fetch(call: Call, params: Submit) -> None:
    """Handle one submit of what is to be downloaded.

    The key is looked up first: a retry of an accepted submit is never refused for want of room.
    """
    house, peer, key = call.house, call.peer, params.key
    house.admission.take_up(peer.uid)
    call = call.followed_by(lambda: house.admission.answered(peer.uid))
    same = fingerprints([source_to_wire(params.source)], params.options)
    new, store = _new_job(call, params, same[0]), house.ledger.store

    def look_up() -> None:
        house.ledger.read(lambda db, now: store.look_up(db, peer.uid, key, now), then, call.fail, by=peer)

    def then(found: tuple[Any, int]) -> None:
        row, stored_bytes = found
        if key is not None and row is not None and row["fingerprint"] not in same:
            call.fail(key_conflict(key))
            return
        try:
            house.refuse_when_stopping()
        except WhisperdError as error:
            call.fail(error)
            return
        try:
            place = house.admission.enter(new.uid, new.priority, stored_bytes=stored_bytes) if row is None else None
        except WhisperdError as error:
            if not house.under_way.maybe_wait(peer.uid, key, look_up):
                call.fail(error)
            return
        _accept(call, new if row is None else replace(new, fingerprint=row["fingerprint"]), place)

    look_up()


def _new_job(call: Call, params: Submit, fingerprint: bytes) -> NewJob:
    house, uid = call.house, call.peer.uid
    source, options = source_to_wire(params.source), options_of(call, params)
    key = source_key(house.config, uid, source, options, house.model.identity)
    return NewJob(
        uid=uid,
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


def _accept(call: Call, new: NewJob, place: Place | None) -> None:
    house = call.house
    house.under_way.began(new.uid, new.key)

    def over() -> None:
        if place is not None:
            house.admission.leave(place)
        house.under_way.ended(new.uid, new.key)

    def accepted(change: Change) -> None:
        over()
        job, run = about(change)
        if change.reused:
            house.metrics.cache_hits += 1
        if new.attached:
            house.hold(job.id, call.peer)
        call.reply({"job": call.show(job, run), "reused": change.reused})

    def refused(error: WhisperdError) -> None:
        over()
        call.fail(error)

    store = house.ledger.store
    house.ledger.commit(lambda db, now: store.accept(db, new, now), accepted, refused, by=call.peer, new_work=True)
