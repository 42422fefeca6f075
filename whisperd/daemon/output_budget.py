"""What the connections of one user may hold of output that nobody has read yet.

A connection has its own bounds, but a user may have a thousand of them. All of his together hold at most the budget:
what may be large (a transcript, a page of jobs or events) is read from the disk only when there is room for the largest
answer there is; and while his readers have filled it, none of his connections is read on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from whisperd.protocol.frames import MAX_REPLY_BYTES


class OutputBudget:
    """The budget of one user. `soon` calls a function in the loop's next turn."""

    def __init__(self, limit_bytes: int, soon: Callable[[Callable[[], object]], None]) -> None:
        self._limit_bytes = limit_bytes
        self._soon = soon
        self._held_bytes = 0
        self._reserved = 0
        self._waiting: deque[Callable[[], object]] = deque()
        self._stopped: list[Callable[[], object]] = []

    @property
    def full(self) -> bool:
        """True when this user's readers have left so much unread that nothing more is taken from him."""
        return self._held_bytes >= self._limit_bytes

    def add(self, count: int) -> None:
        """Count bytes that were queued, or (negative) sent or dropped."""
        self._held_bytes += count
        if count < 0:
            self._go_on()

    def reserve(self, start: Callable[[], object]) -> None:
        """Call `start`, soon, when there is room for the largest answer; it is kept free until `release`."""
        self._waiting.append(start)
        self._go_on()

    def release(self) -> None:
        """Give the room back: the answer is queued, and counts by itself, or there is none."""
        self._reserved -= 1
        self._go_on()

    def when_not_full(self, wake: Callable[[], object]) -> None:
        """Call `wake` once, when there is room again."""
        self._stopped.append(wake)

    def _go_on(self) -> None:
        while self._waiting and self._held_bytes + (self._reserved + 1) * MAX_REPLY_BYTES <= self._limit_bytes:
            self._reserved += 1
            self._soon(self._waiting.popleft())
        if self._stopped and not self.full:
            stopped, self._stopped = self._stopped, []
            for wake in stopped:
                self._soon(wake)
