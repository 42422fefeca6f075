"""One connection to the daemon that many threads share: each sends its request, one reader hands out the replies."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from whisperctl.errors import refusal
from whisperd.protocol.channel import Channel
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.frames import MAX_REPLY_BYTES, FrameError, encode_request

MAX_OPEN = 64  # the daemon stops reading a connection with more open requests
MAX_OPEN_WAITS = 56  # so that a `cancel` always finds a place beside waiting `result`s
_LONGEST_S = 1e9  # 31 years: the longest `wait_s` of the protocol, and no more than threads can wait
_LAST_WORD_S = 1.0  # a bound: the end of the stream follows a failed send at once


class ConnectionLost(Exception):
    """The daemon has closed the connection, or it broke: whether an open request was carried out is not known."""


# A forked child inherits the descriptor; while the child lives the daemon would not see that the parent is gone.
_open_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_inherited() -> None:
    for sock in list(_open_sockets):
        sock.close()


os.register_at_fork(after_in_child=_close_inherited)


def open_channel(sock: socket.socket) -> Channel:
    """Return a channel for replies on `sock`; a forked child closes its copy."""
    _open_sockets.add(sock)
    return Channel(sock, max_bytes=MAX_REPLY_BYTES)


def request_frame(number: int, op: str, params: Mapping[str, Any]) -> bytes:
    """Return a request's frame, or raise `BadRequest` for what would cost the connection, and all that shares it."""
    try:
        return encode_request(number, op, params)
    except WhisperdError as error:
        raise refusal(error.to_wire()) from None


def seconds_left(deadline: float | None) -> float | None:
    """Return what is left until a monotonic `deadline`, from 0 to 31 years (infinity is more); None stays None."""
    return None if deadline is None else min(max(0.0, deadline - time.monotonic()), _LONGEST_S)


class _Waiter:
    __slots__ = ("done", "reply")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.reply: Mapping[str, Any] | None = None


class Connection:
    """Pipelines requests of many threads. A request holds its place until its reply came, also when nobody waits."""

    def __init__(self, sock: socket.socket, *, on_lost: Callable[[], None]) -> None:
        self._channel = open_channel(sock)
        self.greeted = threading.Event()  # what hangs on this client's connections has been asked for by this one
        self._on_lost = on_lost  # called in the reader's thread, as the last thing it does
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._waiting: dict[int, _Waiter] = {}
        self._lost: Exception | None = None
        self._reader = threading.Thread(target=self._read, name="whisperd replies", daemon=True)
        self._reader.start()

    @property
    def lost(self) -> bool:
        """True once nothing can be asked any more."""
        return self._lost is not None

    def request(
        self,
        op: str,
        params: Mapping[str, Any],
        descriptors: Sequence[int] = (),
        *,
        waits: bool = False,
        deadline: float | None = None,
    ) -> dict[str, Any]:
        """Send a request and return the `result` of its reply.

        `waits` marks one whose reply may take long. Raises `ConnectionLost`, `TimeoutError` at the monotonic
        `deadline`, `BadRequest` for one that cannot be sent, or the `WhisperdError` that the daemon answered.
        """
        waiter = self._send(op, params, descriptors, waits=waits, deadline=deadline)
        if not waiter.done.wait(seconds_left(deadline)):
            raise TimeoutError
        reply = waiter.reply
        if reply is None:
            raise self._lost or ConnectionLost()
        if reply.get("ok"):
            result: dict[str, Any] = reply.get("result") or {}
            return result
        raise refusal(reply.get("error") or {})

    def post(self, op: str, params: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send a request whose reply nobody waits for. Raises `ConnectionLost`, and `BadRequest` as `request`."""
        self._send(op, params, descriptors, waits=True, deadline=None)

    def _send(
        self, op: str, params: Mapping[str, Any], descriptors: Sequence[int], *, waits: bool, deadline: float | None
    ) -> _Waiter:
        limit = MAX_OPEN_WAITS if waits else MAX_OPEN
        number, waiter = next(self._numbers), _Waiter()
        frame = request_frame(number, op, params)  # first: what cannot be sent takes no place and breaks nothing
        with self._changed:
            if not self._changed.wait_for(lambda: self.lost or len(self._waiting) < limit, seconds_left(deadline)):
                raise TimeoutError
            if self._lost is not None:
                raise self._lost
            self._waiting[number] = waiter
        try:
            self._channel.send_frame(frame, descriptors)
        except OSError as error:
            # The daemon has hung up. Why, it may have said before: that lies unread, and the reader comes to it.
            waiter.done.wait(_LAST_WORD_S)
            self._lose(ConnectionLost(str(error)))
        except BaseException:
            # Ctrl-C may have cut the frame in the middle: nothing can follow it.
            self._lose(ConnectionLost("interrupted while sending"))
            raise
        return waiter

    def _read(self) -> None:
        reason: Exception = ConnectionLost("the daemon closed the connection")
        try:
            while True:
                message, _ = self._channel.receive()
                if message.get("id") == 0 and not message.get("ok", True):
                    # The daemon's last word on this connection: it closes after it.
                    reason = refusal(message.get("error") or {})
                self._deliver(message)
        except (EOFError, OSError, FrameError) as error:
            if not isinstance(reason, WhisperdError):
                reason = ConnectionLost(str(error))
        finally:
            self._lose(reason)
            self._channel.close()
            self._on_lost()

    def _deliver(self, message: Mapping[str, Any]) -> None:
        with self._changed:
            waiter = self._waiting.pop(message.get("id", 0), None)
            self._changed.notify()
        if waiter is not None:
            waiter.reply = message
            waiter.done.set()

    def _lose(self, reason: Exception) -> None:
        with self._changed:
            if self._lost is None:
                self._lost = reason
            waiters, self._waiting = self._waiting, {}
            self._changed.notify_all()
        for waiter in waiters.values():
            waiter.done.set()
        _shut_down(self._channel.socket)

    def close(self) -> None:
        """End the connection: open requests fail with `ConnectionLost`."""
        self._lose(ConnectionLost("the client was closed"))
        if threading.current_thread() is not self._reader:
            self._reader.join()


def _shut_down(sock: socket.socket) -> None:
    with suppress(OSError):  # it may be down already
        sock.shutdown(socket.SHUT_RDWR)  # wakes the reader, which close() would not
