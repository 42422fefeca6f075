"""Where a helper runs: in a child process of ours, or in an instance that systemd starts for our connection."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import whisperd
from whisperd.daemon.helpers.spawning import spawner
from whisperd.protocol.channel import peer_credentials


class Body(Protocol):
    """What a `Helper` needs to know of it. Making one raises `OSError` when no descriptor is left for its socket."""

    socket: socket.socket
    pid: int  # 0 while it is not known
    end_fd: int  # readable once it has ended; -1 where only the end of file tells that

    def start(self) -> None:
        """Start it. Raises `OSError`."""

    def kill(self) -> None:
        """End it at once, as far as that is in our hands; the caller closes the socket."""

    def reap(self) -> int | None:
        """Take its exit status once it has ended (negative: a signal), and close `end_fd`. None: it is not known."""


class ChildProcess:
    """`python -m module --fd N --nice N --log-level L` at the other end of a socketpair."""

    def __init__(self, module: str, *, nice: int, log_level: str, env: Mapping[str, str]) -> None:
        self.pid, self.end_fd = 0, -1
        self._process: subprocess.Popen[bytes] | None = None
        self._env = dict(env)
        self.socket, self._theirs = socket.socketpair()
        python = _python()
        self._command = lambda fd: [
            *(*python, "-m", module),
            *("--fd", str(fd), "--nice", str(nice), "--log-level", log_level),
        ]

    def start(self) -> None:
        with self._theirs:
            self._process = spawner().start(self._command, self._theirs.fileno(), self._env)
        self.pid = self._process.pid
        try:
            self.end_fd = os.pidfd_open(self.pid)
        except OSError:
            self._process.kill()
            raise

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def reap(self) -> int | None:
        if self.end_fd >= 0:
            os.close(self.end_fd)
            self.end_fd = -1
        return self._process.wait() if self._process is not None else None


class UnitInstance:
    """An instance of a service behind a socket of systemd's with `Accept=yes`: one for each connection.

    It ends when we hang up, and its end is the end of file; how it ended, its unit's log tells.
    """

    def __init__(self, address: Path) -> None:
        self.pid, self.end_fd = 0, -1
        self._address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def start(self) -> None:
        # Connecting to a Unix socket is done or refused at once; systemd accepts it later.
        self.socket.setblocking(False)
        try:
            self.socket.connect(os.fspath(self._address))
        except OSError as error:
            raise OSError(
                f"{self._address}: {error.strerror}; is its socket unit started? systemctl start whisperd-fetch.socket"
            ) from None
        _, uid, _ = peer_credentials(self.socket)
        # Whoever listens there is told what to fetch for whom, and what it answers is believed.
        if uid not in (0, os.geteuid()):
            raise PermissionError(f"{self._address} belongs to uid {uid}, and should to systemd")

    def kill(self) -> None:
        """Nothing: the instance ends with its connection."""

    def reap(self) -> int | None:
        return None


def _python() -> list[str]:
    """Return the interpreter's command. `-m` puts the working directory first on the path: a `random.py` that lies
    there must not be imported, unless this package itself came from there.
    """
    from_here = os.path.samefile(Path(whisperd.__file__).parents[1], ".")
    return [sys.executable] if from_here else [sys.executable, "-P"]
