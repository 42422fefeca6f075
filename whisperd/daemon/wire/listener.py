"""The listening socket: inherited from systemd, or bound by ourselves where no living daemon has one."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from whisperd.daemon.config import Config, ConfigError, group_id
from whisperd.protocol.frames import encode_frame
from whisperd.protocol.systemd import listen_fds

log = logging.getLogger("whisperd.server")


class SocketTakenError(Exception):
    """Another process answers on the socket. The daemon ends with exit code 3."""


class Listener:
    """A listening socket, and whether its path is ours to remove."""

    def __init__(self, sock: socket.socket, *, path: Path | None) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._path = path  # None: inherited
        self._inode = _inode(path) if path else None

    def close(self) -> None:
        """Stop listening. Our own path is removed, unless somebody has put another socket there since."""
        if self._path is not None and self._inode == _inode(self._path):
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
        self.socket.close()

    def refuse_waiting(self, reply: Mapping[str, Any], *, for_s: float = 0.0) -> None:
        """Accept whoever waits, or comes within `for_s` seconds, send `reply`, hang up.

        Before an exit that a restart cannot mend: a connection left waiting would make systemd start us again at once,
        and so would each that comes later. Waiting for those bounds how often that happens.
        """
        frame, deadline = encode_frame(reply), time.monotonic() + for_s
        with contextlib.ExitStack() as clients, contextlib.suppress(OSError):
            while True:
                try:
                    client, _ = self.socket.accept()
                except BlockingIOError:
                    if (left_s := deadline - time.monotonic()) <= 0:
                        return
                    select.select([self.socket], [], [], left_s)
                    continue
                # Open until the end: closed with a request unread, it would greet the client's next one with EPIPE.
                clients.enter_context(client)
                with contextlib.suppress(OSError):
                    client.setblocking(False)
                    client.send(frame)
                    client.shutdown(socket.SHUT_WR)


def open_listener(config: Config, environ: MutableMapping[str, str] = os.environ) -> Listener:
    """Return the inherited listener, or a new one at `config.socket`. The caller holds the lock.

    Raises `SocketTakenError` when somebody answers there, and `ConfigError` when no socket can be made there.
    """
    if (inherited := inherited_listener(environ)) is not None:
        return inherited
    try:
        make_folder(config.socket.parent)
        _remove_stale(config.socket)
        return Listener(_bind(config), path=config.socket)
    except OSError as error:
        raise ConfigError(
            f"no socket can be made at {config.socket}: {error.strerror or error}; name another with --socket"
        ) from None


def inherited_listener(environ: MutableMapping[str, str] = os.environ) -> Listener | None:
    """Return the listening socket that systemd hands over, once, or None. Raises `ConfigError` when it is no such."""
    fds = listen_fds(environ)
    for fd in fds[1:]:
        os.close(fd)
    return Listener(_inherited(fds[0]), path=None) if fds else None


def _inherited(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"the inherited descriptor {fd} is no socket: {error.strerror}") from None
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not listening:
        raise ConfigError("the inherited socket must be a listening Unix stream socket (ListenStream= with a path)")
    return sock


def make_folder(folder: Path) -> None:
    """Make the socket's folder, which everybody may enter."""
    if not folder.exists():
        folder.mkdir(parents=True)
        folder.chmod(0o755)  # whatever the umask: the socket's own mode decides who may connect


def _remove_stale(path: Path) -> None:
    """Remove the socket of a daemon that is gone.

    Only one that refuses connections is removed: our lock says nothing about a socket that systemd listens on.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"{path} is there already and is no socket: move it away, or name another with --socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # EAGAIN, a full backlog, is a living owner too
            probe.connect(str(path))
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.ECONNREFUSED:
            log.info("stale socket removed path=%s", path)
            path.unlink(missing_ok=True)
            return
        if error.errno != errno.EAGAIN:
            raise
    raise SocketTakenError(f"another process answers on {path}: stop it first, or name another socket with --socket")


def _bind(config: Config) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Made unreachable first: nobody connects before group and mode are right.
    umask = os.umask(0o177)
    try:
        sock.bind(str(config.socket))
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(umask)
    try:
        if config.socket_group:
            os.chown(config.socket, -1, group_id(config.socket_group, "socket_group"))
        config.socket.chmod(config.socket_mode_bits)
        sock.listen(config.listen_backlog)
    except BaseException:
        config.socket.unlink(missing_ok=True)
        sock.close()
        raise
    return sock


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
