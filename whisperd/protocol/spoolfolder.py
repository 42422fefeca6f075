"""What every helper that writes into the spool needs: folders made whole and durable, or removed; full disks told."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from whisperd.protocol.errors import ErrorCode, WhisperdError

PARTIAL = ".partial"  # ends the name of a folder that is not complete yet

_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
_FAILS = frozenset({errno.EIO, errno.ENODEV, errno.ENXIO, errno.ESTALE})


@contextmanager
def storage_errors(of: str = "the spool") -> Iterator[None]:
    """Turn a full disk (or quota, or file size limit) into `storage_full`, and one that fails into `internal`.

    One that may only be read counts as full: what waits goes on once that has changed.
    Errors that say nothing of the disk pass as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise WhisperdError(
                ErrorCode.STORAGE_FULL, f"the disk of {of} is full ({error.strerror}): make room and try again"
            ) from None
        if error.errno == errno.EROFS:
            raise WhisperdError(
                ErrorCode.STORAGE_FULL,
                f"the disk of {of} may only be read ({error.strerror}): an administrator must make it writable again; "
                "try again then",
            ) from None
        if error.errno in _FAILS:
            raise WhisperdError(
                ErrorCode.INTERNAL,
                f"the disk of {of} cannot be written ({error.strerror}): an administrator must look at it (the kernel "
                "logs more); try again once it is mended",
            ) from None
        raise


def sync_folder(path: Path) -> None:
    """Return once the folder's entries (new, renamed and removed names) are on the disk. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_folder(folder: Path) -> None:
    """Remove a folder of files, if it is there.

    What cannot be removed is swept when the daemon starts: no row names it.
    """
    with suppress(OSError):
        for entry in os.scandir(folder):
            os.unlink(entry)
        folder.rmdir()


@contextmanager
def new_folder(parent: Path, name: str, *, mode: int = 0o700) -> Iterator[Path]:
    """Give a folder to be filled; it is `<parent>/<name>`, and on the disk, once the block is left.

    The block closes and syncs the files that it makes. The folder has its name only after that, so one with a plain
    name is always whole. Where the block, or the disk, raises, no trace is left. Raises `WhisperdError`
    (`storage_errors`) and `OSError`.
    """
    partial, final = parent / f"{name}{PARTIAL}", parent / name
    # A helper that was killed in the middle leaves its partial folder, or the whole one that nobody heard of.
    remove_folder(partial)
    remove_folder(final)
    try:
        with storage_errors():
            partial.mkdir(mode=mode)
            yield partial
            sync_folder(partial)
            partial.rename(final)
            sync_folder(parent)
    except BaseException:
        remove_folder(partial)
        remove_folder(final)
        raise
