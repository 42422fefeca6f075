"""Finding the daemon: which socket, and what to say when nobody answers there."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping, Sequence

from whisperctl.errors import DaemonUnreachable

_SEND_TIMEOUT_S = 30  # a daemon that takes no byte for so long is as good as gone


def candidates(named: str | os.PathLike[str] | None, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the sockets to try in order: the one named, else $WHISPERD_SOCKET, else the usual places."""
    if named := named or environ.get("WHISPERD_SOCKET"):
        return [os.fspath(named)]
    from whisperd.protocol.paths import client_sockets  # pathlib comes with it, 4 ms

    return [str(path) for path in client_sockets(environ)]


def connect(paths: Sequence[str]) -> tuple[socket.socket, str]:
    """Return a connection to the first socket that answers, and its path. Raises `DaemonUnreachable`.

    A stale socket (its daemon died) refuses, and is passed over.
    """
    failures: list[tuple[str, OSError]] = []
    for path in paths:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A kernel timeout, not settimeout(): that would make the socket non-blocking, and connect() to a busy
            # daemon (a full backlog) would then fail at once. It bounds connect() and every send.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_TIMEOUT_S, 0))
            sock.connect(path)
            return sock, path
        except OSError as error:
            sock.close()
            failures.append((path, error))
    raise DaemonUnreachable(_explain(failures))


def _explain(failures: list[tuple[str, OSError]]) -> str:
    for path, error in failures:
        if isinstance(error, PermissionError):
            return _explain_permission(path)
    if len(failures) > 1:
        tried = " or ".join(path for path, _ in failures)
        return f"no whisperd answers at {tried}; {_how_to_start(None)}"
    path, error = failures[0]
    match error:
        case FileNotFoundError():
            return f"there is no socket {path}: whisperd is not running; {_how_to_start(path)}"
        case ConnectionRefusedError():
            return f"{path} is left over from a whisperd that is no longer running; {_how_to_start(path)}"
        case BlockingIOError():
            return f"whisperd at {path} does not answer; see its log, or restart it"
    return f"cannot connect to {path}: {error.strerror or error}; check --socket and $WHISPERD_SOCKET"


def _how_to_start(path: str | None) -> str:
    if path and path.startswith("/run/whisperd/"):
        return "start it with 'systemctl start whisperd'"
    if path is None:
        return "start it with 'systemctl start whisperd', or run 'whisperd' for yourself"
    return f"start it with 'whisperd --socket {path}'"


def _explain_permission(path: str) -> str:
    import grp

    try:
        gid = os.stat(path).st_gid
    except OSError:
        return f"not allowed to reach {path}: its folder is closed to you; ask whoever runs whisperd"
    try:
        group = grp.getgrgid(gid).gr_name
    except KeyError:
        group = str(gid)
    return (
        f"not allowed to connect to {path}: it belongs to the group {group!r}; "
        f"join it (as root: usermod -aG {group} YOUR-NAME) and log in again"
    )
