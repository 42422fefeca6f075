"""The end of every submit whose bytes are in the spool: one commit, then the acknowledgement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from whisperd.daemon.house import House
from whisperd.daemon.keys import digest, fingerprints, share_key
from whisperd.daemon.lanes.copying import Copy, CopyLane
from whisperd.daemon.store.rows import Change, NewJob, about
from whisperd.daemon.wire.server import Peer
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.helper_messages import Copied
from whisperd.protocol.messages import Submit, source_to_wire

Reply = Callable[[Mapping[str, Any]], None]
Fail = Callable[[WhisperdError], None]


def followed_by(over: Callable[[], None], reply: Reply, fail: Fail) -> tuple[Reply, Fail]:
    """Return both ways to answer a submit, with `over` called behind either."""

    def replied(result: Mapping[str, Any]) -> None:
        reply(result)
        over()

    def failed(error: WhisperdError) -> None:
        fail(error)
        over()

    return replied, failed


def options_of(house: House, params: Submit) -> dict[str, Any]:
    """Return the options with the mode that is meant where none is asked for: what is done, kept and shared."""
    return {**params.options, "mode": params.options["mode"] or house.config.mode}


def early_fingerprints(size_bytes: int, options: Mapping[str, Any]) -> tuple[bytes, ...]:
    """Return what is known of a file before its bytes are there: the first half of its fingerprint.

    The same for a descriptor and an upload: a client may submit by one, and after a broken connection by the other.
    Behind it stand those that earlier versions may have kept.
    """
    return fingerprints(["fd", size_bytes], options)


def fingerprint_of(early: bytes, copied: Copied) -> bytes:
    """Return the whole fingerprint: what a later submit of the same key must have again."""
    return early + digest([copied.sha256])


def outlives_client(params: Submit) -> bool:
    """True when a client that is gone can ask again by key and find its job: without one it never learns its id."""
    return params.key is not None and not params.attached


def accept(
    house: House,
    peer: Peer,
    params: Submit,
    *,
    early: bytes,
    lane: CopyLane,
    copy: Copy,
    copied: Copied,
    reply: Reply,
    fail: Fail,
) -> None:
    """Commit the job of a file that is in the spool; answers through `reply` or `fail`, once, and settles its copy."""
    options = options_of(house, params)
    new = NewJob(
        uid=peer.uid,
        priority=params.priority,
        attached=params.attached,
        key=params.key,
        source=source_to_wire(params.source),
        options=options,
        fresh=params.fresh,
        fingerprint=fingerprint_of(early, copied),
        share_key=share_key(house.config, peer.uid, copied.sha256, options, house.modelling.identity),
        folder=copy.folder,
        sha256=copied.sha256,
        size_bytes=copied.size_bytes,
    )

    def accepted(change: Change) -> None:
        lane.settled(copy)
        job, run = about(change)
        if change.reused:
            house.metrics.cache_hits += 1
        if params.attached:
            house.hold(job.id, peer)
        reply({"job": house.board.show(job, run).to_wire(), "reused": change.reused})

    def refused(error: WhisperdError) -> None:
        lane.settled(copy)
        house.ledger.spool.remove(copy.folder)
        fail(error)

    store = house.ledger.store
    house.ledger.commit(lambda db, now: store.accept(db, new, now), accepted, refused, new_work=True)
