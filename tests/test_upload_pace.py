"""How fast an upload must come while others wait: by a real loop, on a clock that the test moves."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.moved_time import MovedLoop, link_on
from tests.test_server import settings
from whisperd.daemon.uploads import Upload
from whisperd.daemon.wire.server import Peer
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.messages import Chunk

TIMEOUT_S = 10
BYTES_PER_S = 100
ENOUGH = TIMEOUT_S * BYTES_PER_S  # bytes from one look to the next


class Uploading:
    """An upload that others wait for, whose chunks are written when the test says so."""

    def __init__(self, peer: Peer, loop: MovedLoop) -> None:
        self.answers: list[Any] = []
        self.given_up: list[WhisperdError] = []
        self.at = loop.at
        self._upload = Upload(
            loop,
            peer,
            1,
            timeout_s=TIMEOUT_S,
            bytes_per_s=BYTES_PER_S,
            crowded=lambda: True,
            check=lambda chunk, received_bytes: None,
            send=lambda data, last: None,
            failed=self.given_up.append,
        )
        self._upload.start()

    def comes(self, size_bytes: int, *, last: bool = False) -> None:
        self._upload.take(Chunk(upload=1, data=bytes(size_bytes), last=last), self.answers.append, self.answers.append)

    def is_written(self) -> None:
        self._upload.written(self._upload.received_bytes)

    @property
    def why(self) -> list[str]:
        """Why it was given up: the settings that its errors name."""
        return [
            name for error in self.given_up for name in ("upload_bytes_per_s", "upload_timeout_s") if name in str(error)
        ]


@pytest.fixture
def upload(tmp_path: Path) -> Iterator[Uploading]:
    loop, (client, ours) = MovedLoop(), socket.socketpair()
    link = link_on(loop, settings(tmp_path), ours)
    yield Uploading(link.peer, loop)
    link.abort("the test is over")
    client.close()
    loop.close()


def test_a_look_that_falls_while_chunks_are_written_is_made_once_they_are(upload: Uploading) -> None:
    upload.at(9)
    upload.comes(ENOUGH // 2)
    upload.comes(ENOUGH // 2 - 1)
    upload.at(10)
    upload.at(15)
    assert upload.given_up == [], "it may be the disk that is slow"
    upload.is_written()
    assert upload.given_up == [], "another chunk is on its way"
    upload.is_written()
    assert upload.why == ["upload_bytes_per_s"]


def test_who_was_fast_enough_at_a_late_look_is_looked_at_again(upload: Uploading) -> None:
    upload.at(9)
    upload.comes(ENOUGH)
    upload.at(12)
    upload.is_written()
    upload.at(21)
    upload.comes(ENOUGH - 1)
    upload.is_written()
    assert upload.given_up == [], "from one look to the next"
    upload.at(22)
    assert upload.why == ["upload_bytes_per_s"]


def test_nobody_looks_at_what_has_come_whole(upload: Uploading) -> None:
    upload.at(9)
    upload.comes(1)
    upload.at(10)
    upload.comes(1, last=True)
    upload.is_written()
    upload.is_written()
    upload.at(100)
    assert (upload.given_up, len(upload.answers)) == ([], 2)
