"""systemd's small protocols, with the standard library alone; without systemd nothing happens.

sd_listen_fds(3): inherited sockets begin at descriptor 3, for the process that $LISTEN_PID names.
sd_notify(3): lines of `KEY=value` in one datagram to the socket that $NOTIFY_SOCKET names.
sd_watchdog_enabled(3): who is silent for $WATCHDOG_USEC is killed.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, MutableMapping

log = logging.getLogger("whisperd.systemd")

_FIRST_FD = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def listen_fds(environ: MutableMapping[str, str] = os.environ) -> list[int]:
    """Return the inherited listening descriptors, close-on-exec, or an empty list.

    The variables are removed: they are meant for this process once, and for none of its children.
    """
    pid, count, _ = (environ.pop(name, "") for name in _VARIABLES)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    fds = list(range(_FIRST_FD, _FIRST_FD + int(count)))
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds


def notify(state: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send lines such as `READY=1` to systemd; return whether it could be told. Never raises, never waits."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(), address)
    except OSError as error:
        log.warning("systemd could not be told state=%r error=%s", state, error)
        return False
    return True


def watchdog_timeout_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return after how many seconds without `WATCHDOG=1` systemd kills this process, or None where it never does."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()) or not microseconds.isdecimal():
        return None
    return int(microseconds) / 1e6 or None
