"""A connection without a socket: requests however the bytes are cut, answers, limits, and whose descriptor is whose."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import wait_until
from whisperd.daemon.wire.connection import MAX_DESCRIPTORS, Connection
from whisperd.daemon.wire.descriptors import _closer
from whisperd.daemon.wire.user_budget import UserBudget
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.frames import MAX_REPLY_BYTES, FrameReader, Raw, encode_body, encode_frame, parse_body
from whisperd.protocol.messages import Request


def connection(
    open_requests: int = 64, max_output_bytes: int = 1 << 20, budget: UserBudget | None = None
) -> Connection:
    return Connection(
        open_requests=open_requests,
        max_output_bytes=max_output_bytes,
        budget=budget
        or UserBudget(output_bytes=1 << 40, store_calls=1 << 20, requests=64, reads=16, soon=lambda fn: fn()),
        output=lambda: None,
    )


def request(number: int, op: str = "hello", **params: Any) -> bytes:
    return encode_frame({"id": number, "op": op, "params": params})


def steps(conn: Connection, dispatch: Callable[[Request, list[int]], None] = lambda request, fds: None) -> int:
    """Handle all that can be handled; return how many frames that were."""
    count = 0
    while conn.step(dispatch):
        count += 1
    return count


def output(conn: Connection) -> list[dict[str, Any]]:
    """Take everything that is to be sent, as messages."""
    reader = FrameReader(max_bytes=MAX_REPLY_BYTES)
    while buffers := conn.buffers(1 << 20):
        data = b"".join(buffers)
        reader.feed(data)
        conn.sent(len(data))
    messages = []
    while (frame := reader.pop()) is not None:
        messages.append(parse_body(frame[0], trusted=True))
    assert conn.output_bytes == 0
    assert reader.buffered == 0
    return messages


@pytest.fixture
def make_fd() -> Iterator[Callable[[], int]]:
    """A function that opens a descriptor that the test may close or leave."""
    made: list[int] = []

    def make() -> int:
        made.append(os.open("/dev/null", os.O_RDONLY))
        return made[-1]

    yield make
    # Threads that have not run yet too: one that closed late would close what has this number by then.
    wait_until(lambda: not _closer._threads, message="what closes descriptors is done")
    for fd in made:
        if is_open(fd):
            os.close(fd)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def wait_closed(fd: int) -> None:
    """Descriptors are closed in a thread: closing may take as long as a client's file system likes."""
    wait_until(lambda: not is_open(fd))


# --- in ---


@settings(deadline=None)
@given(st.data())
def test_requests_come_out_however_the_bytes_are_cut(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=20))
    stream = b"".join(request(number) for number in ids)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    conn, seen = connection(), []

    def dispatch(request: Request, descriptors: list[int]) -> None:
        seen.append(request.id)
        conn.reply(request.id, {})

    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        conn.receive(stream[begin:end])
        steps(conn, dispatch)
    assert seen == ids
    assert [message["id"] for message in output(conn)] == ids
    assert not conn.mid_frame
    assert conn.wants_input


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(1, 50))
def test_no_bytes_do_harm(garbage: bytes, cut: int) -> None:
    conn = connection()
    for begin in range(0, len(garbage), cut):
        conn.receive(garbage[begin : begin + cut])
        steps(conn)
    for message in output(conn):
        assert message["ok"] is False


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (struct.pack(">I", 65537), "too_large"),
        (struct.pack(">I", 0xFFFFFFFF), "too_large"),
        (struct.pack(">I", 0), "bad_frame"),
        (struct.pack(">I", 1) + b"\xc1", "bad_frame"),
        (struct.pack(">I", 1) + b"\x90", "bad_frame"),
        (struct.pack(">I", 2) + b"\x80\x80", "bad_frame"),
    ],
)
def test_what_is_no_frame_is_answered_under_id_0_after_the_requests_before_it(frame: bytes, code: str) -> None:
    conn, seen = connection(), []

    def dispatch(request: Request, descriptors: list[int]) -> None:
        seen.append(request.id)
        conn.reply(request.id, {})

    conn.receive(request(1) + frame + request(2))
    steps(conn, dispatch)
    assert seen == [1]
    assert conn.broken
    assert not conn.wants_input
    good, bad = output(conn)
    assert good["ok"]
    assert (bad["id"], bad["error"]["code"]) == (0, code)


