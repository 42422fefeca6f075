"""What systemd does with `Accept=yes`, for tests without systemd: a process for each connection."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Superserver:
    """Listens on `path` and runs `python -m MODULE --fd N ARGUMENTS` for each connection; reaps what it ran."""

    def __init__(self, path: Path, module: str, arguments: Sequence[str] = ()) -> None:
        self.path, self._module, self._arguments = path, module, arguments
        self.started: list[subprocess.Popen[bytes]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        self._reapers: list[threading.Thread] = []

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._socket.accept()
                with connection:
                    self._run(connection.fileno())

    def _run(self, fd: int) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", self._module, "--fd", str(fd), *self._arguments],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self.started.append(process)
        reaper = threading.Thread(target=process.wait)
        reaper.start()
        self._reapers.append(reaper)

    @property
    def alive(self) -> list[subprocess.Popen[bytes]]:
        """The processes that have not ended."""
        return [process for process in self.started if process.poll() is None]

    def close(self) -> None:
        """Stop listening, and end what still runs."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._socket.close()
        for process in self.alive:
            process.kill()
        for reaper in self._reapers:
            reaper.join()


@contextmanager
def superserver(path: Path, module: str, arguments: Sequence[str] = ()) -> Iterator[Superserver]:
    """Listen for a `with` block."""
    server = Superserver(path, module, arguments)
    try:
        yield server
    finally:
        server.close()
