"""Files in the spool: written without getting in the database's way, made durable, there whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.spoolfolder import new_folder

# Left alone, the kernel gathers hundreds of megabytes before it writes them, and a database commit that falls into
# that burst waits for it. Writing every 8 MiB out as it comes, and waiting only for the 8 MiB before, keeps at most
# 16 MiB in flight. Measured beside a 600 MB copy, three rounds on two cores: the slowest commit took 150 to 280 ms
# without it and 60 to 90 ms with it, and the copy was not slower. fdatasync instead would also commit the file
# system's journal, for which the commits wait too.
_WRITE_OUT_BYTES = 8 * 2**20

_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # sync_file_range(2)

# File systems that do not know the call; for them there is only `fsync`.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ESPIPE)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


class SpoolFile:
    """A new file that is written from front to back. `size_bytes` is what it holds so far.

    What would leave less than `min_free_bytes` of the disk free is not written; 0 takes all that there is.
    """

    def __init__(self, path: Path, *, min_free_bytes: int = 0) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self.size_bytes = 0
        self._min_free_bytes = min_free_bytes
        self._written_out = 0

    def __enter__(self) -> SpoolFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def write(self, data: memoryview) -> None:
        """Append all of `data`. Raises `OSError` and `WhisperdError` (`storage_full`)."""
        if self._min_free_bytes and self.free_bytes() - len(data) < self._min_free_bytes:
            raise WhisperdError(
                ErrorCode.STORAGE_FULL,
                f"the disk of the spool has no room for it beside the {self._min_free_bytes} bytes that must stay free "
                "(setting min_free_bytes, at least twice ballast_bytes): make room and submit again",
            )
        while data:
            count = os.write(self._fd, data)
            self.size_bytes += count
            data = data[count:]
        if self.size_bytes - self._written_out >= _WRITE_OUT_BYTES:
            self._write_out()

    def _write_out(self) -> None:
        """Start writing what is new, wait for what was started last time. Raises `OSError`."""
        start, end = self._written_out, self.size_bytes
        self._sync_range(start, end - start, _WRITE)
        if start:
            before = max(0, start - _WRITE_OUT_BYTES)
            self._sync_range(before, start - before, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
        self._written_out = end

    def _sync_range(self, offset: int, size_bytes: int, flags: int) -> None:
        """A write that failed is told once a descriptor: who passes over it here gets a clean `fsync` in the end."""
        if _libc.sync_file_range(self._fd, offset, size_bytes, flags) == 0:
            return
        number = ctypes.get_errno()
        if number not in _CANNOT:
            raise OSError(number, os.strerror(number))

    def free_bytes(self) -> int:
        """Return how many bytes are free for us on the disk beside it. Raises `OSError`."""
        status = os.fstatvfs(self._fd)
        return status.f_bavail * status.f_frsize

    def sync(self) -> None:
        """Return once everything is on the disk. Raises `OSError`."""
        os.fsync(self._fd)


@contextmanager
def new_source(spool: Path, folder: str, *, min_free_bytes: int) -> Iterator[SpoolFile]:
    """Give `<spool>/<folder>/source` to be written; it has its name, and is on the disk, once the block is left.

    So much of the disk stays free. Where the block, or the disk, raises, no trace is left (`new_folder`). Raises
    `WhisperdError` (`storage_full`) and `OSError`.
    """
    with (
        new_folder(spool, folder) as partial,
        SpoolFile(partial / "source", min_free_bytes=min_free_bytes) as target,
    ):
        yield target
        target.sync()