@pytest.mark.parametrize(
    ("message", "number", "code"),
    [
        ({"id": 7, "op": "nonsense", "params": {}}, 7, "unknown_op"),
        ({"id": 7, "op": "cancel", "params": {}}, 7, "bad_request"),
        ({"id": 7, "op": "health", "params": {"x": 1}}, 7, "bad_request"),
        ({"id": 7, "op": "health", "extra": 1}, 7, "bad_request"),
        ({"id": -1, "op": "health"}, 0, "bad_request"),
        ({"op": "health"}, 0, "bad_request"),
        ({}, 0, "bad_request"),
    ],
)
def test_a_bad_request_is_answered_under_its_id_and_the_connection_stays(
    message: dict[str, Any], number: int, code: str
) -> None:
    conn = connection()
    conn.receive(encode_frame(message))
    assert steps(conn) == 1
    (answer,) = output(conn)
    assert (answer["id"], answer["error"]["code"]) == (number, code)
    assert conn.wants_input
    assert conn.open_requests == 0


def test_errors_of_the_dispatcher_are_answers() -> None:
    conn = connection()

    def dispatch(request: Request, descriptors: list[int]) -> None:
        raise WhisperdError(ErrorCode.QUEUE_FULL, "full") if request.id == 1 else ValueError("a secret")

    conn.receive(request(1) + request(2))
    steps(conn, dispatch)
    expected, unexpected = output(conn)
    assert expected["error"] == {"code": "queue_full", "message": "full"}
    assert unexpected["error"]["code"] == "internal"
    assert "secret" not in unexpected["error"]["message"]
    assert conn.open_requests == 0


def test_open_requests_stop_the_reading_until_one_is_answered() -> None:
    conn = connection(open_requests=3)
    conn.receive(b"".join(request(number) for number in range(1, 6)))
    assert steps(conn) == 3
    assert not conn.wants_input
    assert not conn.can_step
    conn.reply(2, {})
    assert conn.can_step
    assert steps(conn) == 1
    conn.fail(1, WhisperdError(ErrorCode.NOT_FOUND, "no"))
    assert steps(conn) == 1
    assert conn.open_requests == 3
    assert not conn.wants_input
    conn.reply(5, {})
    assert conn.wants_input


def test_output_that_nobody_reads_stops_the_reading() -> None:
    conn = connection(max_output_bytes=100_000)
    conn.receive(request(1) + request(2))
    conn.step(lambda request, fds: conn.reply(request.id, {"x": b"x" * 200_000}))
    assert not conn.can_step
    conn.sent(150_000)
    assert conn.can_step


def test_an_id_that_is_still_open_is_refused_and_the_first_stays() -> None:
    conn = connection()
    conn.receive(request(1, "result", job=5, wait_s=None) + request(1))
    steps(conn)
    (refused,) = output(conn)
    assert refused["error"]["code"] == "bad_request"
    conn.reply(1, {"late": True})
    assert output(conn) == [{"id": 1, "ok": True, "result": {"late": True}}]
    conn.receive(request(1))
    steps(conn, lambda request, fds: conn.reply(request.id, {}))
    assert output(conn)[0]["ok"], "an id may be used again after its answer"


# --- answers ---


def test_a_request_is_answered_once() -> None:
    conn = connection()
    conn.receive(request(1))
    steps(conn)
    conn.reply(1, {"first": True})
    conn.reply(1, {"second": True})
    conn.fail(1, WhisperdError(ErrorCode.INTERNAL, "third"))
    conn.reply(99, {})
    assert [message["result"] for message in output(conn)] == [{"first": True}]


def test_a_subscription_is_open_until_it_ends() -> None:
    conn = connection(open_requests=1)
    conn.receive(request(4, "subscribe", job=1))
    steps(conn)
    conn.reply(4, {"last_seq": 0})
    conn.reply(4, {"last_seq": 1})
    assert conn.open_requests == 1
    assert not conn.wants_input
    assert conn.push(4, {"event": "state", "job": 1, "seq": 1, "state": "running"})
    conn.finish(4)
    conn.finish(4)
    assert not conn.push(4, {"event": "end", "job": 1, "seq": 2})
    assert conn.wants_input
    assert output(conn) == [
        {"id": 4, "ok": True, "result": {"last_seq": 0}},
        {"id": 4, "event": "state", "job": 1, "seq": 1, "state": "running"},
    ]


