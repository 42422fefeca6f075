"""The end of every submit whose bytes are in the spool: one commit, then the acknowledgement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whisperd.daemon.keys import digest, fingerprints, share_key
from whisperd.daemon.operations.call import Call
from whisperd.daemon.store.rows import Change, NewJob, about
from whisperd.daemon.wire.server import Peer
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import Copied
from whisperd.protocol.messages import Submit, source_to_wire


def options_of(call: Call, params: Submit) -> dict[str, Any]:
    """Return the options with the mode that is meant where none is asked for: what is done, kept and shared."""
    return {**params.options, "mode": params.options["mode"] or call.house.config.mode}


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


def refuse_when_useless(peer: Peer, params: Submit) -> None:
    """Raise `cancelled` where nobody could learn of the job any more, or hold it."""
    if peer.closed and not outlives_client(params):
        raise WhisperdError(ErrorCode.CANCELLED, "the client left before its recording was taken")


def accept(call: Call, params: Submit, *, early: bytes, folder: str, copied: Copied) -> None:
    """Commit the job of a file that is in a folder of the spool; answers `call`."""
    house, uid = call.house, call.peer.uid
    options = options_of(call, params)
    new = NewJob(
        uid=uid,
        priority=params.priority,
        attached=params.attached,
        key=params.key,
        source=source_to_wire(params.source),
        options=options,
        fresh=params.fresh,
        fingerprint=fingerprint_of(early, copied),
        share_key=share_key(house.config, uid, copied.sha256, options, house.model.identity),
        folder=folder,
        sha256=copied.sha256,
        size_bytes=copied.size_bytes,
    )

    def accepted(change: Change) -> None:
        job, run = about(change)
        if change.reused:
            house.metrics.cache_hits += 1
        if params.attached:
            house.hold(job.id, call.peer)
        call.reply({"job": call.show(job, run), "reused": change.reused})

    def refused(error: WhisperdError) -> None:
        house.ledger.spool.remove(folder)
        call.fail(error)

    store = house.ledger.store
    house.ledger.commit(lambda db, now: store.accept(db, new, now), accepted, refused, by=call.peer, new_work=True)
