"""Threads that do the heavy work one piece at a time, interactive runs first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from whisperd.model.threads import start_thread
from whisperd.protocol.errors import ErrorCode, WhisperdError

T = TypeVar("T")


class Turn:
    """What a run's pieces of work are served by. Both marks may change at any time, from any thread.

    It also adds up what the run has had: windows, tokens.
    """

    __slots__ = ("_lock", "cancelled", "interactive", "tokens", "windows")

    def __init__(self, *, interactive: bool = False) -> None:
        self.interactive = interactive
        self.cancelled = False
        self.windows = 0
        self.tokens = 0
        self._lock = threading.Lock()  # a run in mode fast has several threads

    def had_window(self, tokens: int) -> None:
        """Count a window that was decoded for the run."""
        with self._lock:
            self.windows += 1
            self.tokens += tokens

    def check(self) -> None:
        """Raise `WhisperdError` (`cancelled`) once the run has been cancelled."""
        if self.cancelled:
            raise WhisperdError(ErrorCode.CANCELLED, "cancelled")


class Places:
    """At most `most` background pieces at a time hold what takes memory; interactive ones wait for no place."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, turn: Turn) -> Iterator[None]:
        """Hold a place, once there is one. Raises `WhisperdError` (`cancelled`) where the run is cancelled first."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken < self._most or turn.interactive or turn.cancelled)
            turn.check()
            self._taken += 1
        try:
            yield
        finally:
            with self._changed:
                self._taken -= 1
                self._changed.notify_all()

    def wake(self) -> None:
        """Make waiting runs look at their marks."""
        with self._changed:
            self._changed.notify_all()


class _Piece(Generic[T]):
    __slots__ = ("done", "error", "result", "turn", "work")

    def __init__(self, turn: Turn, work: Callable[[], T]) -> None:
        self.turn = turn
        self.work = work
        self.done = False
        self.result: T | None = None
        self.error: BaseException | None = None


# Where nobody says otherwise: pieces of interactive runs that are served in a row while others wait. Background work
# crawls under a stream of interactive work, but it moves.
INTERACTIVE_IN_A_ROW = 8


class Worker:
    """A thread that runs pieces of work in order of arrival, those of interactive runs before (nearly) all others.

    A worker and not a lock around the work: two threads in numba's parallel code abort the process, and job threads
    beside each other would want more cores than there are. It computes on one, see `whisperd.model.threads`; so does
    each of `threads`, where a piece may be worked on beside another.
    A run waits for its piece before it brings the next one, so runs of one priority take turns by themselves.
    """

    def __init__(self, name: str, *, interactive_in_a_row: int = INTERACTIVE_IN_A_ROW, threads: int = 1) -> None:
        self._changed = threading.Condition()
        self._waiting: list[_Piece[Any]] = []
        self._interactive_in_a_row, self._most_in_a_row = 0, interactive_in_a_row
        for _ in range(threads):
            start_thread(self._serve, name=name)

    def call(self, turn: Turn, work: Callable[[], T]) -> T:
        """Return what `work` returns, or raise what it raises.

        Raises `WhisperdError` (`cancelled`) at once when the run is cancelled while its work has not begun. Work that
        has begun is waited for: it looks out for the mark itself (`Turn.check`).
        """
        piece = self._add(turn, work)
        with self._changed:
            self._changed.wait_for(lambda: piece.done or (turn.cancelled and piece in self._waiting))
            if not piece.done:
                self._waiting.remove(piece)
                turn.check()
        if piece.error is not None:
            raise piece.error
        return piece.result  # type: ignore[return-value]

    def begin(self, work: Callable[[], object]) -> None:
        """Have `work` done and do not wait for it; what it returns or raises is lost."""
        self._add(Turn(), work)

    def wake(self) -> None:
        """Make waiting runs look at their marks."""
        with self._changed:
            self._changed.notify_all()

    def _add(self, turn: Turn, work: Callable[[], T]) -> _Piece[T]:
        piece = _Piece(turn, work)
        with self._changed:
            self._waiting.append(piece)
            self._changed.notify_all()
        return piece

    def _take(self) -> _Piece[Any]:
        interactive = [piece for piece in self._waiting if piece.turn.interactive]
        others = [piece for piece in self._waiting if not piece.turn.interactive]
        preferred = others if self._interactive_in_a_row >= self._most_in_a_row else interactive
        piece = (preferred or self._waiting)[0]
        self._interactive_in_a_row = self._interactive_in_a_row + 1 if piece.turn.interactive and others else 0
        self._waiting.remove(piece)
        return piece

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                piece = self._take()
            try:
                piece.turn.check()
                piece.result = piece.work()
            except BaseException as error:  # it is raised again where the piece came from
                piece.error = error
            with self._changed:
                piece.done = True
                self._changed.notify_all()
            del piece  # an idle worker holds on to no tensors
