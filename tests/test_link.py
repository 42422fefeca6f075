"""One connection on a clock that the test moves: what its deadlines are, and that they are the settings'."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.moved_time import MovedLoop, link_on
from tests.support import RawClient
from tests.test_server import settings


@pytest.mark.parametrize("linger_s", [0.5, 7])
def test_who_is_refused_may_go_on_sending_for_so_long(tmp_path: Path, linger_s: float) -> None:
    loop, (theirs, ours), closed = MovedLoop(), socket.socketpair(), list[object]()
    link_on(loop, settings(tmp_path, linger_s=linger_s), ours, closed.append)
    with RawClient(theirs) as client:
        client.send_bytes(b"\0\0\0\1\xff")
        loop.at(0)
        assert client.receive()["error"]["code"] == "bad_frame"
        loop.at(0.9 * linger_s)
        client.send_bytes(b"it has not read the answer yet")
        loop.at(0.99 * linger_s)
        assert not closed
        loop.at(linger_s)
        assert len(closed) == 1
        with pytest.raises(BrokenPipeError):
            client.send_bytes(b"and now nobody is there")
    loop.close()