def test_a_stored_transcript_is_spliced_and_neither_copied_nor_joined() -> None:
    conn = connection()
    transcript = Raw(encode_body({"text": "x" * 300_000}))
    conn.receive(request(1))
    steps(conn)
    conn.reply(1, {"job": {"id": 1}, "transcript": transcript})
    assert any(buffer.obj is transcript for buffer in conn.buffers(1 << 20))
    assert output(conn)[0]["result"] == {"job": {"id": 1}, "transcript": {"text": "x" * 300_000}}


def test_an_answer_beyond_the_limit_becomes_an_error() -> None:
    conn = connection()
    conn.receive(request(1))
    steps(conn)
    conn.reply(1, {"transcript": Raw(msgpack.packb(b"x" * MAX_REPLY_BYTES))})
    assert output(conn)[0]["error"]["code"] == "too_large"
    assert conn.open_requests == 0


def test_skippable_events_are_skipped_while_output_waits() -> None:
    conn = connection()
    conn.receive(request(1, "subscribe"))
    steps(conn)
    conn.reply(1, {})
    output(conn)
    assert conn.push(1, {"event": "progress"}, skippable=True)
    assert not conn.push(1, {"event": "progress"}, skippable=True)
    assert conn.push(1, {"event": "segment"})
    assert [message["event"] for message in output(conn)] == ["progress", "segment"]


def test_events_that_nobody_reads_end_the_connection_but_a_large_reply_does_not() -> None:
    conn = connection(max_output_bytes=100_000)
    conn.receive(request(1, "subscribe") + request(2))
    steps(conn)
    conn.reply(1, {})
    conn.reply(2, {"x": b"x" * 500_000})
    assert conn.push(1, {"event": "segment"})
    assert not conn.overflowed
    while conn.push(1, {"event": "segment", "segment": "y" * 1000}):
        assert conn.output_bytes < 700_000
    assert conn.overflowed
    assert not conn.can_step


def test_a_users_connections_share_what_may_lie_unread() -> None:
    budget = UserBudget(
        output_bytes=3 * MAX_REPLY_BYTES - 2000, store_calls=4, requests=64, reads=16, soon=lambda fn: fn()
    )
    deaf, quick = connection(budget=budget, max_output_bytes=1 << 30), connection(budget=budget)
    for conn in (deaf, quick):
        conn.receive(request(1, "subscribe") + request(2))
        steps(conn)
        conn.reply(1, {})
    quick.sent(quick.output_bytes)
    deaf.reply(2, {"x": Raw(msgpack.packb(bytes(MAX_REPLY_BYTES - 1000)))})
    started: list[int] = []
    for number in range(3):
        budget.reserve(lambda number=number: started.append(number))
    assert started == [0], "one answer lies there, one is being read, and there is no room for a third"
    budget.release()
    assert started == [0, 1]
    # What lies there fills the budget: nothing more is taken, and who lags is cut off, not who reads.
    woken: list[bool] = []
    budget.add(2 * MAX_REPLY_BYTES)
    assert not quick.wants_input
    budget.when_not_full(lambda: woken.append(True))
    assert quick.push(1, {"event": "segment"})
    assert not deaf.push(1, {"event": "segment"})
    assert (deaf.overflowed, quick.overflowed) == (True, False)
    deaf.drop_output()
    assert (woken, quick.wants_input) == ([], False), "not before half of it is free"
    budget.add(-MAX_REPLY_BYTES)
    assert (woken, quick.wants_input) == ([True], True)
    budget.add(-MAX_REPLY_BYTES)
    assert started == [0, 1, 2]
    quick.drop_output()
    budget.add(1)
    assert not budget.full


def test_a_user_who_keeps_the_store_busy_is_not_read_on() -> None:
    budget = UserBudget(output_bytes=1 << 30, store_calls=4, requests=64, reads=16, soon=lambda fn: fn())
    one, other = connection(budget=budget), connection(budget=budget)
    for _ in range(3):
        budget.began()
    assert one.wants_input
    budget.began()
    assert not one.wants_input
    assert not other.wants_input
    budget.ended()
    assert not one.wants_input
    budget.ended()
    assert one.wants_input
    assert other.wants_input


