"""The line: the runs that wait for the model, each with its place in the order in which they would be started.

The order is `scheduler.in_order`'s. It is kept as runs come and go, by user: a place is then asked of the users who
wait, not of all that waits, and who follows one of 10,000 jobs costs the loop microseconds, not a sort.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from whisperd.daemon.scheduler import Turns
from whisperd.protocol.jobs import Priority


class Line:
    """Waiting runs by priority and user, oldest first; `turns` says which user is next."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._where: dict[int, tuple[Priority, int]] = {}  # run → its priority and user
        self._queues: dict[Priority, dict[int, list[int]]] = {priority: {} for priority in Priority}

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

    def place(self, run_id: int) -> int | None:
        """Return a run's place, 1 = next; None for one that does not wait.

        Users take turns, so before a user's run number `n` (from 0) each other one has `n` of his own, and one more if
        his turn comes first.
        """
        where = self._where.get(run_id)
        if where is None:
            return None
        priority, uid = where
        number, turn = bisect_left(self._queues[priority][uid], run_id), self._turn(priority, uid)
        before = sum(
            min(len(queue), number + (self._turn(priority, other) < turn))
            for other, queue in self._queues[priority].items()
        )
        if priority is Priority.BACKGROUND:
            before += sum(map(len, self._queues[Priority.INTERACTIVE].values()))
        return before + 1

    def _turn(self, priority: Priority, uid: int) -> tuple[int, int]:
        """Return what orders the users: who was served longest ago, or never and has waited longest, comes first."""
        return self._turns.last(priority, uid), self._queues[priority][uid][0]
