"""Keys under way: submits that have a waiting place and are no jobs yet, and retries that wait for their ends.

A client that has lost its connection sends its submit again, also while the first is still copying. The two become one
job, so the second must not be refused for the place, or the room on the disk, that the first has taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

_Key = tuple[int, str]  # whose, and which


class UnderWay:
    """The keys of admitted submits. None, for a submit without a key, is under way for nobody."""

    def __init__(self) -> None:
        self._admitted: Counter[_Key] = Counter()
        self._waiting: dict[_Key, dict[Callable[[], None], None]] = {}  # in their order

    def began(self, uid: int, key: str | None) -> None:
        """A submit of this key has been admitted. Its end is to be told, once."""
        if key is not None:
            self._admitted[uid, key] += 1

    def ended(self, uid: int, key: str | None) -> None:
        """It has become a job, or could not, and has given its place back: who waits may look again."""
        if key is None:
            return
        self._admitted[uid, key] -= 1
        if not self._admitted[uid, key]:
            del self._admitted[uid, key]
        for look_again in self._waiting.pop((uid, key), {}):
            look_again()

    def maybe_wait(self, uid: int, key: str | None, look_again: Callable[[], None]) -> bool:
        """Call `look_again` when a submit of this key ends; return False where none is under way."""
        if key is None or (uid, key) not in self._admitted:
            return False
        self._waiting.setdefault((uid, key), {})[look_again] = None
        return True

    def stop_waiting(self, uid: int, key: str | None, look_again: Callable[[], None]) -> None:
        """Forget one that perhaps waits: it is over before what it waited for."""
        if key is not None and (waiting := self._waiting.get((uid, key))):
            waiting.pop(look_again, None)
