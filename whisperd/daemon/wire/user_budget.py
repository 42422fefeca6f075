"""What the connections of one user may ask of the daemon at a time, all of them together.

A connection has its own bounds, but a user may have a thousand of them. Two things are counted: output that he has not
read yet, and his calls that wait for the store thread, which everybody shares. With too much of either, none of his
connections is read on. Of a turn of the loop all of them together get a slice, so that others have theirs soon. What
may be large (a transcript, a page of jobs or events) is read from the disk only when there is room for the largest
answer there is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from whisperd.protocol.frames import MAX_REPLY_BYTES


class UserBudget:
    """The budget of one user: `requests` and `reads` are his slice of one turn of the loop.

    They are counted apart, so that who waits in line for his slice does not keep others of the same user from getting
    into it: a read of nothing but small frames takes as long as some requests.
    `soon` calls a function in the loop's next turn, `turn` tells the number of this one.
    """

    def __init__(
        self,
        *,
        output_bytes: int,
        store_calls: int,
        requests: int,
        reads: int,
        soon: Callable[[Callable[[], object]], None],
        turn: Callable[[], int] = lambda: 0,
    ) -> None:
        self.full = False  # nothing more is taken from him
        self._most_bytes, self._most_calls = output_bytes, store_calls
        self._requests, self._reads = requests, reads
        self._soon, self._turn_now = soon, turn
        self._line: deque[Callable[[], object]] = deque()
        self._turn, self._handled, self._read = -1, 0, 0
        self._held_bytes = 0
        self._calls = 0
        self._reserved = 0
        self._waiting: deque[Callable[[], object]] = deque()
        self._stopped: list[Callable[[], object]] = []

    def may_handle(self) -> bool:
        """Return whether one more request of this user is handled in this turn of the loop, and count it."""
        self._count_anew()
        self._handled += 1
        return self._handled <= self._requests

    def may_read(self) -> bool:
        """Return whether one more of his connections is read in this turn, and count it."""
        self._count_anew()
        self._read += 1
        return self._read <= self._reads

    def _count_anew(self) -> None:
        if self._turn != (turn := self._turn_now()):
            self._turn, self._handled, self._read = turn, 0, 0

    def line_up(self, go_on: Callable[[], object]) -> None:
        """Call `go_on` in a later turn that has room for it: one connection after the other, so all have theirs."""
        if not self._line:
            self._soon(self._serve_line)
        self._line.append(go_on)

    def _serve_line(self) -> None:
        line, self._line = self._line, deque()
        self._count_anew()
        while line and self._handled < self._requests:
            line.popleft()()
        if line and not self._line:
            self._soon(self._serve_line)
        self._line.extendleft(reversed(line))  # before those who have just had theirs

    def add(self, count: int) -> None:
        """Count bytes that were queued, or (negative) sent or dropped."""
        self._held_bytes += count
        self._settle()

    def began(self) -> None:
        """Count a call that the store has been given."""
        self._calls += 1
        self._settle()

    def ended(self) -> None:
        """The store has answered one."""
        self._calls -= 1
        self._settle()

    def reserve(self, start: Callable[[], object]) -> None:
        """Call `start`, soon, when there is room for the largest answer; it is kept free until `release`."""
        self._waiting.append(start)
        self._settle()

    def release(self) -> None:
        """Give the room back: the answer is queued, and counts by itself, or there is none."""
        self._reserved -= 1
        self._settle()

    def when_not_full(self, wake: Callable[[], object]) -> None:
        """Call `wake` once, when there is room again."""
        self._stopped.append(wake)

    def _settle(self) -> None:
        while self._waiting and self._held_bytes + (self._reserved + 1) * MAX_REPLY_BYTES <= self._most_bytes:
            self._reserved += 1
            self._soon(self._waiting.popleft())
        if self._held_bytes >= self._most_bytes or self._calls >= self._most_calls:
            self.full = True
        elif self.full and self._held_bytes <= self._most_bytes // 2 and self._calls <= self._most_calls // 2:
            # Not before half of it is free: to wake a thousand connections for one place costs more than the place.
            self.full = False
            stopped, self._stopped = self._stopped, []
            for wake in stopped:
                self._soon(wake)
