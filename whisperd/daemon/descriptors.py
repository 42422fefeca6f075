"""Descriptors that clients pass: nothing done to them may wait for the file system behind them.

That may be a FUSE file system of the client's own, or on a server that hangs: fstat(2) and even close(2) then wait for
its answer, as long as it likes. Reading is the copier's; the loop looks and closes by what is here.
Helpers are started where no such descriptor is (`spawning`).
Not covered: a process that holds one, or closes one, ends only when the file system lets it.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass

_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000  # what the kernel knows already is good enough
_STATX_TYPE_MODE_SIZE = 0x0203
_STATX = struct.Struct("=28xH10xQ208x")  # struct statx: stx_mode, stx_size

_libc = ctypes.CDLL(None, use_errno=True)
_libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What kind of file a descriptor is (`stat.S_IFMT` and permissions), and its size."""

    mode: int
    size_bytes: int


def look_at(fd: int) -> Status:
    """Return what the kernel knows of a descriptor, without asking the file system. Raises `OSError`."""
    buffer = ctypes.create_string_buffer(_STATX.size)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, _STATX_TYPE_MODE_SIZE, buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    mode, size_bytes = _STATX.unpack(buffer.raw)
    return Status(mode=mode, size_bytes=size_bytes)


def close_apart(fds: Iterable[int]) -> None:
    """Close descriptors in a thread of their own, soon."""
    if doomed := list(fds):
        try:
            _thread.start_new_thread(_close, (doomed,))
        except RuntimeError:  # the machine has no thread to spare
            _close(doomed)


def _close(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):  # NFS may report a late error; the descriptor is closed all the same
            os.close(fd)
