"""Frames that are almost right: valid requests and helper messages, changed in structure or in bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import msgpack

from whisperd.protocol.frames import encode_body, encode_frame

_JOB = {"id": 1, "job": 7}
REQUESTS: Sequence[Mapping[str, Any]] = [
    {"id": number, "op": op, "params": params}
    for number, (op, params) in enumerate(
        [
            ("hello", {}),
            ("health", {}),
            ("stats", {}),
            ("submit", {"source": {"kind": "fd", "name": "talk.m4a"}, "options": {"language": "de"}, "key": "k"}),
            ("submit", {"source": {"kind": "upload", "name": "x", "size_bytes": 9}, "attached": True}),
            ("submit", {"source": {"kind": "video", "id": "dQw4w9WgXcQ"}, "priority": "interactive"}),
            (
                "submit",
                {"source": {"kind": "url", "url": "https://example.org/a"}, "options": {"temperature": [0, 0.2]}},
            ),
            ("chunk", {"upload": 4, "data": b"abc", "last": False}),
            ("result", {"job": 7, "wait_s": 0}),
            ("result", {"job": 7, "wait_s": 0.01}),
            ("jobs", {"state": "done", "limit": 5, "before": 9, "all": True}),
            ("cancel", {"job": 7}),
            ("retry", {"job": 7}),
            ("forget", {"job": 7}),
            ("subscribe", {"job": 7, "after_seq": 2}),
            ("subscribe", {}),
        ],
        start=1,
    )
]
_ODD: Sequence[Any] = [
    None,
    True,
    -1,
    0,
    2**53,
    2**64 - 1,
    -(2**63),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "\x1b[2J",
    "é" * 200,
    b"\xff" * 40,
    [],
    {},
    [[[[[[[[[1]]]]]]]]],
    {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": 1}}}}}}}},
    list(range(1100)),
    {"kind": "fd"},
    msgpack.ExtType(5, b"x"),
    msgpack.Timestamp(1),
]


def mutated_frame(random: Random, messages: Sequence[Mapping[str, Any]] = REQUESTS) -> bytes:
    """Return a frame, mostly wrong in one place or a few."""
    message = random.choice(messages)
    for _ in range(random.choice((0, 0, 1, 1, 2))):
        message = _other_structure(random, message)
    frame = bytearray(encode_frame(message))
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        frame = random.choice(_BYTES)(random, frame)
    if random.random() < 0.5 and len(frame) >= 4:  # the length is right, so that what follows is looked at
        frame[:4] = struct.pack(">I", len(frame) - 4)
    return bytes(frame)


def _other_structure(random: Random, value: Any) -> Any:
    """Return the map with a value replaced, left out, added, or changed further below."""
    result = dict(value)
    what, key = random.random(), random.choice(list(result)) if result else ""
    if what < 0.15:
        result.pop(key, None)
    elif what < 0.3:
        result[random.choice(["id", "op", "job", "params", "source", "x" * 300, "é"])] = random.choice(_ODD)
    elif isinstance(result.get(key), dict) and what < 0.8:
        result[key] = _other_structure(random, result[key])
    else:
        result[key] = random.choice(_ODD)
    return result


def _flip(random: Random, frame: bytearray) -> bytearray:
    if frame:
        frame[random.randrange(len(frame))] ^= 1 << random.randrange(8)
    return frame


def _set(random: Random, frame: bytearray) -> bytearray:
    if frame:
        # Bytes that begin something in msgpack: maps, lists, strings, binaries and extensions of any length.
        frame[random.randrange(len(frame))] = random.choice(
            b"\x80\x8f\x90\x9f\xa0\xbf\xc1\xc4\xc6\xc9\xd4\xdb\xdd\xdf\xff\x00"
        )
    return frame


def _cut(random: Random, frame: bytearray) -> bytearray:
    return frame[: random.randrange(len(frame) + 1)]


def _insert(random: Random, frame: bytearray) -> bytearray:
    at = random.randrange(len(frame) + 1)
    return frame[:at] + random.randbytes(random.choice((1, 2, 4, 30))) + frame[at:]


def _repeat(random: Random, frame: bytearray) -> bytearray:
    first, second = sorted(random.randrange(len(frame) + 1) for _ in range(2))
    return frame[:second] + frame[first:second] * random.choice((1, 2, 50)) + frame[second:]


def _splice(random: Random, frame: bytearray) -> bytearray:
    other = encode_body(random.choice(REQUESTS))
    return frame[: random.randrange(len(frame) + 1)] + other[random.randrange(len(other)) :]


def _length(random: Random, frame: bytearray) -> bytearray:
    return bytearray(struct.pack(">I", random.choice((0, 1, 2**16, 2**16 + 1, 2**31, 2**32 - 1)))) + frame[4:]


_BYTES: Sequence[Callable[[Random, bytearray], bytearray]] = (
    _flip,
    _flip,
    _set,
    _set,
    _cut,
    _insert,
    _repeat,
    _splice,
    _length,
)
