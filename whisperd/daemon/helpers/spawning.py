"""Programs are started from a thread that holds no client's descriptors.

A child is born with copies of its parent's descriptors and closes them before it becomes another program; so long its
parent waits. Closing may hang: a FUSE file system is asked at every close, and answers when it likes, and Python waits
with all its threads. So one thread has a table of descriptors to itself (unshare(2) with CLONE_FILES), made before the
first client can connect, and children are born from that one.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import logging
import os
import queue
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

log = logging.getLogger("whisperd.helper")

_CLONE_FILES = 0x400


@dataclass(frozen=True, slots=True)
class _Order:
    command: Callable[[int], Sequence[str]]
    env: Mapping[str, str]


class Spawner:
    """The thread that starts programs. One a process: `spawner()` returns it."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[subprocess.Popen[bytes] | Exception] = queue.SimpleQueue()
        apart = threading.Event()
        ours, theirs = socket.socketpair()
        self._socket = ours
        # Only the thread has an object for its end: in its table and in ours, numbers mean different things.
        end = theirs.detach()
        threading.Thread(target=self._serve, args=(end, apart), name="spawner", daemon=True).start()
        apart.wait()
        os.close(end)

    def start(
        self, command: Callable[[int], Sequence[str]], fd: int, env: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start `command(number)`, which inherits `fd` under that number, and nothing else but standard streams.

        Raises `OSError`.
        """
        # The thread must not run the garbage collector: an object of ours that closes its descriptor there would close
        # another one. It allocates only while we wait here.
        collects = gc.isenabled()
        gc.disable()
        try:
            socket.send_fds(self._socket, [b"\0"], [fd])
            self._orders.put(_Order(command, env))
            answer = self._answers.get()
        finally:
            if collects:
                gc.enable()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _serve(self, end: int, apart: threading.Event) -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_FILES) == 0:
            os.closerange(3, end)
            os.closerange(end + 1, os.sysconf("SC_OPEN_MAX"))
        else:  # a filter of system calls may forbid it
            end = os.dup(end)  # the other number is about to be closed
            log.warning("helpers are started beside clients' files: one that hangs will hold up the daemon")
        inbox = socket.socket(fileno=end)
        apart.set()
        while True:
            order = self._orders.get()
            _, (fd,), _, _ = socket.recv_fds(inbox, 1, 1, socket.MSG_CMSG_CLOEXEC)
            answer = _popen(order, fd)
            os.close(fd)
            self._answers.put(answer)


def _popen(order: _Order, fd: int) -> subprocess.Popen[bytes] | Exception:
    try:
        return subprocess.Popen(
            order.command(fd), stdin=subprocess.DEVNULL, stdout=2, pass_fds=[fd], env=dict(order.env)
        )
    except Exception as error:  # whatever it is: who asked for it waits
        return error


@functools.cache
def spawner() -> Spawner:
    """Return the process's spawner; the first call makes it, and comes before the first client."""
    return Spawner()
