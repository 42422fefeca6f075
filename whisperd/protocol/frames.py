"""Frames: bytes to maps and back, without a socket.

A frame is an unsigned 32-bit big-endian length N, then N bytes of one msgpack map with string keys.
Every rule about bytes is here and nowhere else: sizes, nesting, duplicate keys, NaN, extension types.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack

from whisperd.protocol.errors import ErrorCode, WhisperdError

MAX_REQUEST_BYTES = 64 * 1024
MAX_REPLY_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 8
# A list in a request holds at most this many items: nested headers each claim memory before they are filled
# (1,000 nested headers of 64 Ki items cost 78 MB), and no request needs more.
MAX_REQUEST_ITEMS = 1024

_HEADER = struct.Struct(">I")
# msgpack reports bad bytes with half a dozen exception types (ValueError and its children, TypeError on an unhashable
# key, RecursionError never), and values that it cannot write with OverflowError besides: this is the one place that
# knows.
_FAULTS = (ValueError, TypeError, OverflowError, msgpack.UnpackException)


class FrameError(WhisperdError):
    """These bytes are no frame: the stream cannot be read on and its connection must be closed."""


def encode_body(message: Mapping[str, Any]) -> bytes:
    """Return `message` as msgpack, without the length."""
    packed: bytes = msgpack.packb(message, use_bin_type=True)
    return packed


def encode_frame(message: Mapping[str, Any]) -> bytes:
    """Return one whole frame."""
    body = encode_body(message)
    return _HEADER.pack(len(body)) + body


def encode_request(number: int, op: str, params: Mapping[str, Any]) -> bytes:
    """Return the frame of a request, held to what a daemon reads: one that it cannot read costs the connection.

    Raises `WhisperdError`: `too_large`, or `bad_request` that names the value which no frame can carry.
    """
    try:
        body = encode_body({"id": number, "op": op, "params": params})
        if len(body) <= MAX_REQUEST_BYTES:
            _unpack(body, trusted=False)
    except _FAULTS as error:
        raise WhisperdError(ErrorCode.BAD_REQUEST, f"{op}: {_named(params, error)}") from None
    if len(body) > MAX_REQUEST_BYTES:
        message = f"{op}: a request of {len(body)} bytes; at most {MAX_REQUEST_BYTES} are allowed"
        raise WhisperdError(ErrorCode.TOO_LARGE, message)
    return _HEADER.pack(len(body)) + body


def _named(values: Mapping[str, Any], fault: Exception, depth: int = MAX_DEPTH) -> str:
    """Return a fault behind the names that lead to it: `options: temperature: a number is not finite`."""
    for name, value in values.items() if depth else ():
        try:
            _unpack(encode_body({name: value}), trusted=False)
        except _FAULTS as inner:
            return f"{name}: {_named(value, inner, depth - 1) if isinstance(value, Mapping) else inner}"
    return str(fault)


class Raw(bytes):
    """A value that is msgpack already, spliced into a frame as it is (a stored transcript is never unpacked)."""


def encode_frame_parts(message: Mapping[str, Any]) -> list[bytes]:
    """Return one frame as a list of buffers, where `Raw` values at depth 1 or 2 are passed through uncopied."""
    parts: list[bytes] = []
    _pack_map(message, parts, depth=2)
    return [_HEADER.pack(sum(map(len, parts))), *parts]


def _pack_map(message: Mapping[str, Any], parts: list[bytes], *, depth: int) -> None:
    parts.append(msgpack.Packer().pack_map_header(len(message)))
    for key, value in message.items():
        parts.append(msgpack.packb(key))
        if isinstance(value, Raw):
            parts.append(value)
        elif isinstance(value, Mapping) and depth > 1:
            _pack_map(value, parts, depth=depth - 1)
        else:
            parts.append(msgpack.packb(value, use_bin_type=True))


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not allowed")


def _unique_pairs(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    result = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ValueError("a key is not a string")
        if key in result:
            raise ValueError(f"key {key!r} stands there twice")
        result[key] = value
    return result


def _check_value(value: Any, depth: int) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a number is not finite")
    elif isinstance(value, dict | list):
        if depth >= MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        for item in value.values() if isinstance(value, dict) else value:
            _check_value(item, depth + 1)


def _unpack(body: bytes, *, trusted: bool) -> Any:
    """Return the value that `body` holds. Raises one of `_FAULTS`."""
    limit = len(body) if trusted else min(len(body), MAX_REQUEST_ITEMS)
    value = msgpack.unpackb(
        body,
        raw=False,
        strict_map_key=True,
        object_pairs_hook=_unique_pairs,
        ext_hook=_no_extension,
        max_array_len=limit,
        max_map_len=limit,
        max_ext_len=0,
    )
    _check_value(value, 0)
    return value


def parse_body(body: bytes, *, trusted: bool = False) -> dict[str, Any]:
    """Return the map that `body` holds.

    `trusted` is for what the daemon and its helpers send (long lists of segments); requests come with small limits.
    Raises `FrameError` (`bad_frame`) for anything that is not exactly one well-formed map.
    """
    try:
        value = _unpack(body, trusted=trusted)
    except _FAULTS as error:
        raise FrameError(ErrorCode.BAD_FRAME, f"not a msgpack map as the protocol wants it: {error}") from None
    if not isinstance(value, dict):
        raise FrameError(ErrorCode.BAD_FRAME, "a frame must hold one map with string keys")
    return value


class FrameReader:
    """Splits a stream of bytes into frame bodies, however the bytes are cut.

    `feed` takes what one `recvmsg` returned, with its descriptors: they belong to the frame that holds the last byte.
    `pop` returns `(body, descriptors)` or None. A length over `max_bytes` is refused, and nothing kept from there on:
    `pop` then raises `FrameError` once the frames before it have been taken.

    A frame is cut when it is taken. Cut as they come, the small frames of a thousand connections are millions of
    objects, and Python's collector, which looks at each of them, stops the daemon for as much as half a second.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()  # from the first byte of the next frame on
        self._end = _HEADER.size  # of the next frame in the buffer, as far as it is known
        self._fed = self._popped = 0  # bytes since the beginning
        self._descriptors: deque[tuple[int, list[int]]] = deque()  # with what had been fed when they had come
        self._refused: int | None = None  # the length of a frame that is too large

    @property
    def buffered(self) -> int:
        """Bytes that have not been popped."""
        return len(self._buffer)

    @property
    def ready(self) -> bool:
        """True when `pop` has a frame to return or an error to raise."""
        return self._end <= len(self._buffer) or self._refused is not None

    @property
    def waiting_descriptors(self) -> int:
        """Descriptors that have not been popped."""
        return sum(len(descriptors) for _, descriptors in self._descriptors)

    def feed(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Take bytes; never raises (see `pop`). After an error further bytes are dropped."""
        self._fed += len(data)
        if descriptors:
            self._descriptors.append((self._fed, list(descriptors)))
        if self._refused is None:
            self._buffer += data
            self._look()

    def _look(self) -> None:
        """See where the next frame ends, once its header is there."""
        self._end = _HEADER.size
        if len(self._buffer) < _HEADER.size:
            return
        (size,) = _HEADER.unpack_from(self._buffer)
        if size > self._max_bytes:
            self._refused = size
            self._buffer.clear()
        self._end += size

    def pop(self) -> tuple[bytes, list[int]] | None:
        """Return the next frame's body and descriptors, or None. Raises `FrameError` when the stream is broken."""
        if self._refused is not None:
            message = f"a frame of {self._refused} bytes; at most {self._max_bytes} are allowed"
            raise FrameError(ErrorCode.TOO_LARGE, message)
        if not self.ready:
            return None
        body = bytes(self._buffer[_HEADER.size : self._end])
        del self._buffer[: self._end]
        self._popped += self._end
        descriptors: list[int] = []
        # What came with this frame's first bytes, in an earlier recvmsg, is this frame's.
        while self._descriptors and self._descriptors[0][0] <= self._popped:
            descriptors += self._descriptors.popleft()[1]
        self._look()
        return body, descriptors

    def descriptors(self) -> list[int]:
        """Hand over every descriptor not yet popped (the caller closes them when the connection ends)."""
        left = [fd for _, descriptors in self._descriptors for fd in descriptors]
        self._descriptors.clear()
        return left
