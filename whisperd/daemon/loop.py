"""The loop: run timers, wait, dispatch. It knows no jobs and no sockets, and it never works.

epoll is used directly and not through `selectors`: a descriptor of which nothing is wanted for the moment (a client
with too many open requests) must still report that its peer is gone, and `selectors` refuses an empty interest.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

log = logging.getLogger("whisperd.loop")

READ, WRITE = 1, 2  # the numbers of selectors.EVENT_READ and EVENT_WRITE
# A client may ask for a wait of decades, and epoll takes no more than 24 days at once.
_LONGEST_WAIT_S = 86_400.0
# How long a turn gives to calls (`call_soon`) before it looks at the descriptors again: a `health` waits no longer,
# however many requests of others are in hand.
_CALLS_S = 0.005


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


FileLike = int | _HasFileno


class Timer:
    """A call at a time. Cancelling it twice, or after it ran, is harmless."""

    __slots__ = ("_fn", "_loop", "when")

    def __init__(self, loop: Loop, when: float, fn: Callable[[], object]) -> None:
        self.when = when
        self._fn: Callable[[], object] | None = fn
        self._loop = loop

    def cancel(self) -> None:
        if self._fn is not None:
            self._fn = None
            self._loop._timer_cancelled()

    def _take(self) -> Callable[[], object] | None:
        fn, self._fn = self._fn, None
        return fn


@dataclass(slots=True, eq=False)
class _Watch:
    """A registered descriptor. Compared by identity: a number may be closed and used again within one turn."""

    callback: Callable[[int], object]
    events: int


class Loop:
    """One thread's event loop. Everything but `call_soon_threadsafe` is for that thread alone.

    An exception in a callback is logged with its traceback, and the loop goes on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.turns = 0  # proof of life for the watchdog
        self._clock = clock
        self._epoll = select.epoll()
        self._watches: dict[int, _Watch] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._timers_cancelled = 0
        self._order = itertools.count()  # timers of the same time run in the order they were made
        self._soon: deque[Callable[[], object]] = deque()
        self._stopping = False
        self._old_handlers: dict[int, Any] = {}
        self._old_wakeup_fd: int | None = None
        self._wakes, self._waker = socket.socketpair()
        self._wakes.setblocking(False)
        self._waker.setblocking(False)
        self.register(self._wakes, READ, self._drain_wakes)

    def time(self) -> float:
        """Return the loop's clock: seconds that only grow."""
        return self._clock()

    # --- descriptors ---

    def register(self, file: FileLike, events: int, callback: Callable[[int], object]) -> None:
        """Call `callback(events)` whenever `file` is ready. A hang-up or an error counts as `READ | WRITE`.

        `events` may be 0: then only a hang-up is reported. Raises `KeyError` when it is registered already.
        """
        fd = _fileno(file)
        if fd in self._watches:
            raise KeyError(f"descriptor {fd} is registered already")
        self._epoll.register(fd, _to_epoll(events))
        self._watches[fd] = _Watch(callback, events)

    def modify(self, file: FileLike, events: int) -> None:
        """Wait for other events of a registered descriptor."""
        fd = _fileno(file)
        watch = self._watches[fd]
        if watch.events != events:
            self._epoll.modify(fd, _to_epoll(events))
            watch.events = events

    def unregister(self, file: FileLike) -> None:
        """Forget a descriptor; call it before closing. One that is not registered is passed over."""
        fd = _fileno(file)
        if self._watches.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # it was closed too early: the kernel has forgotten it already
                self._epoll.unregister(fd)

    # --- calls ---

    def call_at(self, when: float, fn: Callable[[], object]) -> Timer:
        """Call `fn` when the clock shows `when`."""
        timer = Timer(self, when, fn)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def call_later(self, delay_s: float, fn: Callable[[], object]) -> Timer:
        """Call `fn` in `delay_s` seconds."""
        return self.call_at(self._clock() + delay_s, fn)

    def call_soon(self, fn: Callable[[], object]) -> None:
        """Call `fn` after the calls asked for before it: in the next turn, or in a later one when those take long."""
        self._soon.append(fn)

    def call_soon_threadsafe(self, fn: Callable[[], object]) -> None:
        """`call_soon` from any thread; wakes the loop. Calls of one thread run in its order."""
        self._soon.append(fn)
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nobody is left to call it
            self._waker.send(b"\0")

    def on_signal(self, signum: int, fn: Callable[[], object]) -> None:
        """Call `fn` in the loop when the process gets the signal. Main thread only."""

        # The wakeup descriptor ends the wait; the handler, which Python runs right after, says for what.
        # A full socket then loses no signal.
        def handler(number: int, frame: FrameType | None) -> None:
            self._soon.append(fn)

        if self._old_wakeup_fd is None:
            self._old_wakeup_fd = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        old = signal.signal(signum, handler)
        self._old_handlers.setdefault(signum, old)

    # --- running ---

    def run(self) -> None:
        """Run until `stop` is called."""
        while not self._stopping:
            self._run_due()
            ready = [(watch, fd, event) for fd, event in self._wait() if (watch := self._watches.get(fd))]
            for watch, fd, event in ready:
                if self._watches.get(fd) is watch:  # an earlier callback of this turn may have ended it
                    self._call(watch.callback, _from_epoll(event))
            self.turns += 1
        self._stopping = False

    def stop(self) -> None:
        """End `run` once this turn is over."""
        self._stopping = True

    def close(self) -> None:
        """Give back descriptors and signal handlers. The loop cannot be used any more."""
        for signum, handler in self._old_handlers.items():
            signal.signal(signum, handler)
        if self._old_wakeup_fd is not None:
            signal.set_wakeup_fd(self._old_wakeup_fd)
        self._epoll.close()
        self._wakes.close()
        self._waker.close()

    def _wait(self) -> list[tuple[int, int]]:
        timeout_s: float | None = None
        if self._soon or self._stopping:
            timeout_s = 0
        elif self._timers:
            timeout_s = min(max(0.0, self._timers[0][0] - self._clock()), _LONGEST_WAIT_S)
        # epoll rounds up to milliseconds: it never returns just before a timer and spins.
        return self._epoll.poll(timeout_s)

    def _run_due(self) -> None:
        # Only what is there now: calls that ask for further calls must not keep descriptors waiting.
        now, newest = self._clock(), next(self._order)
        while self._timers and self._timers[0][0] <= now and self._timers[0][1] < newest:
            fn = heapq.heappop(self._timers)[2]._take()
            if fn is None:
                self._timers_cancelled -= 1
            else:
                self._call(fn)
        for _ in range(len(self._soon)):
            self._call(self._soon.popleft())
            if self._clock() - now > _CALLS_S:
                break

    def _call(self, fn: Callable[..., object], *arguments: Any) -> None:
        try:
            fn(*arguments)
        except Exception:
            log.exception("a callback failed")

    def _timer_cancelled(self) -> None:
        # A cancelled timer stays in the heap until its time has come; many long ones must not pile up.
        self._timers_cancelled += 1
        if self._timers_cancelled > 64 and self._timers_cancelled > len(self._timers) // 2:
            self._timers = [entry for entry in self._timers if entry[2]._fn is not None]
            heapq.heapify(self._timers)
            self._timers_cancelled = 0

    def _drain_wakes(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakes.recv(4096)


def _fileno(file: FileLike) -> int:
    return file if isinstance(file, int) else file.fileno()


def _to_epoll(events: int) -> int:
    return (select.EPOLLIN if events & READ else 0) | (select.EPOLLOUT if events & WRITE else 0)


def _from_epoll(event: int) -> int:
    return (READ if event & ~select.EPOLLOUT else 0) | (WRITE if event & ~select.EPOLLIN else 0)
