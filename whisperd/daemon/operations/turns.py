"""Questions whose answers are large or take a while: asked one after the other, as their client takes the answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from whisperd.daemon.wire.server import Peer
from whisperd.protocol.errors import WhisperdError

T = TypeVar("T")


def ask_in_turn(
    peer: Peer,
    ask: Callable[[Callable[[T], None], Callable[[WhisperdError], None]], object],
    then: Callable[[T], None],
    failed: Callable[[WhisperdError], None],
) -> None:
    """Call `ask(then, failed)` once it is this client's turn.

    `ask` has one of both called, once and perhaps later. Whatever that one does, even raise, ends the turn.
    """

    def start(done: Callable[[], None]) -> None:
        ask(_ending_with(done, then), _ending_with(done, failed))

    peer.in_turn(start)


def _ending_with(done: Callable[[], None], told: Callable[[T], None]) -> Callable[[T], None]:
    def tell(value: T) -> None:
        try:
            told(value)
        finally:
            done()

    return tell
