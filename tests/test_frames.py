"""Frames: any dict there and back, any cut of the bytes, and everything that is no frame."""

from __future__ import annotations

import gc
import math
import struct
import subprocess
import sys
import textwrap
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.frames import (
    MAX_DEPTH,
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    MAX_REQUEST_ITEMS,
    FrameError,
    FrameReader,
    Raw,
    encode_body,
    encode_frame,
    encode_frame_parts,
    encode_request,
    parse_body,
)

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
maps = st.dictionaries(
    st.text(max_size=10),
    st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=10
    ),
    max_size=5,
)


def depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    items = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, items), default=0)


@given(maps.filter(lambda message: depth(message) <= MAX_DEPTH), st.booleans())
def test_any_map_comes_back_as_it_went(message: dict[str, Any], trusted: bool) -> None:
    reader = FrameReader(max_bytes=MAX_REPLY_BYTES)
    reader.feed(encode_frame(message))
    frame = reader.pop()
    assert frame is not None
    assert parse_body(frame[0], trusted=trusted) == message
    assert reader.pop() is None
    assert reader.buffered == 0


@given(st.lists(maps, min_size=1, max_size=4), st.data())
def test_the_cut_of_the_bytes_does_not_matter(messages: list[dict[str, Any]], data: st.DataObject) -> None:
    """Each receive call may bring descriptors: they belong to the frame that holds the last byte it returned."""
    frames = [encode_frame(message) for message in messages]
    stream = b"".join(frames)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream)), max_size=8)) | {len(stream)})
    expected: list[list[int]] = [[] for _ in frames]
    ends = [sum(map(len, frames[: index + 1])) for index in range(len(frames))]
    reader = FrameReader(max_bytes=MAX_REPLY_BYTES)
    got = []
    for number, (start, end) in enumerate(zip([0, *cuts], cuts, strict=False)):
        owner = next(index for index, frame_end in enumerate(ends) if end <= frame_end)
        expected[owner].append(number)
        reader.feed(stream[start:end], [number])
        if data.draw(st.booleans()):
            while (frame := reader.pop()) is not None:
                got.append(frame)
    while (frame := reader.pop()) is not None:
        got.append(frame)
    assert [body for body, _ in got] == [frame[4:] for frame in frames]
    assert [descriptors for _, descriptors in got] == expected
    assert reader.descriptors() == []


@given(st.lists(st.binary(max_size=30), max_size=20))
def test_garbage_raises_frame_errors_and_nothing_else(pieces: list[bytes]) -> None:
    reader = FrameReader(max_bytes=100)
    try:
        for piece in pieces:
            reader.feed(piece)
            while (frame := reader.pop()) is not None:
                parse_body(frame[0])
    except FrameError as error:
        assert error.code in (ErrorCode.BAD_FRAME, ErrorCode.TOO_LARGE)


@given(st.binary(max_size=200), st.booleans())
def test_any_body_is_a_map_or_a_frame_error(body: bytes, trusted: bool) -> None:
    try:
        assert isinstance(parse_body(body, trusted=trusted), dict)
    except FrameError as error:
        assert error.code == ErrorCode.BAD_FRAME


def nested(levels: int) -> bytes:
    """Return a map with arrays in it, `levels` containers deep in all."""
    return b"\x81\xa1a" + b"\x91" * (levels - 2) + b"\x90"


