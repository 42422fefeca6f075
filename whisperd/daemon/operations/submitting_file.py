"""Submits of kind `fd`: checks that need no reading, then the copy. A file whose key has a job is only compared."""

from __future__ import annotations

import fcntl
import os
import stat
from typing import Any

from whisperd.daemon.keys import early_fingerprints, fingerprint_of
from whisperd.daemon.lanes.copying import Copy
from whisperd.daemon.operations.call import Call
from whisperd.daemon.operations.submitting import Submission
from whisperd.daemon.store import Known
from whisperd.daemon.store.rows import Change, about
from whisperd.daemon.wire.descriptors import close_apart, look_at
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.fields import bad_request
from whisperd.protocol.helper_messages import Copied, Progress
from whisperd.protocol.messages import Submit


def submit_file(call: Call, params: Submit) -> None:
    """Handle one submit; raises what can be refused at once. Else takes the descriptor."""
    size_bytes = check_descriptors(call.descriptors, max_bytes=call.house.config.max_source_bytes)
    call.house.admission.check_descriptor(call.peer.uid, params.key)
    _FileSubmission(call, params, call.descriptors.pop(), size_bytes).begin()


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


class _FileSubmission(Submission):
    """A submit that owns a descriptor until its copy does, or it is answered."""

    def __init__(self, call: Call, params: Submit, descriptor: int, size_bytes: int) -> None:
        super().__init__(call, params)
        self._descriptors, self._file_bytes = [descriptor], size_bytes

    @property
    def _size_bytes(self) -> int:
        return self._file_bytes

    def _is_same(self, known: Known) -> bool:
        return known.fingerprint.startswith(early_fingerprints(self._file_bytes, self._params.options))

    def _entered(self) -> None:
        copy: Copy = self._new_copy(
            descriptor=self._descriptors.pop(),
            progressed=lambda progress: self._progressed(copy, progress),
            copied=lambda copied: self._copied(copy.folder, copied),
        )
        self._house.copying.add(copy)

    def _progressed(self, copy: Copy, progress: Progress) -> None:
        """A file may grow while it is copied, beyond what its user may have."""
        try:
            self._grow(int(progress.done))
        except WhisperdError as error:
            self._house.copying.give_up(copy, error)

    def _known(self, known: Known) -> None:
        """Hash the file, to see whether it is that job's: this takes no room, however full it is."""
        self._refuse_when_useless()
        try:
            descriptor = os.dup(self._descriptors[0])  # ours is for the copy, should the key be free by then
        except OSError as error:
            # As where none are taken from clients: an upload needs none.
            message = f"whisperd has no descriptor to spare ({error.strerror}): upload it, under the same key"
            raise WhisperdError(ErrorCode.NO_DESCRIPTOR, message) from None
        if self._params.attached:
            # A holder that comes back holds its job from now on: its former connection may end before the comparison.
            self._house.hold(known.job.id, self._peer)
        compared = lambda copied: self._compared(known, copied)  # noqa: E731
        self._house.copying.add(self._new_copy(descriptor=descriptor, keep=False, copied=compared))

    def _compared(self, known: Known, copied: Copied) -> None:
        house, uid, key = self._house, self._peer.uid, str(self._params.key)
        store, fingerprint = house.ledger.store, fingerprint_of(known.fingerprint, copied.sha256)

        def then(found: Change | None) -> None:
            if found is None:  # its job has failed or was forgotten meanwhile
                self._look_up()
            else:
                self._answer(*about(found), reused=True)

        def refused(error: WhisperdError) -> None:
            if self._params.attached and error.code == ErrorCode.KEY_CONFLICT:
                house.let_go(known.job.id, self._peer)
            self._give_up(error)

        house.ledger.read(lambda db, now: store.rejoin(db, uid, key, fingerprint, now), then, refused)

    def _new_copy(self, **how: Any) -> Copy:
        return Copy(
            uid=self._peer.uid,
            priority=self._params.priority,
            folder=self._house.ledger.spool.new_folder(),
            client=None if self._outlives_client else self._peer.id,
            refused=self._give_up,
            **how,
        )

    def _over(self) -> None:
        close_apart(self._descriptors)
        super()._over()
