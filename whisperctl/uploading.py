"""Handing a recording over in pieces, where its descriptor does not get through (a socket forwarded by `ssh -L`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from whisperctl.errors import SourceUnreadable, refusal
from whisperctl.link import Link, next_message
from whisperctl.sources import OpenSource
from whisperd.protocol.channel import Channel
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.messages import MAX_CHUNK_BYTES, MAX_UNANSWERED_CHUNKS

Progress = Callable[[int, int | None], object]

_TRIES = 3  # for an upload whose receiving process ended


def upload_source(opened: OpenSource) -> dict[str, Any]:
    """Return the `source` of a submit whose bytes come in pieces. A file that tells no size (of /proc) may have one."""
    return {"kind": "upload", "name": opened.name, "size_bytes": opened.size_bytes or None}


def upload(
    link: Link, params: Mapping[str, Any], opened: OpenSource, *, deadline: float | None, progress: Progress
) -> tuple[dict[str, Any], Channel]:
    """Submit a recording, byte by byte; return the reply, and the connection, which holds an attached job: close it.

    It has a connection of its own, as the daemon reads one no faster than it takes the bytes. When it breaks, all is
    sent again, under the key of `params`. `progress(sent_bytes, size_bytes or None)` is called as the bytes arrive.
    Raises what the submit was refused with, `SourceUnreadable`, `DaemonUnreachable`, and `TimeoutError` at the
    deadline.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            return link.converse(
                lambda channel, answered: _talk(channel, answered, params, opened, deadline, progress),
                deadline=deadline,
            )
        except WhisperdError as error:
            if error.code != ErrorCode.WORKER_CRASHED or not tries_left:
                raise
    raise AssertionError("the last try returns or raises")


def _talk(
    channel: Channel,
    answered: Callable[[], None],
    params: Mapping[str, Any],
    opened: OpenSource,
    deadline: float | None,
    progress: Progress,
) -> dict[str, Any]:
    size_bytes = params["source"]["size_bytes"]
    pieces = _pieces(opened, size_bytes)
    # One piece until the first is answered: a known key, or a refusal, then comes before a megabyte has been sent,
    # and an upload that waits for its turn waits here and not in the middle of sending.
    window, on_their_way, number = 1, 0, 1
    channel.send({"id": 1, "op": "submit", "params": params})
    while True:
        while on_their_way < window and (piece := next(pieces, None)) is not None:
            number, on_their_way = number + 1, on_their_way + 1
            data, last = piece
            channel.send({"id": number, "op": "chunk", "params": {"upload": 1, "data": data, "last": last}})
        message = next_message(channel, deadline)
        answered()
        if message.get("id", 0) > 1:
            on_their_way -= 1
            if message.get("ok"):  # else the submit is refused as well, and says why
                window = MAX_UNANSWERED_CHUNKS
                progress(message["result"]["received"], size_bytes)
        elif message.get("ok"):
            result: dict[str, Any] = message.get("result") or {}
            return result
        else:
            raise refusal(message.get("error") or {})


def _pieces(opened: OpenSource, size_bytes: int | None) -> Iterator[tuple[bytes, bool]]:
    """Yield the file's bytes from its first on, each piece with whether it is the last."""
    offset = 0
    last = False
    while not last:
        wanted = MAX_CHUNK_BYTES if size_bytes is None else min(MAX_CHUNK_BYTES, size_bytes - offset)
        try:
            data = os.pread(opened.fd, wanted, offset)
        except OSError as error:
            raise SourceUnreadable(f"cannot read {opened.name or 'the file'}: {error.strerror or error}") from None
        offset += len(data)
        if size_bytes is not None and not data:
            raise SourceUnreadable(f"{opened.name or 'the file'} became shorter while it was copied: try again")
        last = not data if size_bytes is None else offset == size_bytes
        yield data, last
