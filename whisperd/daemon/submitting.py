"""The submit operation: checks that need no reading, admission, the copy, then one commit and the acknowledgement."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from whisperd.daemon.descriptors import close_apart, look_at
from whisperd.daemon.house import House
from whisperd.daemon.keys import digest, share_key
from whisperd.daemon.lanes.copying import Copy
from whisperd.daemon.server import Peer
from whisperd.daemon.store import key_conflict
from whisperd.daemon.store.rows import Change, NewJob, about
from whisperd.daemon.submitting_fetch import submit_fetch
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.fields import bad_request
from whisperd.protocol.helper_messages import Copied
from whisperd.protocol.messages import FileSource, Submit, UploadSource, source_to_wire

Reply = Callable[[Mapping[str, Any]], None]
Fail = Callable[[WhisperdError], None]


def submit(house: House, peer: Peer, params: Submit, descriptors: list[int], reply: Reply, fail: Fail) -> None:
    """Handle one submit: raises what can be refused at once, else answers through `reply` or `fail`, once.

    Takes the descriptor out of `descriptors` when it goes on to the copy lane.
    """
    if params.options["mode"] is None:
        params = replace(params, options={**params.options, "mode": house.config.mode})
    if isinstance(params.source, UploadSource):
        raise bad_request("source: this version takes files as descriptors (kind 'fd'), not as an upload")
    if not isinstance(params.source, FileSource):
        check_traits(params.options, house.modelling.traits)
        submit_fetch(house, peer, params, reply, fail)
        return
    size_bytes = check_descriptors(descriptors, max_bytes=house.config.max_source_bytes)
    check_traits(params.options, house.modelling.traits)
    _Submission(house, peer, params, descriptors.pop(), size_bytes, reply, fail).begin()


def check_descriptors(descriptors: list[int], *, max_bytes: int) -> int:
    """Return the size of the one regular file passed, in bytes. Raises `no_descriptor`, `bad_request`, `too_large`.

    Only a regular file (a memfd is one) can be read without the risk of waiting for somebody.
    """
    if not descriptors:
        raise WhisperdError(
            ErrorCode.NO_DESCRIPTOR, "source: kind 'fd' needs an open descriptor, sent with the frame's first byte"
        )
    if len(descriptors) > 1:
        raise bad_request(f"source: one descriptor is wanted, {len(descriptors)} came")
    (fd,) = descriptors
    try:
        flags, status = fcntl.fcntl(fd, fcntl.F_GETFL), look_at(fd)
    except OSError as error:  # a file system may keep even root out
        raise bad_request(f"source: the descriptor cannot be looked at ({error.strerror}): copy the file") from None
    if not stat.S_ISREG(status.mode):
        raise bad_request(
            f"source: the descriptor is {_kind(status.mode)}, not a regular file: copy it into one, or into a memfd"
        )
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
        raise bad_request("source: the descriptor is not open for reading")
    if status.size_bytes > max_bytes:
        raise WhisperdError(
            ErrorCode.TOO_LARGE,
            f"the file has {status.size_bytes} bytes and at most {max_bytes} are taken (setting max_source_bytes): "
            "cut it",
        )
    return status.size_bytes


def check_traits(options: Mapping[str, Any], traits: Mapping[str, Any]) -> None:
    """Raise `bad_request` for what the loaded model cannot do. Without traits (not loaded yet) nothing is refused."""
    if not traits:
        return
    if options["task"] == "translate" and not traits.get("translates", True):
        raise bad_request(
            "options: the loaded model does not translate: leave out `task`, or load a multilingual model"
        )
    language = options["language"]
    if language not in (None, "en") and not traits.get("multilingual", True):
        raise bad_request(f"options: the loaded model knows English only, not language {language!r}")
    vocabulary = traits.get("vocabulary", 0)
    tokens = [int(token) for token in options["suppress_tokens"].split(",") if token]
    if vocabulary and any(token >= vocabulary for token in tokens):
        raise bad_request(f"options: suppress_tokens holds a token that the model does not have (it has {vocabulary})")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFIFO: "a pipe",
        stat.S_IFDIR: "a directory",
        stat.S_IFCHR: "a device or terminal",
        stat.S_IFSOCK: "a socket",
        stat.S_IFBLK: "a block device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


class _Submission:
    """One submit between its checks and its answer."""

    def __init__(
        self, house: House, peer: Peer, params: Submit, descriptor: int, size_bytes: int, reply: Reply, fail: Fail
    ) -> None:
        self._house, self._peer, self._params = house, peer, params
        self._descriptor, self._size_bytes = descriptor, size_bytes
        self._reply, self._fail = reply, fail
        self._source = source_to_wire(params.source)
        self._copy: Copy | None = None

    def begin(self) -> None:
        """Look the key up first, if there is one: a retry of an accepted submit is never refused for want of room."""
        key = self._params.key
        store, uid = self._house.ledger.store, self._peer.uid
        if key is None and self._house.is_admin(uid):  # nothing to look up
            self._admit_and_copy(known=False, stored_bytes=0)
            return
        early = self._early_fingerprint()

        def then(found: tuple[Any, int]) -> None:
            row, stored_bytes = found
            if key is not None and row is not None and row["fingerprint"][: len(early)] != early:
                self._give_up(key_conflict(key))
                return
            if row is not None and self._params.attached:
                # A holder that comes back holds its job from now on, not only once its file is copied again.
                self._house.hold(row["job_id"], self._peer)
            self._admit_and_copy(known=row is not None, stored_bytes=stored_bytes)

        self._house.ledger.read(lambda db, now: store.look_up(db, uid, key, now), then, self._give_up)

    def _admit_and_copy(self, *, known: bool, stored_bytes: int) -> None:
        try:
            self._house.refuse_when_stopping()
            if not known:
                uid, priority = self._peer.uid, self._params.priority
                self._house.admit(uid, priority, size_bytes=self._size_bytes, stored_bytes=stored_bytes)
            if self._peer.closed and not self._outlives_client:
                raise WhisperdError(ErrorCode.CANCELLED, "the client left before its file was copied")
        except WhisperdError as error:
            self._give_up(error)
            return
        self._copy = Copy(
            uid=self._peer.uid,
            priority=self._params.priority,
            descriptor=self._descriptor,
            size_bytes=self._size_bytes,
            folder=self._house.ledger.spool.new_folder(),
            client=None if self._outlives_client else self._peer.id,
            copied=self._copied,
            refused=self._fail,
        )
        self._house.copying.add(self._copy)

    @property
    def _outlives_client(self) -> bool:
        """A client that can ask again by key finds its job; one without a key could never learn its id."""
        return self._params.key is not None and not self._params.attached

    def _give_up(self, error: WhisperdError) -> None:
        close_apart([self._descriptor])
        self._fail(error)

    def _early_fingerprint(self) -> bytes:
        """What is known of the source before it is copied; the first half of `fingerprint`."""
        return digest([self._source["kind"], self._size_bytes, dict(self._params.options)])

    def _copied(self, copied: Copied) -> None:
        params, house = self._params, self._house
        assert self._copy is not None
        copy = self._copy
        new = NewJob(
            uid=self._peer.uid,
            priority=params.priority,
            attached=params.attached,
            key=params.key,
            source=self._source,
            options=params.options,
            fresh=params.fresh,
            fingerprint=self._early_fingerprint() + digest([copied.sha256]),
            share_key=self._share_key(copied),
            folder=copy.folder,
            sha256=copied.sha256,
            size_bytes=copied.size_bytes,
        )

        def accepted(change: Change) -> None:
            house.copying.settled(copy)
            job, run = about(change)
            if change.reused:
                house.metrics.cache_hits += 1
            if params.attached:
                house.hold(job.id, self._peer)
            self._reply({"job": house.board.show(job, run).to_wire(), "reused": change.reused})

        def refused(error: WhisperdError) -> None:
            house.copying.settled(copy)
            house.ledger.spool.remove(copy.folder)
            self._fail(error)

        store = house.ledger.store
        house.ledger.commit(lambda db, now: store.accept(db, new, now), accepted, refused)

    def _share_key(self, copied: Copied) -> bytes:
        house = self._house
        return share_key(house.config, self._peer.uid, copied.sha256, self._params.options, house.modelling.identity)
