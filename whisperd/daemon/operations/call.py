"""One request as its handler sees it: who asked, what came along, and where to answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from whisperd.daemon.house import House
from whisperd.daemon.store.rows import JobRow, RunRow
from whisperd.daemon.wire.server import Peer
from whisperd.protocol.errors import WhisperdError


@dataclass(frozen=True, slots=True)
class Call:
    """A request; `reply` or `fail` answers it, once. `descriptors` are closed after the handler unless it took them."""

    house: House
    peer: Peer
    id: int
    descriptors: list[int]
    over: Callable[[], None] = lambda: None  # called behind the answer

    def reply(self, result: Mapping[str, Any]) -> None:
        """Answer with a result."""
        self.peer.reply(self.id, result)
        self.over()

    def fail(self, error: WhisperdError) -> None:
        """Answer with an error."""
        self.peer.fail(self.id, error)
        self.over()

    def followed_by(self, over: Callable[[], None]) -> Call:
        """Return the same request, whose answer `over` is called behind."""
        return replace(self, over=over)

    def show(self, job: JobRow, run: RunRow) -> dict[str, Any]:
        """Return a job as the wire has it."""
        return self.house.board.show(job, run).to_wire()

    def view(self) -> int | None:
        """Return whose jobs the caller may see; None = everybody's."""
        return self.house.view_of(self.peer)
