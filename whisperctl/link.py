"""Staying in touch with the daemon: one shared connection, renewed when it is lost, refused after a fork."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any, TypeVar

from whisperctl.connection import Connection, ConnectionLost, open_channel, request_frame, seconds_left
from whisperctl.discovery import candidates, connect
from whisperctl.errors import DaemonUnreachable, refusal
from whisperd.protocol.channel import Channel
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.frames import FrameError

T = TypeVar("T")

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_LONGEST_RECEIVE_S = 1e6  # a socket takes no timeout of more than 24 days


class Link:
    """Carries requests to the daemon, whichever connection that takes.

    A daemon that has been reached once and goes away is tried again for `reconnect_s`; one that was never there is
    told of at once. While `needed()`, a lost connection is renewed without waiting for the next request, and `greet` is
    called with each new one, and with what opens others beside it, in a thread of its own: what `waits` comes once it
    is `greeted`, short requests do not wait for that.
    `notify` is called with a few words when the daemon is gone, and with "" when it is back.
    """

    def __init__(
        self,
        named: str | os.PathLike[str] | None,
        *,
        timeout_s: float = 30.0,
        reconnect_s: float = 60.0,
        greet: Callable[[Connection, Callable[[], Channel]], None] = lambda connection, open_channel: None,
        needed: Callable[[], bool] = lambda: False,
        notify: Callable[[str], None] = lambda words: None,
    ) -> None:
        self._paths = candidates(named)
        self._timeout_s = timeout_s
        self._reconnect_s = reconnect_s
        self._greet = greet
        self._needed = needed
        self._notify = notify
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._current: Connection | None = None
        self._met = False
        self._closed = threading.Event()

    @property
    def path(self) -> str:
        """The socket that answered, or the first that would be tried."""
        return self._paths[0]

    def call(
        self,
        op: str,
        params: Mapping[str, Any],
        descriptors: Sequence[int] = (),
        *,
        waits: bool = False,
        timeout_s: float | None = None,
        patient: bool = True,
        resend: bool = True,
    ) -> dict[str, Any]:
        """Return the result of a request, sent again on a new connection when the old one broke.

        `waits`: the reply may take any time, `timeout_s` alone bounds it (`TimeoutError`); other requests are bounded
        by the client's `timeout_s`, and `DaemonUnreachable` says so. `resend=False` is for what must not happen twice.
        """
        limit_s = timeout_s if waits or timeout_s is not None else self._timeout_s
        deadline = None if limit_s is None else time.monotonic() + limit_s
        patience_s = self._reconnect_s if patient else 0.0
        if waits:
            patience = self._patience(patience_s, deadline)
        else:
            patience = self._patience(min(patience_s, self._timeout_s), None)
        while True:
            connection = self._reach(patience, self._connection)
            with self._trying(patience):
                try:
                    # With as many waits of its own open, what `greet` asks would find no place.
                    if waits and not connection.greeted.wait(seconds_left(deadline)):
                        raise TimeoutError
                    result = connection.request(op, params, descriptors, waits=waits, deadline=deadline)
                except ConnectionLost as error:
                    if resend:
                        raise
                    raise DaemonUnreachable(
                        f"the connection broke during {op!r}, and whether it was done is not known; "
                        "look with 'whisperctl list' before trying again"
                    ) from error
                except TimeoutError:
                    if waits:
                        raise
                    raise DaemonUnreachable(
                        f"whisperd at {self.path} did not answer within {limit_s:g} s; see its log, or restart it"
                    ) from None
                break
        patience.over()
        return result

    def events(
        self, job_id: int, after_seq: int, *, deadline: float | None = None
    ) -> Iterator[tuple[Mapping[str, Any], bool]]:
        """Yield what `subscribe` sends, as `(map, is_event)`: its result first, again after each reconnect.

        Raises `TimeoutError` at the deadline.
        """
        params = {"job": job_id, "after_seq": after_seq}
        for message, is_event in self.stream("subscribe", params, deadline=deadline):
            params["after_seq"] = max(params["after_seq"], message.get("seq") or 0)
            yield message, is_event

    def stream(
        self, op: str, params: Mapping[str, Any], *, deadline: float | None = None
    ) -> Iterator[tuple[Mapping[str, Any], bool]]:
        """Yield the result of a request that events follow, and those, as `(map, is_event)`.

        After a reconnect the request is sent again, with `params` as they are by then. Each has a connection of its
        own, so that leaving it ends it and a slow reader holds up nobody. Raises `TimeoutError` at the deadline, and
        `BadRequest` for what cannot be sent.
        """
        patience = self._patience(self._reconnect_s, deadline)
        while True:
            frame = request_frame(1, op, params)
            channel = self._reach(patience, self._channel)
            with self._trying(patience), closing(channel):
                channel.send_frame(frame)
                while True:
                    message = next_message(channel, deadline)
                    if "event" not in message:
                        if not message.get("ok"):
                            raise refusal(message.get("error") or {})
                        patience.over()
                        yield message.get("result") or {}, False
                        continue
                    yield message, True

    def converse(
        self, talk: Callable[[Channel, Callable[[], None]], T], *, deadline: float | None = None
    ) -> tuple[T, Channel]:
        """Return what `talk(channel, answered)` returns, and its connection, which is its own; the caller closes it.

        When that connection breaks, `talk` is called anew with another one. It calls `answered` whenever the daemon has
        answered. Raises `TimeoutError` at the deadline, and what `talk` raises.
        """
        patience = self._patience(self._reconnect_s, deadline)

        def answered() -> None:
            self.check_usable()
            patience.over()

        while True:
            channel = self._reach(patience, self._channel)
            with self._trying(patience), ExitStack() as opened:
                opened.callback(channel.close)
                found = talk(channel, answered)
                opened.pop_all()
                return found, channel

    def close(self) -> None:
        """End the connection and whatever waits on it."""
        self._closed.set()
        with self._lock:
            current, self._current = self._current, None
        if current is not None and self._pid == os.getpid():
            current.close()

    def check_usable(self) -> None:
        """Raise `RuntimeError` in a forked child and after `close`."""
        if os.getpid() != self._pid:
            raise RuntimeError("this Client belongs to the process that made it; make a new Client after a fork")
        if self._closed.is_set():
            raise RuntimeError("this Client is closed; make a new one")

    def _reach(self, patience: _Patience, connect: Callable[[], T]) -> T:
        """Return what `connect` returns, once there is a daemon to connect to."""
        while True:
            try:
                return connect()
            except DaemonUnreachable as error:
                patience.pause_or_raise(error, hopeless=not self._met)

    @contextmanager
    def _trying(self, patience: _Patience) -> Iterator[None]:
        """One try. Where the daemon has gone, or is about to, the block ends without an error after a pause: try again.

        Raises what `patience` does when it is over, and all other errors of the block.
        """
        try:
            yield
        except TimeoutError:  # an OSError, too
            raise
        except (ConnectionLost, EOFError, OSError, FrameError):
            patience.pause_or_raise(_gone(self.path))
        except WhisperdError as error:
            if error.code != ErrorCode.STOPPING:
                raise
            patience.pause_or_raise(error)

    def _connection(self) -> Connection:
        self.check_usable()
        with self._lock:
            if self._current is None or self._current.lost:
                sock, path = connect(self._paths)
                self._settle(path)
                self._current = Connection(sock, on_lost=self._renew)
                if self._needed():
                    threading.Thread(
                        target=self._greet_new, args=(self._current,), name="whisperd greeting", daemon=True
                    ).start()
                else:
                    self._current.greeted.set()
            return self._current

    def _greet_new(self, connection: Connection) -> None:
        try:
            # Lost: the next one is greeted as well. Closed: nothing is held any more. Or no descriptor is to spare.
            with suppress(ConnectionLost, DaemonUnreachable, RuntimeError, OSError):
                self._greet(connection, self._channel)
        finally:
            connection.greeted.set()

    def _renew(self) -> None:
        """Connect again although nobody asks, for the sake of what hangs on the connection."""
        patience = self._patience(self._reconnect_s, None)
        with suppress(DaemonUnreachable, RuntimeError):
            while self._needed() and not self._closed.is_set():
                try:
                    self._connection()
                except DaemonUnreachable as error:
                    patience.pause_or_raise(error)
                else:
                    patience.over()
                    return

    def _channel(self) -> Channel:
        self.check_usable()
        sock, path = connect(self._paths)
        self._settle(path)
        return open_channel(sock)

    def _settle(self, path: str) -> None:
        # Jobs live in one daemon: what was reached first is what is reconnected to.
        self._paths, self._met = [path], True

    def _patience(self, seconds: float, deadline: float | None) -> _Patience:
        return _Patience(seconds, deadline=deadline, wait=self._closed.wait, notify=self._notify)


class _Patience:
    """How long a call goes on trying once the daemon is gone, with growing pauses: no event tells of its return."""

    def __init__(
        self,
        seconds: float,
        *,
        deadline: float | None,
        wait: Callable[[float], bool],
        notify: Callable[[str], None],
    ) -> None:
        self._seconds = seconds
        self._deadline = deadline
        self._wait = wait
        self._notify = notify
        self._until: float | None = None
        self._tries = 0

    def pause_or_raise(self, error: WhisperdError, *, hopeless: bool = False) -> None:
        """Wait a little before the next try; raise `error` when there is none, `TimeoutError` past the deadline."""
        now = time.monotonic()
        if self._until is None:
            self._until = now + self._seconds
        if hopeless or now > self._until or (self._tries and not self._seconds):
            raise error
        if self._deadline is not None and now >= self._deadline:
            raise TimeoutError from error
        self._notify("whisperd has gone away; waiting for it to come back")
        pause_s = min(_FIRST_PAUSE_S * 2**self._tries, _LONGEST_PAUSE_S) if self._tries else 0.0
        self._tries += 1
        if self._wait(min(pause_s, max(0.0, self._until - now))):
            raise error

    def over(self) -> None:
        """The daemon has answered."""
        if self._tries:
            self._notify("")
        self._until, self._tries = None, 0


def _gone(path: str) -> DaemonUnreachable:
    return DaemonUnreachable(
        f"whisperd at {path} has gone away and did not come back; see its log ('journalctl -u whisperd'), "
        "and start it again: what it had accepted goes on"
    )


def next_message(
    channel: Channel, deadline: float | None, *, longest_s: float = _LONGEST_RECEIVE_S
) -> Mapping[str, Any]:
    """Return the next message, waiting `longest_s` at a time. Raises `TimeoutError` at the deadline, and as `receive`.

    A timeout of 0 would make the socket non-blocking, and "nothing yet" another exception.
    """
    while True:
        left_s = seconds_left(deadline)
        try:
            return channel.receive(None if left_s is None else min(max(left_s, 0.001), longest_s))[0]
        except TimeoutError:
            if not seconds_left(deadline):
                raise
