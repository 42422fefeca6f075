"""One client's socket: moves its bytes and keeps every limit of time. And `Peer`, what the handlers see of it."""

from __future__ import annotations

import array
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from whisperd.daemon.config import Config
from whisperd.daemon.loop import READ, WRITE, Loop, Timer
from whisperd.daemon.wire.connection import Connection
from whisperd.daemon.wire.descriptors import close_apart, closing_is_stuck
from whisperd.daemon.wire.user_budget import UserBudget
from whisperd.protocol.channel import received_descriptors
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.messages import Request

log = logging.getLogger("whisperd.server")

Turn = Callable[[Callable[[], None]], object]
# The two ways to answer a request, of which one is called, once.
Reply = Callable[[Mapping[str, Any]], None]
Fail = Callable[[WhisperdError], None]

_READ_BYTES = 64 * 1024
# Where no frame has begun. Small frames take several times their bytes once they are cut, and a millisecond the 64 KiB:
# a thousand clients that send nothing else must not have that read of each at once.
_FIRST_READ_BYTES = 8 * 1024
# What one connection may do in one turn of the loop before the others have theirs.
_WRITE_BYTES_A_TURN = 256 * 1024
# Room for as many descriptors as the kernel passes at once: a truncated message then means that we have run out.
_ANCILLARY_BYTES = socket.CMSG_SPACE(253 * array.array("i").itemsize)
_LOW_WATER_BYTES = 64 * 1024


class Peer:
    """A client as the handlers see it. `uid`, `gid` and `pid` are the kernel's word.

    Answers to a peer that has gone are dropped, so nobody has to look first.
    """

    __slots__ = ("_link", "gid", "id", "pid", "uid")

    def __init__(self, number: int, credentials: tuple[int, int, int], link: Link) -> None:
        self.id = number
        self.pid, self.uid, self.gid = credentials
        self._link = link

    @property
    def closed(self) -> bool:
        """True once it is gone or being sent away."""
        return self._link.connection.closed

    @property
    def pending_output(self) -> int:
        """Bytes that wait to be read by it."""
        return self._link.connection.output_bytes

    def reply(self, request_id: int, result: Mapping[str, Any]) -> None:
        """Answer an open request; values of `result` may be `frames.Raw`. A subscription stays open after this."""
        self._link.connection.reply(request_id, result)

    def fail(self, request_id: int, error: WhisperdError) -> None:
        """Answer an open request with an error."""
        self._link.connection.fail(request_id, error)

    def push(self, request_id: int, event: Mapping[str, Any], *, skippable: bool = False) -> bool:
        """Send an event (`{"event": ..., ...}`) of an open subscription; return whether it was queued.

        Skippable ones are dropped while other output waits. Whoever lets `max_output_bytes` of events lie is cut off.
        """
        return self._link.connection.push(request_id, event, skippable=skippable)

    def finish(self, request_id: int) -> None:
        """End a subscription: it no longer counts as an open request."""
        self._link.connection.finish(request_id)

    def began(self) -> None:
        """The store works for this client: counted for its user until `ended`."""
        self._link.budget.began()

    def ended(self) -> None:
        """It has answered."""
        self._link.budget.ended()

    def hold(self, held: bool) -> None:
        """Read no further requests of this client, or go on: how it feels that it sends too fast."""
        self._link.connection.hold(held)

    def in_turn(self, start: Turn) -> None:
        """Call `start(done)` when little output waits and it is its turn: for what may be large, and is read for it.

        `start` gets one answer, or one piece of a long list, on its way and calls `done` once, whatever came of it;
        only then has the next its turn. Never called where the client is gone.
        """
        self._link.in_turn(start)


class _State(Enum):
    OPEN = "open"
    FLUSHING = "flushing"  # nothing is read any more; what is queued is sent
    LINGERING = "lingering"  # all is sent and said; what still comes is thrown away
    CLOSED = "closed"


