"""A helper under watch, for the tests of its supervision: what it said, and how it ended."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support import wait_until
from whisperd.daemon.helpers.helper import ExitReason, Helper
from whisperd.daemon.loop import Loop
from whisperd.protocol.helper_messages import CopyIn, Heartbeat, HelperMessage

ROOT = Path(__file__).parents[1]


class Watched:
    """A helper, what it said (but for heartbeats) and how it ended; `until` runs the loop."""

    def __init__(
        self,
        loop: Loop,
        *,
        heartbeat_timeout_s: float = 60,
        start: str = "",
        module: str = "",
        address: Path | None = None,
    ) -> None:
        self.loop, self.address = loop, address
        self.messages: list[HelperMessage] = []
        self.heartbeats: list[Heartbeat] = []
        self.exits: list[ExitReason] = []
        self.helper = Helper(
            loop,
            role="odd",
            module=module or "tests.odd_helper",
            settings={"colour": "green"},
            nice=3,
            log_level="info",
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | ({"ODD_START": start} if start else {}),
            on_message=self._on_message,
            on_exit=lambda helper, reason: self.exits.append(reason),
            heartbeat_timeout_s=heartbeat_timeout_s,
            address=address,
        )

    def _on_message(self, helper: Helper, message: HelperMessage) -> None:
        assert helper is self.helper
        if isinstance(message, Heartbeat):
            self.heartbeats.append(message)
        else:
            self.messages.append(message)

    def order(self, command: str, descriptors: Sequence[int] = ()) -> None:
        self.helper.send(CopyIn(run=1, generation=2, folder=command), descriptors)

    def until(self, predicate: Callable[[], Any]) -> None:
        """Run the loop until the predicate holds."""
        run_until(self.loop, predicate)

    def answer(self) -> HelperMessage:
        """Run the loop until it has said something, and return that."""
        self.until(lambda: self.messages or self.exits)
        return self.messages.pop(0)

    def ended(self) -> ExitReason:
        """Run the loop until it has ended, and return how; its process is gone and reaped."""
        self.until(lambda: self.exits)
        (reason,) = self.exits
        assert not self.helper.alive
        # A child is reaped by now; an instance of a unit ends by itself, in a moment.
        wait_until(lambda: self.helper.pid == 0 or not psutil.pid_exists(self.helper.pid), 10 if self.address else 0)
        return reason


def run_until(loop: Loop, predicate: Callable[[], Any], timeout_s: float = 60) -> None:
    late: list[bool] = []
    deadline = loop.call_later(timeout_s, lambda: (late.append(True), loop.stop()))

    def look() -> None:
        if predicate():
            loop.stop()
        elif not late:
            loop.call_later(0.01, look)

    look()
    loop.run()
    deadline.cancel()
    assert not late, "waited in vain"
