"""A real loop on a clock that the test moves, and a real connection on it: what happens after a minute takes none."""

from __future__ import annotations

import socket
from collections.abc import Callable

from whisperd.daemon.config import Config
from whisperd.daemon.loop import Loop
from whisperd.daemon.wire.link import Link
from whisperd.daemon.wire.user_budget import UserBudget

_TURNS = 5  # what is due asks for further turns, but not for more than these


class MovedLoop(Loop):
    """Its clock stands still until the test moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        super().__init__(clock=lambda: self.now_s)

    def at(self, time_s: float) -> None:
        """Run what is due up to this time, and what comes of that."""
        self.now_s = time_s
        for _ in range(_TURNS):
            self.call_soon(self.stop)
            self.run()


def link_on(
    loop: Loop, config: Config, sock: socket.socket, closed: Callable[[Link], None] = lambda link: None, number: int = 1
) -> Link:
    """Return a connection that answers no requests; `number` is its peer's."""
    sock.setblocking(False)
    return Link(
        loop,
        config,
        sock,
        number,
        (1, 0, 0),
        budget=UserBudget(
            output_bytes=1 << 20, store_calls=1, requests=1, reads=1, soon=loop.call_soon, turn=lambda: loop.turns
        ),
        dispatch=lambda peer, request, descriptors: None,
        gone=lambda link: None,
        closed=closed,
    )