class Link:
    """A connection's socket, its place in the loop and its deadlines.

    `dispatch(peer, request, descriptors)` gets each good request. `gone(link)` is called when it takes no more
    requests, `closed(link)` when its socket is closed; each once, in this order.
    """

    def __init__(
        self,
        loop: Loop,
        config: Config,
        sock: socket.socket,
        peer_id: int,
        credentials: tuple[int, int, int],
        *,
        budget: UserBudget,
        dispatch: Callable[[Peer, Request, list[int]], None],
        gone: Callable[[Link], None],
        closed: Callable[[Link], None],
    ) -> None:
        self._loop, self._config = loop, config
        self._dispatch_to, self._gone, self._closed = dispatch, gone, closed
        self._socket = sock
        self.budget = budget
        self._state = _State.OPEN
        self.connection = Connection(
            open_requests=self._config.open_requests,
            max_output_bytes=self._config.max_output_bytes,
            budget=budget,
            output=self._wake,
        )
        self.peer = Peer(peer_id, credentials, self)
        self._linger = False
        self._scheduled = False
        self._in_line = False  # for the next slice of its user's
        self._blocked = False  # the kernel takes no more for now
        self._progress_at = 0.0
        self._send_timer: Timer | None = None
        self._frame_timer: Timer | None = None
        self._frame_number = 0
        self._turns: deque[Turn] = deque()
        self._in_turn = False
        self._waits_for_room = False
        self._interest = READ
        self._loop.register(sock, READ, self._on_ready)

    # --- a turn ---

    def _wake(self) -> None:
        if not self._scheduled and self._state is not _State.CLOSED:
            self._scheduled = True
            self._loop.call_soon(self._run_scheduled)

    def _run_scheduled(self) -> None:
        self._scheduled = False
        self._guarded(0)

    def _on_ready(self, events: int) -> None:
        self._guarded(events)

    def _guarded(self, events: int) -> None:
        """Take a turn; an error of our own ends this connection and no other."""
        try:
            self._turn(events)
        except Exception:
            log.exception("connection failed uid=%d", self.peer.uid)
            self.abort("internal error")

    def _turn(self, events: int) -> None:
        if events & WRITE:
            self._blocked = False
        # What is not read now, epoll tells of again.
        if events & READ and (not self._reads or self.budget.may_read()):
            self._read()
        if self._state is _State.OPEN:
            self._step()
        self._flush()
        self._settle()

    def _step(self) -> None:
        for _ in range(self._config.turn_requests):
            if not self.connection.can_step:
                return
            if not self.budget.may_handle():
                return
            self.connection.step(self._dispatch)

    def _run_in_line(self) -> None:
        self._in_line = False
        if self._state is not _State.CLOSED:
            self._guarded(0)

    def _dispatch(self, request: Request, descriptors: list[int]) -> None:
        self._dispatch_to(self.peer, request, descriptors)

    def _settle(self) -> None:
        """Bring state, interest and timers in line with what the turn has left."""
        if self.connection.overflowed:
            self.abort(f"more than {self._config.max_output_bytes} bytes of events unread")
        elif self.connection.broken and self._state is _State.OPEN:
            self._linger = True
            self.end()
        if self._state is _State.FLUSHING and not self.connection.output_bytes:
            self._all_sent()
        if self._state is _State.CLOSED:
            return
        if self.connection.can_step and not self._in_line:
            self._in_line = True
            self.budget.line_up(self._run_in_line)
        reading = self._reads
        interest = (READ if reading else 0) | (WRITE if self.connection.output_bytes else 0)
        if interest != self._interest:
            self._loop.modify(self._socket, interest)
            self._interest = interest
        self._watch_frame(reading)
        self._watch_output()
        if self.budget.full and not self._waits_for_room:
            self._waits_for_room = True
            self.budget.when_not_full(self._room_again)

    def _room_again(self) -> None:
        self._waits_for_room = False
        self._wake()

    @property
    def _reads(self) -> bool:
        return self._state is _State.LINGERING or (self._state is _State.OPEN and self.connection.wants_input)

    # --- reading ---

    def _read(self) -> None:
        if not self._reads:
            # Nothing was to be read, so this is a hang-up: both directions are closed. What came before it counts.
            if not self._interest & READ and not self.connection.can_step:
                self.abort("gone")
            return
        try:
            if self._state is _State.LINGERING or closing_is_stuck():
                # A plain recv drops descriptors, without a leak and without asking their file systems.
                data = self._socket.recv(_READ_BYTES)
                fds: list[int] = []
                flags = 0
            else:
                size = _READ_BYTES if self.connection.mid_frame else _FIRST_READ_BYTES
                data, ancillary, flags, _ = self._socket.recvmsg(size, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
                fds = received_descriptors(ancillary)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort("gone")
            return
        if flags & socket.MSG_CTRUNC:
            close_apart(fds)
            log.error("client dropped: its descriptors did not arrive whole uid=%d", self.peer.uid)
            self.abort("descriptors lost")
        elif self._state is _State.OPEN and data:
            self.connection.receive(data, fds)
        elif not data:
            close_apart(fds)
            self._linger = False
            self.end()
            if self._state is _State.LINGERING:
                self._close("gone")

    def _watch_frame(self, reading: bool) -> None:
        """Keep a deadline over a frame that has begun, as long as its rest is for the client to send."""
        begun = reading and self._state is _State.OPEN and self.connection.mid_frame
        if self._frame_timer is not None and not (begun and self._frame_number == self.connection.frames):
            self._frame_timer.cancel()
            self._frame_timer = None
        if begun and self._frame_timer is None:
            self._frame_number = self.connection.frames
            self._frame_timer = self._loop.call_later(self._config.frame_timeout_s, self._frame_late)

    def _frame_late(self) -> None:
        self._frame_timer = None
        limit_s = self._config.frame_timeout_s
        self.refuse(WhisperdError(ErrorCode.BAD_FRAME, f"a frame was not complete after {limit_s:g} s"))

    # --- writing ---

    def _flush(self) -> None:
        left = _WRITE_BYTES_A_TURN
        while left > 0 and self.connection.output_bytes and not self._blocked and self._state is not _State.CLOSED:
            buffers = self.connection.buffers(left)
            try:
                count = self._socket.sendmsg(buffers)
            except (BlockingIOError, InterruptedError):
                self._blocked = True
                break
            except OSError:
                self.connection.drop_output()
                self.abort("gone")
                return
            self.connection.sent(count)
            self._progress_at = self._loop.time()
            self._blocked = count < sum(map(len, buffers))
            left -= count
        if self._turns and not self._in_turn and self.connection.output_bytes <= _LOW_WATER_BYTES:
            self._in_turn = True
            self.budget.reserve(self._next_turn)

    def in_turn(self, start: Turn) -> None:
        self._turns.append(start)
        self.connection.lined_up = len(self._turns)
        self._wake()

    def _next_turn(self) -> None:
        if self._turns:
            start = self._turns.popleft()
            self.connection.lined_up = len(self._turns)
            start(self._turn_over)
        else:  # the client has gone meanwhile
            self._turn_over()

    def _turn_over(self) -> None:
        self._in_turn = False
        self.budget.release()
        self._wake()

    def _watch_output(self) -> None:
        """Keep a deadline over output that waits; every byte that is taken moves it."""
        waits = self.connection.output_bytes > 0
        if waits and self._send_timer is None:
            self._progress_at = self._loop.time()
            self._send_timer = self._loop.call_later(self._config.send_timeout_s, self._check_sending)
        elif not waits and self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _check_sending(self) -> None:
        self._send_timer = None
        due = self._progress_at + self._config.send_timeout_s
        if self._loop.time() >= due:
            self.abort("reads nothing")
        else:
            self._send_timer = self._loop.call_at(due, self._check_sending)

    # --- the end ---

    def refuse(self, error: WhisperdError) -> None:
        """Say why, then close."""
        self.connection.refuse(error)
        self._wake()

    def end(self) -> None:
        """Take no more requests, send what is queued, close."""
        if self._state is _State.OPEN:
            self._state = _State.FLUSHING
            self._input_closed()
            self._wake()

    def _all_sent(self) -> None:
        if not self._linger:
            self._close("done")
            return
        self._state = _State.LINGERING
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._loop.call_later(self._config.linger_s, lambda: self._close("lingered"))

    def abort(self, reason: str) -> None:
        """Close without sending the rest."""
        if self._state is _State.OPEN:
            self._input_closed()
        self._close(reason)

    def _input_closed(self) -> None:
        self.connection.close_input()
        self._turns.clear()
        self._gone(self)

    def _close(self, reason: str) -> None:
        if self._state is _State.CLOSED:
            return
        log.debug("closed uid=%d pid=%d reason=%r", self.peer.uid, self.peer.pid, reason)
        self._state = _State.CLOSED
        for timer in (self._send_timer, self._frame_timer):
            if timer is not None:
                timer.cancel()
        self.connection.drop_output()
        self._loop.unregister(self._socket)
        self._socket.close()
        self._closed(self)
