"""A blocking socket that carries frames: what the client and the helpers hold on their side."""

from __future__ import annotations

import array
import os
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from whisperd.protocol.frames import FrameReader, encode_frame, parse_body

_RECEIVE_BYTES = 256 * 1024
_MAX_DESCRIPTORS = 4
_UCRED = struct.Struct("=iII")  # pid, uid, gid (unix(7))


class Channel:
    """Sends and receives whole frames on a connected Unix socket.

    Any thread may send; one thread at a time may receive. Received maps are trusted (they come from the daemon or
    from its helper). Descriptors are received close-on-exec, and only where `descriptors=True` asked for them.
    """

    def __init__(self, sock: socket.socket, *, max_bytes: int, descriptors: bool = False) -> None:
        self.socket = sock
        self._reader = FrameReader(max_bytes=max_bytes)
        self._descriptors = descriptors
        self._sending = threading.Lock()

    def send(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send one frame, whole. Raises `OSError` when the peer is gone."""
        self.send_frame(encode_frame(message), descriptors)

    def send_frame(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a frame that is encoded already, whole. Raises `OSError` when the peer is gone."""
        left = memoryview(frame)
        with self._sending:
            if descriptors:
                left = left[socket.send_fds(self.socket, [left], list(descriptors)) :]
            if left:  # else sending nothing to a peer that has just left would raise
                self.socket.sendall(left)

    def receive(self, timeout_s: float | None = None) -> tuple[dict[str, Any], list[int]]:
        """Return the next frame's map and descriptors.

        Raises `EOFError` when the peer has closed, `TimeoutError` when nothing came in `timeout_s`, and `FrameError`
        when the peer sends something that is no frame.
        """
        while (frame := self._reader.pop()) is None:
            self._fill(timeout_s)
        body, descriptors = frame
        return parse_body(body, trusted=True), descriptors

    def _fill(self, timeout_s: float | None) -> None:
        self.socket.settimeout(timeout_s)
        try:
            if self._descriptors:
                room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
                data, ancillary, _, _ = self.socket.recvmsg(_RECEIVE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
                fds = received_descriptors(ancillary)
            else:
                data, fds = self.socket.recv(_RECEIVE_BYTES), []
        finally:
            self.socket.settimeout(None)
        if not data:
            for fd in fds:
                os.close(fd)
            raise EOFError("the other side has closed the connection")
        self._reader.feed(data, fds)

    def close(self) -> None:
        """Close the socket and whatever descriptors nobody took."""
        for fd in self._reader.descriptors():
            os.close(fd)
        self.socket.close()


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return pid, uid and gid of who is at the other end of a Unix socket, as of his connect or listen (SO_PEERCRED).

    Raises `OSError`.
    """
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid, gid


def received_descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors in what `recvmsg` gave as ancillary data."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)