MALFORMED = {
    "nothing": b"",
    "no map": msgpack.packb([1, 2]),
    "a number": msgpack.packb(7),
    "cut short": msgpack.packb({"id": 1, "op": "health"})[:-1],
    "bytes left over": msgpack.packb({"id": 1}) + b"\xc0",
    "two maps": msgpack.packb({"id": 1}) * 2,
    "the byte msgpack never uses": b"\x81\xa1a\xc1",
    "extension": msgpack.packb({"a": msgpack.ExtType(5, b"data")}),
    "extension of no bytes": b"\x81\xa1a\xc7\x00\x05",
    "extension of one byte": b"\x81\xa1a\xd4\x05x",
    "timestamp": msgpack.packb({"a": msgpack.Timestamp(1)}),
    "timestamp of no bytes": b"\x81\xa1a\xc7\x00\xff",
    "NaN": msgpack.packb({"a": float("nan")}),
    "NaN in a list in a map": msgpack.packb({"a": {"b": [1.0, float("nan")]}}),
    "NaN of 32 bits": b"\x81\xa1a\xca\x7f\xc0\x00\x00",
    "infinity": msgpack.packb({"a": float("inf")}),
    "minus infinity": msgpack.packb({"a": [float("-inf")]}),
    "a key twice": b"\x82\xa1a\x01\xa1a\x02",
    "a key twice, deeper": b"\x81\xa1b\x82\xa1a\x01\xa1a\x02",
    "a key twice, written in two ways": b"\x82\xa1a\x01\xd9\x01a\x02",
    "number as key": msgpack.packb({1: 2}),
    "bytes as key": msgpack.packb({b"a": 2}),
    "null as key": msgpack.packb({None: 2}),
    "list as key": b"\x81\x90\x01",
    "map as key": b"\x81\x80\x01",
    "deeper key not a string": msgpack.packb({"a": [{1: 2}]}),
    "invalid UTF-8": b"\x81\xa1a\xa2\xff\xfe",
    "invalid UTF-8 in a key": b"\x81\xa1\xff\x01",
    "half a surrogate pair": b"\x81\xa1a\xa3\xed\xa0\x80",
    "too deep by one": nested(MAX_DEPTH + 1),
    "maps too deep by one": msgpack.packb({"1": {"2": {"3": {"4": {"5": {"6": {"7": {"8": {}}}}}}}}}),
    "absurdly deep": nested(1000),
    "deeper than any stack": nested(MAX_REQUEST_BYTES - 10),
    "a list longer than its bytes": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "a map longer than its bytes": b"\xdf\xff\xff\xff\xff",
    "a string longer than its bytes": b"\x81\xa1a\xdb\xff\xff\xff\xff",
    "bytes longer than there are": b"\x81\xa1a\xc6\xff\xff\xff\xff",
    "an extension longer than its bytes": b"\x81\xa1a\xc9\xff\xff\xff\xff\x05",
}


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(body: bytes, trusted: bool) -> None:
    with pytest.raises(FrameError) as caught:
        parse_body(body, trusted=trusted)
    assert caught.value.code == ErrorCode.BAD_FRAME
    assert len(caught.value.message) < 300, "what a client sent must not come back at length"


def test_as_deep_as_allowed() -> None:
    assert depth(parse_body(nested(MAX_DEPTH))) == MAX_DEPTH


def test_long_lists_are_for_replies_only() -> None:
    body = encode_body({"jobs": list(range(MAX_REQUEST_ITEMS + 1))})
    with pytest.raises(FrameError):
        parse_body(body)
    assert len(parse_body(body, trusted=True)["jobs"]) == MAX_REQUEST_ITEMS + 1


def test_a_length_over_the_limit_is_refused_before_its_bytes_are_kept() -> None:
    reader = FrameReader(max_bytes=MAX_REQUEST_BYTES)
    reader.feed(encode_frame({"id": 1}) + struct.pack(">I", MAX_REQUEST_BYTES + 1) + bytes(10_000), [5])
    assert reader.pop() == (encode_body({"id": 1}), [])
    reader.feed(bytes(10_000), [6])
    assert reader.buffered == 0
    for _ in range(2):
        with pytest.raises(FrameError) as caught:
            reader.pop()
        assert caught.value.code == ErrorCode.TOO_LARGE
    assert reader.descriptors() == [5, 6]


def test_small_frames_that_wait_are_not_objects_yet() -> None:
    """Python's collector stops the loop for as long as it takes to look at every object there is."""
    reader, frame = FrameReader(max_bytes=MAX_REQUEST_BYTES), encode_frame({})
    before = len(gc.get_objects())
    reader.feed(frame * 10_000)
    assert len(gc.get_objects()) - before < 100
    assert [reader.pop() for _ in range(10_001)] == [(encode_body({}), [])] * 10_000 + [None]


def test_a_frame_of_just_the_limit() -> None:
    reader = FrameReader(max_bytes=MAX_REQUEST_BYTES)
    message = {"data": bytes(MAX_REQUEST_BYTES - len(encode_body({"data": bytes(60_000)})) + 60_000)}
    frame = encode_frame(message)
    assert len(frame) == 4 + MAX_REQUEST_BYTES
    reader.feed(frame)
    popped = reader.pop()
    assert popped is not None
    assert parse_body(popped[0]) == message


def read_as_request(frame: bytes) -> dict[str, Any]:
    """Return what a daemon reads."""
    reader = FrameReader(max_bytes=MAX_REQUEST_BYTES)
    reader.feed(frame)
    popped = reader.pop()
    assert popped is not None
    return parse_body(popped[0])


