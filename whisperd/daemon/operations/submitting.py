"""The submit of a descriptor: checks that need no reading, admission, the copy, then the commit and the answer.

Uploads are `submitting_upload`'s, what is to be downloaded `submitting_fetch`'s.
"""

from __future__ import annotations

import fcntl
import os
import stat
from typing import Any

from whisperd.daemon.admission import Place
from whisperd.daemon.lanes.copying import Copy
from whisperd.daemon.operations.accepting import (
    accept,
    early_fingerprints,
    fingerprint_of,
    outlives_client,
    refuse_when_useless,
)
from whisperd.daemon.operations.call import Call
from whisperd.daemon.store import key_conflict
from whisperd.daemon.store.rows import Change, about
from whisperd.daemon.wire.descriptors import close_apart, look_at
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.fields import bad_request
from whisperd.protocol.helper_messages import Copied
from whisperd.protocol.messages import Submit


def submit_file(call: Call, params: Submit) -> None:
    """Handle one submit; raises what can be refused at once. Takes the descriptor when it goes on to the copy lane."""
    size_bytes = check_descriptors(call.descriptors, max_bytes=call.house.config.max_source_bytes)
    call.house.admission.check_descriptor(call.peer.uid, params.key)
    _Submission(call, params, call.descriptors.pop(), size_bytes).begin()


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

    def __init__(self, call: Call, params: Submit, descriptor: int, size_bytes: int) -> None:
        self._call, self._params = call.followed_by(self._over), params
        self._house, self._peer = call.house, call.peer
        self._descriptor, self._size_bytes = descriptor, size_bytes
        self._stored_bytes = 0
        self._early = early_fingerprints(size_bytes, params.options)
        self._place: Place | None = None  # from its admission on

    def begin(self) -> None:
        """Count it until it is answered, and go on."""
        self._house.admission.take_up(self._peer.uid)
        self._look_up()

    def _look_up(self) -> None:
        """Look the key up first, if there is one: a retry of an accepted submit is never refused for want of room."""
        key = self._params.key
        store, uid = self._house.ledger.store, self._peer.uid
        if key is None and self._house.is_admin(uid):  # nothing to look up
            self._admit_and_copy()
            return

        def then(found: tuple[Any, int]) -> None:
            row, self._stored_bytes = found
            if key is not None and row is not None and not row["fingerprint"].startswith(self._early):
                self._give_up(key_conflict(key))
                return
            if row is None:
                self._admit_and_copy()
            else:
                self._compare(row["job_id"], row["fingerprint"][: len(self._early[0])])

        self._house.ledger.read(lambda db, now: store.look_up(db, uid, key, now), then, self._give_up, by=self._peer)

    def _admit_and_copy(self) -> None:
        house, uid, key = self._house, self._peer.uid, self._params.key
        try:
            self._house.refuse_when_stopping()
            refuse_when_useless(self._peer, self._params)
        except WhisperdError as error:
            self._give_up(error)
            return
        try:
            place = house.admission.enter(
                uid, self._params.priority, size_bytes=self._size_bytes, stored_bytes=self._stored_bytes
            )
        except WhisperdError as error:
            if not house.under_way.maybe_wait(uid, key, self._look_up):
                self._give_up(error)
            return
        self._place = place
        house.under_way.began(uid, key)
        copy: Copy = self._new_copy(
            descriptor=self._descriptor,
            progressed=lambda progress: self._grown(copy, int(progress.done)),
            copied=lambda copied: self._copied(copy, copied),
            refused=self._call.fail,
        )
        house.copying.add(copy)

    def _compare(self, job_id: int, early: bytes) -> None:
        """The key has a job. Hash the file, to see whether it is that job's: this takes no room, however full it is."""
        try:
            self._house.refuse_when_stopping()
            refuse_when_useless(self._peer, self._params)
            descriptor = os.dup(self._descriptor)  # ours is for the copy, should the key be free by then
        except WhisperdError as error:
            self._give_up(error)
            return
        except OSError as error:
            # As where none are taken from clients: an upload needs none.
            message = f"whisperd has no descriptor to spare ({error.strerror}): upload it, under the same key"
            self._give_up(WhisperdError(ErrorCode.NO_DESCRIPTOR, message))
            return
        if self._params.attached:
            # A holder that comes back holds its job from now on: its former connection may end before the comparison.
            self._house.hold(job_id, self._peer)
        reading = self._new_copy(
            descriptor=descriptor,
            keep=False,
            copied=lambda copied: self._compared(job_id, fingerprint_of(early, copied)),
            refused=self._give_up,
        )
        self._house.copying.add(reading)

    def _compared(self, job_id: int, fingerprint: bytes) -> None:
        house, params, key = self._house, self._params, self._params.key
        store, uid = house.ledger.store, self._peer.uid
        assert key is not None, "it was looked up"

        def then(known: Change | None) -> None:
            if known is None:  # its job has failed or was forgotten meanwhile
                self._admit_and_copy()
                return
            close_apart([self._descriptor])
            job, run = about(known)
            if params.attached and job.id != job_id:
                house.hold(job.id, self._peer)
            self._call.reply({"job": self._call.show(job, run), "reused": True})

        def refused(error: WhisperdError) -> None:
            if params.attached and error.code == ErrorCode.KEY_CONFLICT:
                house.let_go(job_id, self._peer)
            self._give_up(error)

        house.ledger.read(lambda db, now: store.rejoin(db, uid, key, fingerprint, now), then, refused)

    def _new_copy(self, **how: Any) -> Copy:
        return Copy(
            uid=self._peer.uid,
            priority=self._params.priority,
            folder=self._house.ledger.spool.new_folder(),
            client=None if outlives_client(self._params) else self._peer.id,
            **how,
        )

    def _grown(self, copy: Copy, copied_bytes: int) -> None:
        """Count what a file has grown by since it was admitted, which may be beyond what its user may have."""
        assert self._place is not None, "it was admitted"
        try:
            self._house.admission.grow(self._place, copied_bytes)
        except WhisperdError as error:
            self._house.copying.give_up(copy, error)

    def _give_up(self, error: WhisperdError) -> None:
        close_apart([self._descriptor])
        self._call.fail(error)

    def _copied(self, copy: Copy, copied: Copied) -> None:
        assert self._place is not None, "it was admitted"
        try:
            self._house.admission.grow(self._place, copied.size_bytes)
        except WhisperdError as error:
            self._house.ledger.spool.remove(copy.folder)
            self._call.fail(error)
            return
        accept(self._call, self._params, early=self._early[0], folder=copy.folder, copied=copied)

    def _over(self) -> None:
        admission, uid = self._house.admission, self._peer.uid
        if self._place is not None:
            admission.leave(self._place)
            self._house.under_way.ended(uid, self._params.key)  # who waits finds the place free
        admission.answered(uid)
