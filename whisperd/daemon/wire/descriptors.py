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
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_STUCK_S = 1.0

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


class Closer:
    """Closes descriptors in up to `threads` threads. Where all of them hang, what is to be closed waits."""

    def __init__(self, threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most_threads = threads
        self._clock = clock
        self._lock = threading.Lock()
        self._doomed: deque[int] = deque()
        self._threads = 0
        self._closing = 0  # threads that are at a descriptor; the others have none yet, or none any more
        self._taken_at = clock()

    def close(self, fds: Iterable[int]) -> None:
        """Close descriptors, soon. Never waits."""
        with self._lock:
            self._doomed.extend(fds)
            # A thread for each, so that none waits behind one that hangs. Those that have only been started count: on
            # a busy machine it takes many calls of this until they run.
            idle = self._threads - self._closing
            more = max(0, min(len(self._doomed) - idle, self.most_threads - self._threads))
            self._threads += more
        for started in range(more):
            try:
                _thread.start_new_thread(self._work, ())
            except RuntimeError:  # the machine has no thread to spare: the next call tries again
                with self._lock:
                    self._threads -= more - started
                return

    def stuck(self) -> bool:
        """True when all threads have been at the same descriptors for a while, and more are to be closed."""
        with self._lock:
            all_busy = self._closing >= self.most_threads and bool(self._doomed)
            return all_busy and self._clock() > self._taken_at + _STUCK_S

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._doomed:
                    self._threads -= 1
                    return
                fd = self._doomed.popleft()
                self._closing += 1
                self._taken_at = self._clock()
            with contextlib.suppress(OSError):  # NFS may report a late error; the descriptor is closed all the same
                os.close(fd)
            with self._lock:
                self._closing -= 1


_closer = Closer(threads=1)  # until the daemon says how many it may be


def use_closers(threads: int) -> None:
    """Let up to so many threads close (setting `closers`)."""
    _closer.most_threads = threads


def close_apart(fds: Iterable[int]) -> None:
    """Close descriptors in another thread, soon."""
    _closer.close(fds)


def closing_is_stuck() -> bool:
    """True while so many closes hang that no further descriptor should be taken: it could not be closed either."""
    return _closer.stuck()
