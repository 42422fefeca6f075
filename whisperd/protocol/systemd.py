"""systemd's small protocols, with the standard library alone; without systemd nothing happens.

sd_listen_fds(3): inherited sockets begin at descriptor 3, for the process that $LISTEN_PID names.
sd_notify(3): lines of `KEY=value` in one datagram to the socket that $NOTIFY_SOCKET names.
sd_watchdog_enabled(3): who is silent for $WATCHDOG_USEC is killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Mapping, MutableMapping

log = logging.getLogger("whisperd.systemd")

_FIRST_FD = 3
_SOCKETS = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
# What it tells one service, and none of the programs that this one starts.
_OF_THE_SERVICE = frozenset(
    {*_SOCKETS, "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"}
    | {"STATE_DIRECTORY", "CACHE_DIRECTORY", "CONFIGURATION_DIRECTORY", "CREDENTIALS_DIRECTORY"}
)


def child_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for a program that this process starts: all but what systemd meant for this one alone."""
    return {name: value for name, value in environ.items() if name not in _OF_THE_SERVICE}


def listen_fds(environ: MutableMapping[str, str] = os.environ) -> list[int]:
    """Return the inherited listening descriptors, close-on-exec, or an empty list.

    The variables are removed: they are meant for this process once, and for none of its children.
    """
    pid, count, _ = (environ.pop(name, "") for name in _SOCKETS)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    fds = list(range(_FIRST_FD, _FIRST_FD + int(count)))
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds


def notify(state: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send lines such as `READY=1` to systemd; return whether it could be told. Never raises, never waits."""
    address = _notify_address(environ)
    if not address:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(), address)
    except OSError as error:
        log.warning("systemd could not be told state=%r error=%s", state, error)
        return False
    return True


def _notify_address(environ: Mapping[str, str]) -> str:
    """Return where systemd listens, or an empty string. A leading @ stands for the NUL of an abstract address."""
    address = environ.get("NOTIFY_SOCKET", "")
    return address.replace("@", "\0", 1) if address.startswith(("/", "@")) else ""


class Watchdog:
    """Tells systemd that this process lives, where its unit asks for that; elsewhere it does nothing.

    It connects when it is made: a process that makes one can give up making connections afterwards.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._socket: socket.socket | None = None
        address = _notify_address(environ)
        if address and watchdog_timeout_s(environ) is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._socket.connect(address)

    def ping(self) -> None:
        """Call this more often than the unit's `WatchdogSec=`."""
        if self._socket is not None:
            with contextlib.suppress(OSError):  # systemd is busy: the next one will do
                self._socket.send(b"WATCHDOG=1")


def watchdog_timeout_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return after how many seconds without `WATCHDOG=1` systemd kills this process, or None where it never does."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()) or not microseconds.isdecimal():
        return None
    return int(microseconds) / 1e6 or None
