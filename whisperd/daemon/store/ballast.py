"""Room kept for the day when the disk is full: a file of real blocks, given up so that the queue can still be tidied.

On a full disk SQLite cannot even delete: a `forget`, a `cancel`, the end of a run, all of them write first. Dropping
this file gives them the blocks. New work is refused until it is there again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path

log = logging.getLogger("whisperd.database")

_CHUNK_BYTES = 2**20
_PROBE_BYTES = 2**18
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Ballast:
    """The file. For the store thread; `missing` may be read anywhere. A size of 0 does without one.

    `times_made` grows each time that it is there after it was missing.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path, self._size_bytes = path, size_bytes
        self.missing = size_bytes > 0
        self.times_made = 0

    def make(self) -> None:
        """Make it, if it is missing and the disk has room for two: the second is what others may go on with."""
        if not self._size_bytes:
            self._unlink()
            return
        if self._is_whole():
            self._note_there()
            return
        self._unlink()  # of another size, or only half written when the daemon was killed
        if free_bytes(self._path.parent) < 2 * self._size_bytes:
            return
        try:
            self._write()
        except OSError as error:
            log.warning("no ballast can be made path=%s error=%r", self._path, error)
            self._unlink()
        else:
            log.info("ballast made path=%s", self._path)
            self._note_there()

    def give_to(self, path: Path) -> None:
        """Drop it, and give half of its room to the end of a file; the other half is for whoever needs it first."""
        if self.missing or not self._size_bytes:
            return
        self._drop()
        with contextlib.suppress(OSError):  # somebody else was quicker
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.posix_fallocate(fd, os.fstat(fd).st_size, self._size_bytes // 2)
            finally:
                os.close(fd)

    def drop_if_full(self, needed_bytes: int) -> None:
        """Drop it where less than `needed_bytes` are free: at the start, before anything is written."""
        with contextlib.suppress(OSError):  # a folder that cannot be read is the next caller's to tell
            if free_bytes(self._path.parent) < needed_bytes and self._path.exists():
                self._drop()

    def _note_there(self) -> None:
        self.times_made += self.missing
        self.missing = False

    def _drop(self) -> None:
        log.warning("the disk is full: ballast dropped path=%s", self._path)
        self.missing = True
        self._unlink()

    def _is_whole(self) -> bool:
        """Blocks are what counts: a file of the right length may be a hole."""
        try:
            status = self._path.stat()
        except OSError:
            return False
        return status.st_size == self._size_bytes and status.st_blocks * 512 >= self._size_bytes

    def _write(self) -> None:
        """Random bytes: a file system that compresses, or keeps zeros as holes, would make nothing of others."""
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            left = self._size_bytes
            while left:
                left -= os.write(fd, os.urandom(min(left, _CHUNK_BYTES)))
            os.fsync(fd)
        finally:
            os.close(fd)

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):  # not there; or a folder that cannot be written, which the database tells
            self._path.unlink()


def free_bytes(folder: Path) -> int:
    """Return how many bytes are free for us on a folder's file system. Raises `OSError`."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def refuse_read_only(folder: Path) -> None:
    """Raise `OSError` where a folder's file system may only be read, as the kernel makes one that it finds damaged."""
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def refuses_for_want_of_room(probe: Path, *, at_bytes: int) -> bool:
    """Write a little at an offset of a file of our own, and return whether that fails for want of room."""
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            probe.unlink()  # before anything can go wrong: it goes with its descriptor
            written = os.pwrite(fd, os.urandom(_PROBE_BYTES), at_bytes)
        finally:
            os.close(fd)
    except OSError as error:
        return error.errno in _NO_ROOM
    return written < _PROBE_BYTES
