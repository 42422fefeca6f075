"""What every helper process does first, and how it stays in touch: the helper's end of its socketpair."""

from __future__ import annotations

import argparse
import ctypes
import os
import pwd
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from whisperd import __version__
from whisperd.protocol import logs
from whisperd.protocol.channel import Channel, peer_credentials
from whisperd.protocol.frames import MAX_REPLY_BYTES
from whisperd.protocol.helper_messages import (
    Configure,
    Heartbeat,
    HelperHello,
    HelperMessage,
    from_wire,
    to_wire,
)
from whisperd.protocol.systemd import Watchdog

HEARTBEAT_S = 1.0
_PR_SET_PDEATHSIG = 1


class HelperLink:
    """A helper's connection to its daemon. `settings` are those of the `Configure` message.

    A thread reads messages into a queue and ends the process the moment the daemon is gone: no helper outlives it.
    """

    def __init__(self, channel: Channel, settings: Mapping[str, Any], watchdog: Watchdog) -> None:
        self.settings = settings
        self._watchdog = watchdog
        self._channel = channel
        self._inbox: queue.Queue[tuple[HelperMessage, list[int]]] = queue.Queue()
        self._beat = 0
        self.gauges: Callable[[], dict[str, Any]] = dict

    def send(self, message: HelperMessage) -> None:
        """Send a message; ends the process when the daemon is gone. Any thread may call it."""
        try:
            self._channel.send(to_wire(message))
        except OSError:
            os._exit(0)

    def next(self, timeout_s: float | None = None) -> tuple[HelperMessage, list[int]]:
        """Return the next message and its descriptors (the caller closes them). Raises `queue.Empty` in time."""
        return self._inbox.get(timeout=timeout_s)

    def poll(self) -> HelperMessage | None:
        """Return a message that is there already, or None (for work that looks out for `Cancel`)."""
        try:
            message, descriptors = self._inbox.get_nowait()
        except queue.Empty:
            return None
        for fd in descriptors:
            os.close(fd)
        return message

    def step(self) -> None:
        """Tell that the work got further: the next heartbeat shows it."""
        self._beat += 1

    def beat(self) -> None:
        """Send a heartbeat now, with `gauges` as they are."""
        self.send(Heartbeat(beat=self._beat, gauges=self.gauges()))

    def _read(self) -> None:
        try:
            while True:
                wire, descriptors = self._channel.receive()
                self._inbox.put((from_wire(wire), descriptors))
        except Exception:  # whatever it is, without its daemon a helper has nothing left to do
            os._exit(0)

    def _send_heartbeats(self) -> None:
        stop = threading.Event()
        while not stop.wait(HEARTBEAT_S):
            self.beat()
            self._watchdog.ping()

    def _start(self) -> None:
        threading.Thread(target=self._read, name="inbox", daemon=True).start()
        threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()


def start(role: str, argv: list[str] | None = None) -> HelperLink:
    """Become a helper: give way to the loop (nice), die with the daemon, say hello, take the settings.

    The command line is `--fd N` (this end of the socketpair, or of a connection that systemd accepted), `--nice N`,
    `--log-level L`, and `--peer USER`: whose the other end must be, where that is not plain.
    """
    parser = argparse.ArgumentParser(description=f"whisperd's {role} helper; started by the daemon, not by hand")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--log-level", choices=logs.LEVELS, default="info")
    parser.add_argument("--peer", default="")
    arguments = parser.parse_args(argv)
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)
    # Ctrl-C and systemd's SIGTERM reach the whole group; the daemon decides when its helpers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if arguments.nice:  # a unit may have seen to it, and forbidden it
        os.nice(arguments.nice)
    logs.configure(arguments.log_level)
    sock = socket.socket(fileno=arguments.fd)
    if arguments.peer and (uid := peer_credentials(sock)[1]) != pwd.getpwnam(arguments.peer).pw_uid:
        sys.exit(f"uid {uid} has connected, and only {arguments.peer} may: nothing was done for it")
    watchdog = Watchdog()
    channel = Channel(sock, max_bytes=MAX_REPLY_BYTES, descriptors=True)
    try:
        channel.send(to_wire(HelperHello(role=role, version=__version__, pid=os.getpid())))
        first = from_wire(channel.receive()[0])
    except (EOFError, OSError):
        os._exit(0)
    assert isinstance(first, Configure), "the daemon's first message is Configure"
    settings = dict(first.settings)
    if level := settings.pop("log_level", None):  # told by the daemon to one that it did not start
        logs.configure(level)
    link = HelperLink(channel, settings, watchdog)
    link._start()
    return link
