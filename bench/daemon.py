"""A daemon in a folder of its own, clients that add little of their own, and what processes weigh."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from whisperd.protocol.channel import Channel
from whisperd.protocol.frames import MAX_REPLY_BYTES, encode_frame

THREADS = 2
_READY_S = 120
_ANSWER_S = 600
_MB = 1e6


class Failed(Exception):
    """A subject cannot be measured; the message says why."""


class RawClient:
    """A connection that is driven by hand."""

    def __init__(self, path: Path) -> None:
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(str(path))
        self._channel = Channel(connected, max_bytes=MAX_REPLY_BYTES)
        self._last_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()

    def fileno(self) -> int:
        """Return the socket's descriptor, for `select`."""
        return self._channel.socket.fileno()

    def send(self, op: str, /, *, descriptors: Sequence[int] = (), **params: Any) -> None:
        """Send a request without waiting for its reply."""
        self._last_id += 1
        self._channel.send({"id": self._last_id, "op": op, "params": params}, descriptors)

    def receive(self) -> dict[str, Any]:
        """Return the next reply or event. Raises `Failed` for an error reply."""
        message, _ = self._channel.receive(_ANSWER_S)
        if not message.get("ok", True):
            raise Failed(f"whisperd answered {message['error']}")
        return message

    def call(self, op: str, /, *, descriptors: Sequence[int] = (), **params: Any) -> dict[str, Any]:
        """Send a request and return its result."""
        self.send(op, descriptors=descriptors, **params)
        result: dict[str, Any] = self.receive()["result"]
        return result

    def send_submit(self, path: Path, **params: Any) -> None:
        """Hand a file over without waiting for the acknowledgement."""
        with path.open("rb") as file:
            self.send("submit", descriptors=[file.fileno()], source={"kind": "fd", "name": path.name}, **params)

    def submit(self, path: Path, **params: Any) -> int:
        """Hand a file over and return its job's id."""
        self.send_submit(path, **params)
        return int(self.receive()["result"]["job"]["id"])

    def state(self, job: int) -> str:
        """Return a job's state."""
        return str(self.call("result", job=job)["job"]["state"])


class Pinger:
    """A connection that asks for `health` and nothing else; the reply is received whole and not unpacked."""

    _FRAME = encode_frame({"id": 1, "op": "health", "params": {}})

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    def ping(self) -> float:
        """Return the seconds of one round trip."""
        started = time.perf_counter()
        self._socket.sendall(self._FRAME)
        reply = self._socket.recv(65536)
        while len(reply) < 4 or len(reply) < 4 + struct.unpack_from(">I", reply)[0]:
            more = self._socket.recv(65536)
            if not more:
                raise Failed("whisperd closed the connection")
            reply += more
        return time.perf_counter() - started


class Daemon:
    """A running whisperd with real tiny.en, made by `running_daemon`."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.socket = folder / "s"
        self.folder = folder
        self.process = process

    @property
    def pid(self) -> int:
        return self.process.pid

    def client(self) -> RawClient:
        """Return a new connection."""
        return RawClient(self.socket)

    def helpers(self, module: str) -> list[int]:
        """Return the process ids of the helpers that run `module`."""
        return [child.pid for child in psutil.Process(self.pid).children() if module in child.cmdline()]

    def wait_for_words(self, job: int) -> None:
        """Wait until the model works on a job and has transcribed its first segment."""
        self._wait_for_event(job, lambda event: event["event"] == "segment")

    def wait_for_state(self, job: int, state: str) -> None:
        """Wait until a job is, or has been, in a state."""
        self._wait_for_event(job, lambda event: event["event"] == "state" and event["state"] == state)

    def wait_for_end(self, job: int) -> None:
        """Wait until a job is done, however long that takes, as long as it is heard of every ten minutes."""
        self._wait_for_event(job, lambda event: event["event"] == "end" and event["state"] == "done")

    def _wait_for_event(self, job: int, wanted: Callable[[dict[str, Any]], bool]) -> None:
        with self.client() as listener:
            listener.call("subscribe", job=job)
            while not wanted(event := listener.receive()):
                if event["event"] == "end":
                    raise Failed(f"the job ended too early: {event['state']}, {event['error']}")


@contextmanager
def running_daemon(folder: Path, *, model: str = "demo", device: str = "cpu", **settings: Any) -> Iterator[Daemon]:
    """Start whisperd with the demo's model and the default settings; stop it when the block ends.

    `settings` are values as TOML writes them. Raises `Failed` when it does not become ready.
    """
    folder.mkdir()
    lines = [f"{name} = {value}\n" for name, value in ({"threads": THREADS} | settings).items()]
    (folder / "whisperd.toml").write_text("".join(lines))
    command = [program("whisperd"), "--config", "whisperd.toml", "--model", model, "--device", device]
    command += ["--socket", "s", "--state-dir", "state", "--cache-dir", "cache"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        daemon = Daemon(folder, process)
        _wait_ready(daemon)
        yield daemon
    finally:
        process.terminate()
        process.wait()


def program(name: str) -> str:
    """Return the path of an installed console script."""
    return str(Path(sys.executable).with_name(name))


def environment(folder: Path) -> dict[str, str]:
    """Return an environment in which no configuration of the user's own is found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WHISPERD_")}
    return kept | {"HOME": str(folder), "XDG_RUNTIME_DIR": str(folder), "XDG_CONFIG_HOME": str(folder)}


def _wait_ready(daemon: Daemon) -> None:
    deadline = time.monotonic() + _READY_S
    while daemon.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        try:
            with daemon.client() as client:
                health = client.call("health")
        except OSError:  # it is not listening yet
            continue
        if health["status"] == "ready":
            return
        if health["status"] == "degraded":
            break
    raise Failed(f"whisperd is not ready; its log ends:\n{(daemon.folder / 'log').read_text()[-2000:]}")


# --- memory ---


def rss_mb(pid: int) -> float:
    """Return the resident memory of a process in MB (10^6 bytes)."""
    return _status_mb(pid, "VmRSS")


def peak_rss_mb(pid: int) -> float:
    """Return the most resident memory that it had, since its start or since `reset_peak`."""
    return _status_mb(pid, "VmHWM")


def reset_peak(pid: int) -> None:
    """Forget the peak so far (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _status_mb(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / _MB
    raise Failed(f"process {pid} has ended")
