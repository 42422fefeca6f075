"""Who is next: pure functions over what waits, without clocks, sockets or rows of the database.

Interactive work goes before background work. Inside a priority users take turns: the user served longest ago is next,
with his oldest piece of work. Reserved places keep each priority moving when the other floods the lane.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from whisperd.protocol.jobs import Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A piece of work that waits in a lane. `order` grows with time of arrival."""

    id: int
    uid: int
    priority: Priority
    order: int


class Turns:
    """Remembers, a lane, when each user was last served (in services, not in seconds).

    A lane with one place has none to keep for background work: `interactive_in_a_row` interactive pieces go before it,
    then one of it.
    """

    def __init__(self, interactive_in_a_row: int) -> None:
        self._most_in_a_row = interactive_in_a_row
        self._served: dict[tuple[Priority, int], int] = {}
        self._count = 0
        self._in_a_row = 0  # interactive pieces since background work was last started

    def serve(self, priority: Priority, uid: int) -> None:
        """Note that a user's work was started."""
        self._count += 1
        self._in_a_row = self._in_a_row + 1 if priority is Priority.INTERACTIVE else 0
        self._served[priority, uid] = self._count

    @property
    def background_is_due(self) -> bool:
        """True when interactive work has gone first often enough."""
        return self._in_a_row >= self._most_in_a_row

    def last(self, priority: Priority, uid: int) -> int:
        """Return a number that is lower the longer a user has not been served; 0 = never."""
        return self._served.get((priority, uid), 0)

    def snapshot(self, priority: Priority) -> dict[int, int]:
        """Return `last` of every user known in a priority."""
        return {uid: served for (kind, uid), served in self._served.items() if kind is priority}


def in_order(waiting: Iterable[Waiting], turns: Turns) -> list[Waiting]:
    """Return all that waits in the order in which it would be started if nothing else arrived."""
    result: list[Waiting] = []
    work = list(waiting)
    for priority in (Priority.INTERACTIVE, Priority.BACKGROUND):
        of_priority = [piece for piece in work if piece.priority is priority]
        result.extend(_by_turns(of_priority, turns.snapshot(priority)))
    return result


def _by_turns(work: list[Waiting], served: Mapping[int, int]) -> list[Waiting]:
    queues: dict[int, deque[Waiting]] = defaultdict(deque)
    for piece in sorted(work, key=lambda piece: piece.order):
        queues[piece.uid].append(piece)
    # Users not served yet come in the order of their first work; whoever is served goes to the end of the round.
    round_ = deque(sorted(queues, key=lambda uid: (served.get(uid, 0), queues[uid][0].order)))
    result = []
    while round_:
        uid = round_.popleft()
        result.append(queues[uid].popleft())
        if queues[uid]:
            round_.append(uid)
    return result


def places(
    *, capacity: int, busy: Mapping[Priority, int], waiting: Mapping[Priority, int], background_is_due: bool = False
) -> Mapping[Priority, int]:
    """Return how many pieces of each priority a lane may start now.

    Of a lane with room for two or more, background work never takes the last place (an interactive piece would wait
    for it), and interactive work leaves one to background work that waits or works (it would starve). A lane with one
    place serves interactive work first, unless background work is due.
    """
    free = max(0, capacity - sum(busy.values()))
    if capacity < 2:
        its_turn = background_is_due or not waiting[Priority.INTERACTIVE]
        for_background = free if waiting[Priority.BACKGROUND] and its_turn else 0
        return {Priority.INTERACTIVE: free - for_background, Priority.BACKGROUND: for_background}
    left_to_background = 1 if waiting[Priority.BACKGROUND] and not busy[Priority.BACKGROUND] else 0
    return {
        Priority.INTERACTIVE: max(0, free - left_to_background),
        Priority.BACKGROUND: max(0, min(free, capacity - 1 - busy[Priority.BACKGROUND])),
    }


def pick(waiting: Iterable[Waiting], turns: Turns, *, capacity: int, busy: Mapping[Priority, int]) -> Waiting | None:
    """Return the piece of work that a lane starts next, or None. Call again after each start."""
    ordered = in_order(waiting, turns)
    counts = {priority: sum(piece.priority is priority for piece in ordered) for priority in Priority}
    room = places(capacity=capacity, busy=busy, waiting=counts, background_is_due=turns.background_is_due)
    return next((piece for piece in ordered if room[piece.priority] > 0), None)


def admits(*, priority: Priority, capacity: int, reserved: int, waiting: int) -> bool:
    """True when one more job may wait: `reserved` of the `capacity` places are for interactive jobs only."""
    room = capacity if priority is Priority.INTERACTIVE else capacity - reserved
    return waiting < room
