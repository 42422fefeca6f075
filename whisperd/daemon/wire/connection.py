"""One client's connection without its socket: bytes and descriptors in, requests out; answers in, bytes out.

All limits of a connection are here: the size of a frame, descriptors, open requests, queued output. Nothing here waits,
so all of it is tested with literals.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from whisperd.daemon.wire.descriptors import close_apart
from whisperd.daemon.wire.user_budget import UserBudget
from whisperd.protocol.errors import ErrorCode, WhisperdError, internal_error
from whisperd.protocol.fields import bad_request
from whisperd.protocol.frames import (
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    FrameError,
    FrameReader,
    encode_frame_parts,
    parse_body,
)
from whisperd.protocol.messages import Pull, Request, Subscribe, error_reply, ok_reply, parse_request, request_id

log = logging.getLogger("whisperd.connection")

# The protocol's, so no setting: a request has one descriptor at most. A few more are let through, so that it can be
# told what it did wrong; beyond that they are closed at once: half a frame must not make us hold hundreds.
MAX_DESCRIPTORS = 4
# Buffers below this are joined: a system call a buffer would cost more than the copy.
_JOIN_BYTES = 64 * 1024
_MAX_BUFFERS = 64
_LAG_BYTES = 64 * 1024
# No setting: they are answered one after the other anyway, so more would only be kept here instead of in the kernel's
# buffer, and answered no sooner. These few are enough to have the next at hand. Each is a dozen objects, and 64 of each
# of a thousand connections kept Python's collector busy for a quarter of a second.
_MAX_LINED_UP = 4

Dispatch = Callable[[Request, list[int]], None]


class Connection:
    """The state of one connection. `output` is called whenever something to send, or room for requests, has come up."""

    def __init__(
        self, *, open_requests: int, max_output_bytes: int, budget: UserBudget, output: Callable[[], None]
    ) -> None:
        self.closed = False
        self.broken = False  # the stream cannot be read on: flush, then close
        self.overflowed = False  # the client does not read its events: close
        self.held = False  # by a handler that has enough for now: nothing is read
        self.lined_up = 0  # requests that wait for their turn to be answered
        self.frames = 0  # taken so far
        self.output_bytes = 0
        self._event_bytes = 0
        self._open_limit = open_requests
        self._max_output_bytes = max_output_bytes
        self._budget = budget
        self._notify_output = output
        self._reader = FrameReader(max_bytes=MAX_REQUEST_BYTES)
        self._open: dict[int, bool] = {}  # id → it stays open after its reply (a subscription)
        self._subscribed: set[int] = set()
        self._output: deque[tuple[memoryview, bool]] = deque()  # buffer, belongs to an event

    # --- in ---

    @property
    def open_requests(self) -> int:
        """Requests without an answer, and subscriptions that have not ended."""
        return len(self._open)

    @property
    def mid_frame(self) -> bool:
        """True when a frame has begun and is not complete."""
        return self._reader.buffered > 0 and not self._reader.ready

    @property
    def wants_input(self) -> bool:
        """True when the socket should be read. Whoever does not take its answers is not read on either."""
        return self._may_go_on and not self._reader.ready

    @property
    def can_step(self) -> bool:
        """True when `step` has a frame to handle."""
        return self._may_go_on and self._reader.ready

    @property
    def _may_go_on(self) -> bool:
        return (
            not (self.closed or self.broken or self.overflowed or self.held)
            and len(self._open) < self._open_limit
            and self.lined_up < _MAX_LINED_UP
            and self.output_bytes <= self._max_output_bytes
            and not self._budget.full
        )

    def receive(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Take what one `recvmsg` returned. The descriptors are the connection's from here on."""
        room = max(0, MAX_DESCRIPTORS - self._reader.waiting_descriptors)
        close_apart(descriptors[room:])
        self._reader.feed(data, descriptors[:room])

    def step(self, dispatch: Dispatch) -> bool:
        """Handle the next complete frame; return False when there is none or it must wait.

        A good request goes to `dispatch(request, descriptors)`: what it takes out of that list is its own, the rest is
        closed here. A bad request is answered here; bytes that are no frame are answered under id 0 and break the
        connection.
        """
        if not self.can_step:
            return False
        descriptors: list[int] = []
        try:
            frame = self._reader.pop()
            assert frame is not None, "the reader said that it is ready"
            self.frames += 1
            body, descriptors = frame
            self._handle(parse_body(body), descriptors, dispatch)
        except FrameError as error:
            self.refuse(error)
        finally:
            close_apart(descriptors)
        return True

    def _handle(self, message: Mapping[str, Any], descriptors: list[int], dispatch: Dispatch) -> None:
        try:
            request = parse_request(message)
            if request.id in self._open:
                raise bad_request(f"request: id {request.id} is still open; give each open request its own id")
        except WhisperdError as error:
            self._queue(error_reply(request_id(message), error))
            return
        self._open[request.id] = isinstance(request.params, Subscribe | Pull)
        try:
            dispatch(request, descriptors)
        except WhisperdError as error:
            self.fail(request.id, error)
        except Exception:
            log.exception("request failed op=%s", request.op)
            self.fail(request.id, internal_error())

    # --- answers ---

    def reply(self, number: int, result: Mapping[str, Any]) -> None:
        """Answer an open request. A subscription stays open until `finish`; a closed connection takes no answers."""
        stays_open = self._open.get(number)
        if stays_open is None or number in self._subscribed:
            self._answered_twice(number)
            return
        parts = encode_frame_parts(ok_reply(number, result))
        if sum(map(len, parts)) > MAX_REPLY_BYTES:
            self.fail(number, WhisperdError(ErrorCode.TOO_LARGE, f"the answer is larger than {MAX_REPLY_BYTES} bytes"))
            return
        if stays_open:
            self._subscribed.add(number)
        else:
            del self._open[number]
        self._queue_parts(parts, event=False)

    def fail(self, number: int, error: WhisperdError) -> None:
        """Answer an open request with an error; this ends a subscription that has not been answered yet."""
        if number not in self._open or number in self._subscribed:
            self._answered_twice(number)
            return
        del self._open[number]
        self._queue(error_reply(number, error))

    def push(self, number: int, event: Mapping[str, Any], *, skippable: bool = False) -> bool:
        """Send an event of an open subscription; return whether it was queued.

        A skippable one is dropped while other output waits. More than `max_output_bytes` of events that nobody reads
        end the connection.
        """
        if number not in self._open or self.closed or self.overflowed or (skippable and self.output_bytes):
            return False
        parts = encode_frame_parts({"id": number} | dict(event))
        # Where a user has used up what all his connections may hold, it is those who lag that are cut off.
        lags = self._budget.full and self.output_bytes > _LAG_BYTES
        if lags or self._event_bytes + sum(map(len, parts)) > self._max_output_bytes:
            self.overflowed = True
            self._notify_output()
            return False
        self._queue_parts(parts, event=True)
        return True

    def finish(self, number: int) -> None:
        """End a subscription: its place among the open requests is free again."""
        self._subscribed.discard(number)
        if self._open.pop(number, None) is not None:
            self._notify_output()

    def refuse(self, error: WhisperdError) -> None:
        """Say under id 0 why this connection ends, and take no further requests."""
        if not self.closed:
            self.broken = True
            self._queue(error_reply(0, error))

    def _answered_twice(self, number: int) -> None:
        if not self.closed:
            log.error("a request was answered that is not open id=%d", number)

    # --- out ---

    def _queue(self, message: Mapping[str, Any]) -> None:
        self._queue_parts(encode_frame_parts(message), event=False)

    def _queue_parts(self, parts: Iterable[bytes], *, event: bool) -> None:
        for buffer in _joined(parts):
            self._output.append((memoryview(buffer), event))
            self.output_bytes += len(buffer)
            self._budget.add(len(buffer))
            self._event_bytes += len(buffer) if event else 0
        self._notify_output()

    def buffers(self, limit_bytes: int) -> list[memoryview]:
        """Return what is to be sent next, at most `limit_bytes` of it."""
        taken: list[memoryview] = []
        for buffer, _ in self._output:
            if limit_bytes <= 0 or len(taken) == _MAX_BUFFERS:
                break
            taken.append(buffer[:limit_bytes])
            limit_bytes -= len(buffer)
        return taken

    def sent(self, count: int) -> None:
        """Take `count` bytes off the output."""
        self.output_bytes -= count
        self._budget.add(-count)
        while count:
            buffer, event = self._output.popleft()
            done = min(count, len(buffer))
            if done < len(buffer):
                self._output.appendleft((buffer[done:], event))
            count -= done
            self._event_bytes -= done if event else 0

    # --- the end ---

    def hold(self, held: bool) -> None:
        """Take no further requests, or go on: how a handler lets a client feel that it sends too fast."""
        if held != self.held:
            self.held = held
            self._notify_output()

    def close_input(self) -> None:
        """The client is gone, or shall be: no request is open any more, what is queued may still be sent."""
        self.closed = True
        self._open.clear()
        self._subscribed.clear()
        close_apart(self._reader.descriptors())

    def drop_output(self) -> None:
        """Forget what has not been sent."""
        self._output.clear()
        self._budget.add(-self.output_bytes)
        self.output_bytes = self._event_bytes = 0


def _joined(parts: Iterable[bytes]) -> Iterator[bytes]:
    small = bytearray()
    for part in parts:
        if len(part) < _JOIN_BYTES:
            small += part
            continue
        if small:
            yield bytes(small)
            small = bytearray()
        yield part
    if small:
        yield bytes(small)