anything = (
    leaves
    | st.floats()
    | st.integers(-(2**70), 2**70)
    | st.text(st.characters(exclude_categories=()), max_size=5)
    | st.sampled_from([object(), {1, 2}, 1j, msgpack.ExtType(5, b""), [0] * 1025, b"x" * 70_000])
)
any_params = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        anything,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
        max_leaves=10,
    ),
    max_size=4,
)


@given(any_params)
def test_a_request_is_one_that_a_daemon_reads_or_is_refused_before_it_is_sent(params: dict[str, Any]) -> None:
    message = {"id": 7, "op": "submit", "params": params}
    try:
        frame = encode_request(7, "submit", params)
    except WhisperdError as error:
        assert error.code in (ErrorCode.BAD_REQUEST, ErrorCode.TOO_LARGE)
        with pytest.raises((FrameError, ValueError, TypeError, OverflowError)):
            read_as_request(encode_frame(message))
    else:
        assert frame == encode_frame(message)
        assert read_as_request(frame) == message


ROUND: dict[str, Any] = {}
ROUND["in itself"] = ROUND


@pytest.mark.parametrize(
    ("params", "code", "message"),
    [
        ({"job": 2**64}, "bad_request", "submit: job: "),
        ({"options": {"language": "de", "temperature": math.nan}}, "bad_request", "submit: options: temperature: "),
        ({"options": {"temperature": [0.0, math.inf]}}, "bad_request", "submit: options: temperature: "),
        ({"options": {"suppress_tokens": [1] * 1025}}, "bad_request", "submit: options: suppress_tokens: 1025 "),
        ({"options": {"initial_prompt": "\ud800"}}, "bad_request", "submit: options: initial_prompt: "),
        ({"options": {"beam_size": object()}}, "bad_request", "submit: options: beam_size: "),
        ({"options": {"initial_prompt": "x" * 70_000}}, "too_large", "submit: a request of 70"),
        (ROUND, "bad_request", "submit: in itself: "),
    ],
)
def test_what_cannot_be_sent_is_named(params: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(WhisperdError) as caught:
        encode_request(1, "submit", params)
    assert caught.value.code == code
    assert caught.value.message.startswith(message)


def test_descriptors_nobody_took_are_handed_over_once() -> None:
    reader = FrameReader(max_bytes=100)
    frame = encode_frame({"id": 1})
    reader.feed(frame, [3])
    reader.feed(frame[:2], [4])
    assert sorted(reader.descriptors()) == [3, 4]
    assert reader.descriptors() == []
    assert reader.pop() == (frame[4:], [])


@pytest.mark.parametrize(
    "hostile",
    [
        # Headers that each announce as many items as a request may hold, one within the other.
        b"\x81\xa1a" + b"\xdc\x04\x00" * 21_000,
        b"\x81\xa1a" + b"\xde\x04\x00\xa1a" * 13_000,
        b"\x81\xa1a" + b"\xdc\xff\xff" * 21_000,
        b"\x81\xa1a\xdc\x04\x00" + (b"\xdc\x00\x40" + b"\x80" * 64) * 970,
        b"\x81\xa1a" + b"\x91" * 65_000,
    ],
    ids=["lists", "maps", "lists over the limit", "many empty maps", "depth"],
)
def test_hostile_headers_cost_little_memory(hostile: bytes) -> None:
    """In a process of its own: msgpack takes its memory where only the resident size shows it."""
    script = """
        import resource, sys
        from whisperd.protocol.frames import FrameError, parse_body
        body = sys.stdin.buffer.read()
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(20):
            try:
                parse_body(body)
            except FrameError:
                pass
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb)
    """
    assert len(hostile) <= MAX_REQUEST_BYTES
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], input=hostile, capture_output=True, check=True
    )
    assert int(done.stdout) < 12 * 1024, "kilobytes"


def test_a_stored_transcript_is_spliced_in_uncopied() -> None:
    transcript = {"text": "hello", "segments": [{"id": 0, "start": 0.0}]}
    raw = Raw(encode_body(transcript))
    parts = encode_frame_parts({"id": 3, "ok": True, "result": {"job": {"id": 1}, "transcript": raw}})
    assert any(part is raw for part in parts)
    reader = FrameReader(max_bytes=MAX_REPLY_BYTES)
    reader.feed(b"".join(parts))
    frame = reader.pop()
    assert frame is not None
    assert parse_body(frame[0]) == {"id": 3, "ok": True, "result": {"job": {"id": 1}, "transcript": transcript}}


@given(maps)
def test_parts_are_the_same_frame(message: dict[str, Any]) -> None:
    assert b"".join(encode_frame_parts(message)) == encode_frame(message)
