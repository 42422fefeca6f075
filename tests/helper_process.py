"""A helper process driven by hand: the real module behind a real socketpair, as the daemon starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from whisperd.protocol.channel import Channel
from whisperd.protocol.frames import MAX_REPLY_BYTES
from whisperd.protocol.helper_messages import Configure, Heartbeat, HelperHello, HelperMessage, from_wire, to_wire

TIMEOUT_S = 60.0
Message = TypeVar("Message")


class HelperProcess:
    """`python -m <module>` with its settings sent: `with HelperProcess("whisperd.audio.copier", {...}) as helper`.

    `answer` skips heartbeats and whatever else is not asked for, and keeps it in `seen`.
    """

    def __init__(self, module: str, settings: Mapping[str, Any], environ: Mapping[str, str] = {}) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | dict(environ),
                cwd=Path(__file__).parents[1],
            )
        self.channel = Channel(ours, max_bytes=MAX_REPLY_BYTES)
        self.seen: list[HelperMessage] = []
        self.hello = self.answer(HelperHello)
        self.send(Configure(settings=dict(settings)))

    def send(self, message: HelperMessage, descriptors: Sequence[int] = ()) -> None:
        """Send one message, with descriptors if there are any (the caller keeps its own copies)."""
        self.channel.send(to_wire(message), descriptors)

    def next(self, timeout_s: float = TIMEOUT_S) -> HelperMessage:
        """Return the next message, whatever it is. Raises `EOFError` when the helper has ended."""
        return from_wire(self.channel.receive(timeout_s)[0])

    def answer(self, *kinds: type[Message], timeout_s: float = TIMEOUT_S) -> Message:
        """Return the next message of these kinds."""
        while True:
            message = self.next(timeout_s)
            if isinstance(message, kinds):
                return message
            if not isinstance(message, Heartbeat):
                self.seen.append(message)

    @property
    def peak_memory_mb(self) -> float:
        """The most resident memory that the helper has had so far, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    @property
    def open_descriptors(self) -> int:
        """How many descriptors the helper has open."""
        return psutil.Process(self.process.pid).num_fds()

    def close(self) -> int:
        """Close our end, as a daemon that dies does; return the helper's exit status."""
        self.channel.close()
        return self.process.wait(TIMEOUT_S)

    def __enter__(self) -> HelperProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
