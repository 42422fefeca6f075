"""A daemon of one's own: started as a process, in a temporary folder, for the lifetime of the program that asked."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import whisperd
from whisperctl.errors import DaemonUnreachable
from whisperd.protocol.systemd import child_environment

_START_S = 60.0  # the model is loaded after the start, so this is Python's own time and a busy machine's
_STOP_S = 10.0
_MAX_FOLDER_BYTES = 100  # a socket's path may have 107


class PrivateDaemon:
    """`whisperd` for this process alone. It ends with `close`, with this object and with this process, also by kill -9
    (then once its forked children, which may use it too, have ended).

    `flags` are whisperd's own (`--model small`); its settings are read from the usual file and variables. Raises
    `DaemonUnreachable` with the daemon's own words when it does not start.
    """

    def __init__(self, flags: Sequence[str] = ()) -> None:
        self._flags = list(flags)
        self._lock = threading.Lock()
        self._owned = _Owned(_make_folder())
        # Also called at the interpreter's exit.
        self._end = weakref.finalize(self, self._owned.end)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def socket_path(self) -> Path:
        """Where it listens."""
        return self._owned.folder / "s"

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._owned.process is not None
        return self._owned.process.pid

    def ensure(self) -> None:
        """Start it again if it has ended; what it had accepted goes on. Raises `DaemonUnreachable`."""
        if not self._owned.is_ours:  # a forked child, which uses its parent's
            return
        with self._lock:
            if not self._end.alive:
                raise RuntimeError("this transcriber is closed; make a new one")
            if self._owned.process is None or self._owned.process.poll() is not None:
                self._start()

    def close(self) -> None:
        """End the daemon and delete its folder."""
        with self._lock:
            self._end()

    def _start(self) -> None:
        folder = self._owned.folder
        command = [sys.executable, "-P", "-m", "whisperd", "--until-eof", "--socket", str(self.socket_path)]
        command += ["--state-dir", str(folder / "state"), *self._flags]
        # The daemon tells when it can be talked to as it tells systemd (sd_notify(3)), so nothing asks again and again.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, (folder / "log").open("wb") as log:
            address = folder / "n"
            address.unlink(missing_ok=True)
            told.bind(str(address))
            # A group of its own: Ctrl-C is for the program, which then ends its daemon.
            self._owned.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(os.environ, notify=address),
                start_new_session=True,
            )
            if not _is_ready(told, self._owned.process.pid):
                with suppress(subprocess.TimeoutExpired):
                    self._owned.process.wait(1)
                raise DaemonUnreachable(f"no private whisperd could be started: {_last_words(folder / 'log')}")


class _Owned:
    """What must be cleaned up. Knows nothing of its owner, so that the owner's end is noticed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self._pid = os.getpid()

    @property
    def is_ours(self) -> bool:
        return os.getpid() == self._pid

    def end(self) -> None:
        if not self.is_ours:  # a forked child that exits must not end the daemon of its parent
            return
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.terminate()  # a forked child may hold the other copy of the pipe's end
            try:
                self.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _make_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="whisperd-"))
    if len(os.fsencode(folder)) > _MAX_FOLDER_BYTES:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="whisperd-", dir="/tmp"))
    return folder


def _environment(environ: Mapping[str, str], *, notify: Path) -> dict[str, str]:
    # The same code as here, wherever this program found it.
    path = [str(Path(whisperd.__file__).parents[1]), *filter(None, [environ.get("PYTHONPATH")])]
    return child_environment(environ) | {"PYTHONPATH": os.pathsep.join(path), "NOTIFY_SOCKET": str(notify)}


def _is_ready(told: socket.socket, pid: int, clock: Callable[[], float] = time.monotonic) -> bool:
    """Wait for `READY=1`; False when the process ends before, or says nothing in time."""
    deadline = clock() + _START_S
    process = os.pidfd_open(pid)
    try:
        while (left_s := deadline - clock()) > 0:
            ready = select.select([told.fileno(), process], [], [], left_s)[0]
            if told.fileno() in ready:
                if b"READY=1" in told.recv(4096).split(b"\n"):
                    return True
            elif process in ready:
                return False
    finally:
        os.close(process)
    return False


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("whisperd: ") if lines else f"it said nothing within {_START_S:g} s"
