"""The line: runs that wait for something, each with its place in the order in which they would be started.

The order is `scheduler.in_order`'s. It is kept as runs come and go, by user: who is next, and a place, are asked of the
users who wait, not of all that waits, and a commit with 10,000 runs waiting costs the loop microseconds, not a sort.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator

from whisperd.daemon.scheduler import Turns, Waiting
from whisperd.protocol.jobs import Priority


class Line:
    """Waiting runs by priority and user, oldest first."""

    def __init__(self) -> None:
        self._where: dict[int, tuple[Priority, int]] = {}  # run → its priority and user
        self._queues: dict[Priority, dict[int, list[int]]] = {priority: {} for priority in Priority}

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[int]:
        return iter(self._where)

    def count(self, priority: Priority) -> int:
        """Return how many runs of a priority wait."""
        return sum(map(len, self._queues[priority].values()))

    def put(self, run_id: int, uid: int, priority: Priority) -> bool:
        """Let a run wait, or go on waiting in another priority; return whether that changes the order."""
        where = (priority, uid)
        if self._where.get(run_id) == where:
            return False
        self.remove(run_id)
        self._where[run_id] = where
        insort(self._queues[priority].setdefault(uid, []), run_id)
        return True

    def remove(self, run_id: int) -> bool:
        """Let a run wait no more; return whether it did."""
        where = self._where.pop(run_id, None)
        if where is None:
            return False
        priority, uid = where
        queue = self._queues[priority][uid]
        del queue[bisect_left(queue, run_id)]
        if not queue:
            del self._queues[priority][uid]
        return True

    def heads(self, priorities: Iterable[Priority], may: Callable[[int], bool]) -> list[Waiting]:
        """Return each user's oldest run in each of these priorities that `may` be started: one of them is next."""
        found = []
        for priority in priorities:
            for uid, queue in self._queues[priority].items():
                run_id = next(filter(may, queue), None)
                if run_id is not None:
                    found.append(Waiting(id=run_id, uid=uid, priority=priority, order=run_id))
        return found

    def place(self, run_id: int, turns: Turns) -> int | None:
        """Return a run's place, 1 = next; None for one that does not wait. `turns` says which user is next.

        Users take turns, so before a user's run number `n` (from 0) each other one has `n` of his own, and one more if
        his turn comes first.
        """
        where = self._where.get(run_id)
        if where is None:
            return None
        priority, uid = where
        queues = self._queues[priority]

        def turn(user: int) -> tuple[int, int]:
            """What orders the users: who was served longest ago, or never and has waited longest, comes first."""
            return turns.last(priority, user), queues[user][0]

        number, his_turn = bisect_left(queues[uid], run_id), turn(uid)
        before = sum(min(len(queue), number + (turn(other) < his_turn)) for other, queue in queues.items())
        if priority is Priority.BACKGROUND:
            before += self.count(Priority.INTERACTIVE)
        return before + 1