@settings(deadline=None)
@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=8), st.integers(1000, 300_000))
def test_output_comes_out_whole_in_pieces_of_any_size(sizes: list[int], piece: int) -> None:
    conn = connection(max_output_bytes=1 << 30)
    conn.receive(b"".join(request(number) for number in range(len(sizes))))
    steps(conn, lambda request, fds: conn.reply(request.id, {"x": Raw(msgpack.packb(b"x" * sizes[request.id]))}))
    sent = bytearray()
    while buffers := conn.buffers(piece):
        data = b"".join(buffers)
        assert len(data) <= piece
        sent += data
        conn.sent(len(data))
    wanted = (
        encode_frame({"id": number, "ok": True, "result": {"x": b"x" * size}}) for number, size in enumerate(sizes)
    )
    assert sent == b"".join(wanted)
    assert conn.output_bytes == 0


def test_a_closed_connection_takes_answers_and_drops_them() -> None:
    conn = connection()
    conn.receive(request(1) + request(2, "subscribe") + request(3))
    conn.step(lambda request, fds: None)
    conn.step(lambda request, fds: conn.reply(request.id, {}))
    conn.close_input()
    conn.reply(1, {})
    conn.fail(1, WhisperdError(ErrorCode.STOPPING, "stopping"))
    conn.finish(2)
    assert not conn.push(2, {"event": "end"})
    assert not conn.can_step
    assert [message["id"] for message in output(conn)] == [2], "what was queued before is still there"


# --- descriptors ---


def test_a_descriptor_is_closed_after_its_frame_unless_it_was_taken(make_fd: Callable[[], int]) -> None:
    conn = connection()
    left, taken = make_fd(), make_fd()
    conn.receive(request(1), [left])
    steps(conn, lambda request, fds: None)
    conn.receive(request(2), [taken])
    steps(conn, lambda request, fds: fds.clear())
    wait_closed(left)
    assert is_open(taken)


def test_a_descriptor_belongs_to_the_frame_with_the_last_byte_that_came_with_it(make_fd: Callable[[], int]) -> None:
    conn = connection()
    seen: list[tuple[int, int]] = []

    def dispatch(request: Request, descriptors: list[int]) -> None:
        seen.append((request.id, len(descriptors)))

    conn.receive(request(1) + request(2), [make_fd()])
    half = len(request(3)) // 2
    conn.receive(request(3)[:half], [make_fd()])
    steps(conn, dispatch)
    conn.receive(request(3)[half:] + request(4))
    steps(conn, dispatch)
    assert seen == [(1, 0), (2, 1), (3, 1), (4, 0)]


@pytest.mark.parametrize("frame", [b"\0\0\0\1\xc1", request(1, "nonsense"), b"\xff\xff\xff\xff"])
def test_a_descriptor_of_a_bad_frame_is_closed(make_fd: Callable[[], int], frame: bytes) -> None:
    conn = connection()
    fd = make_fd()
    conn.receive(frame, [fd])
    steps(conn)
    conn.close_input()
    wait_closed(fd)


def test_a_descriptor_of_a_request_that_fails_is_closed(make_fd: Callable[[], int]) -> None:
    conn = connection()
    fd = make_fd()

    def dispatch(request: Request, descriptors: list[int]) -> None:
        raise WhisperdError(ErrorCode.BAD_REQUEST, "no")

    conn.receive(request(1), [fd])
    steps(conn, dispatch)
    wait_closed(fd)


def test_half_a_frame_holds_few_descriptors(make_fd: Callable[[], int]) -> None:
    conn = connection()
    for byte in request(1)[:-1]:
        conn.receive(bytes([byte]), [make_fd(), make_fd()])
    seen: list[int] = []
    conn.receive(request(1)[-1:], [make_fd() for _ in range(20)])
    steps(conn, lambda request, fds: seen.append(len(fds)))
    assert seen == [MAX_DESCRIPTORS]


def test_descriptors_of_frames_that_were_not_handled_are_closed_at_the_end(make_fd: Callable[[], int]) -> None:
    conn = connection(open_requests=1)
    waiting, half = make_fd(), make_fd()
    conn.receive(request(1) + request(2), [waiting])
    steps(conn)
    conn.receive(request(3)[:5], [half])
    conn.close_input()
    wait_closed(waiting)
    wait_closed(half)
