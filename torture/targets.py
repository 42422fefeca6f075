"""What is fed with bad bytes, without a socket: a connection with its parser, and the daemon's ear for its helpers.

Both raise only where a promise is broken. Hypothesis, atheris and the plain loop of `torture.fuzz` all call these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, get_args, get_origin, get_type_hints

from whisperd.daemon.wire.connection import Connection
from whisperd.daemon.wire.user_budget import UserBudget
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.frames import MAX_REPLY_BYTES, FrameError, FrameReader, parse_body
from whisperd.protocol.helper_messages import HelperMessage, from_wire
from whisperd.protocol.messages import Request, Subscribe

_KNOWN = set(ErrorCode)
_SAMPLES: Mapping[Any, Any] = {int: 1, float: 1.5, bool: True, str: "x", bytes: b"\x80", dict: {"x": 1}, list: ["x"]}


def _helper_messages() -> Iterator[Mapping[str, Any]]:
    """Yield a valid map of each type that travels between daemon and helpers."""
    for kind in get_args(HelperMessage):
        hints = get_type_hints(kind)
        yield {"type": kind.__name__} | {name: _SAMPLES.get(get_origin(hint) or hint) for name, hint in hints.items()}


HELPER_MESSAGES: Sequence[Mapping[str, Any]] = list(_helper_messages())


def feed_connection(data: bytes, random: Random) -> None:
    """Give a connection these bytes in any pieces; each request is answered, refused, or left open, at random."""
    budget = UserBudget(output_bytes=1 << 20, store_calls=64, requests=64, reads=16, soon=_now)
    connection = Connection(open_requests=8, max_output_bytes=65_536, budget=budget, output=lambda: None)
    open_requests: list[int] = []

    def dispatch(request: Request, descriptors: list[int]) -> None:
        match random.randrange(4):
            case 0:
                raise WhisperdError(ErrorCode.NOT_FOUND, "no")
            case 1 | 2:
                connection.reply(request.id, {"x": 1})
                if isinstance(request.params, Subscribe):
                    connection.push(request.id, {"event": "state"})
                    connection.finish(request.id)
            case _:
                open_requests.append(request.id)

    at = 0
    while at < len(data):
        size = random.choice((1, 7, 4096, 4096))
        connection.receive(data[at : at + size])
        at += size
        while connection.step(dispatch):
            pass
        if open_requests and random.random() < 0.5:
            connection.fail(open_requests.pop(), WhisperdError(ErrorCode.CANCELLED, "no"))
    _check_answers(connection)
    connection.close_input()
    assert not connection.open_requests


def _now(call: Callable[[], object]) -> None:
    call()


def _check_answers(connection: Connection) -> None:
    reader = FrameReader(max_bytes=MAX_REPLY_BYTES)
    while buffers := connection.buffers(1 << 20):
        data = b"".join(buffers)
        reader.feed(data)
        connection.sent(len(data))
    assert connection.output_bytes == 0
    told_why = False
    while (frame := reader.pop()) is not None:
        message = parse_body(frame[0], trusted=True)
        if not message.get("ok", True):
            told_why |= message["id"] == 0
            code = message["error"]["code"]
            assert code in _KNOWN, code
            assert code != ErrorCode.INTERNAL, "a request met a defect of ours"
    assert told_why or not connection.broken, "whoever is hung up on is told why"


def feed_helper_link(data: bytes) -> None:
    """Read bytes as the daemon reads a helper's: messages, or an error that ends the helper."""
    reader = FrameReader(max_bytes=MAX_REPLY_BYTES)
    reader.feed(data)
    try:
        while (frame := reader.pop()) is not None:
            from_wire(parse_body(frame[0], trusted=True))
    except FrameError as error:
        assert error.code in (ErrorCode.BAD_FRAME, ErrorCode.TOO_LARGE)
    except WhisperdError as error:
        assert error.code == ErrorCode.BAD_REQUEST
