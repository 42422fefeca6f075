"""The one thread that owns the device: what is encoded, begun and stepped next, and for whom."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from whisper.decoding import DecodingTask

from whisperd.model.batch.encoder import Encoder
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.pieces import Pieces, at_once
from whisperd.model.batch.rows import LiveRows
from whisperd.model.batch.search import Search
from whisperd.model.batch.windows import Window
from whisperd.model.memory import is_out_of_memory
from whisperd.model.threads import start_thread
from whisperd.model.worker import INTERACTIVE_IN_A_ROW, Turn
from whisperd.protocol.errors import ErrorCode, WhisperdError

log = logging.getLogger("whisperd.model")

# The process ends with this when what it has on the device is lost: a new one begins all of it anew.
EXIT_BROKEN = 70
_WELL_WINDOWS = 200  # a minute's work of a GPU: to run out again costs a step, and what was cut off begins anew


@dataclass(slots=True, kw_only=True)
class Counters:
    """Gauges since the process began; written by the batcher's thread alone."""

    windows: int = 0  # decoded
    reused: int = 0  # not decoded, because their run had the same window before (written by job threads)
    tokens: int = 0  # of all rows: beams and samples count each
    encoded: int = 0
    steps: int = 0
    window_steps: int = 0  # windows that stepped, added up
    place_steps: int = 0  # likewise the background windows that might have stepped
    busy_s: float = 0.0


class Request:
    """A job's thread waits for it: a window to be decoded, or (without a task) features to be used once, in pieces.

    `done` is set when `outcome`, or `error`, is there.
    """

    def __init__(
        self,
        turn: Turn,
        window: Window,
        *,
        task: DecodingTask | None = None,
        search: Callable[[], Search] | None = None,
        use: Callable[[Tensor], Pieces[Any]] | None = None,
        speech_until: int = 0,
    ) -> None:
        self.turn = turn
        self.window = window
        self.task = task
        self.search = search
        self.use = use
        self.speech_until = speech_until  # as `LiveRows.begin` has it
        self.done = threading.Event()
        self.outcome: Any = None
        self.error: BaseException | None = None
        self.pieces: Pieces[Any] | None = None  # what is left of its work, once that was begun
        self.passed_over = 0  # windows that came later and began earlier, in the background

    @property
    def rows(self) -> int:
        """How many rows it takes."""
        return 0 if self.task is None else self.task.n_group

    def settle(self, outcome: Any = None, error: BaseException | None = None) -> None:
        """End the waiting."""
        self.pieces = None
        self.outcome, self.error = outcome, error
        self.done.set()


class Limits:
    """How many windows and rows of background work may be live; interactive work may go one window beyond.

    Memory is shared with programs that come and go: what was halved for want of it is tried again later.
    """

    def __init__(self, *, windows: int, rows: int) -> None:
        self.windows, self.rows = self._most = windows, rows
        self._well = 0  # windows since memory ran out

    def halve(self) -> None:
        """Take half as much, for memory ran out."""
        self._well = 0
        if (self.windows, self.rows) != (1, 1):
            self.windows, self.rows = max(1, self.windows // 2), max(1, self.rows // 2)
            log.warning("model: out of memory, less is decoded at once windows=%d rows=%d", self.windows, self.rows)

    def window_ended(self) -> None:
        """Take twice as much again once enough windows have ended well, but never more than at first."""
        self._well += 1
        if self._well >= _WELL_WINDOWS and (self.windows, self.rows) != self._most:
            self.windows, self.rows = min(self.windows * 2, self._most[0]), min(self.rows * 2, self._most[1])
            self._well = 0
            log.info("model: more is decoded at once again windows=%d rows=%d", self.windows, self.rows)


class Batcher:
    """Takes requests from any thread and works on all of them at once. `on_step` is called between any two pieces.

    It computes on as many cores as the thread that makes it. `leave` ends the process with a status, when the batcher's
    own work fails: nobody would be served any more.
    """

    def __init__(
        self,
        encoder: Encoder,
        live: LiveRows[Request],
        kernels: Kernels,
        limits: Limits,
        *,
        on_step: Callable[[], None],
        interactive_in_a_row: int = INTERACTIVE_IN_A_ROW,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.counters = Counters()
        self._encoder, self._live, self._kernels, self._limits = encoder, live, kernels, limits
        self._on_step, self._leave = on_step, leave
        self._changed = threading.Condition()
        self._waiting: list[Request] = []
        self._most_in_a_row = interactive_in_a_row
        # Of interactive work while background work waits: windows since one of that began, pieces since one of that.
        self._windows_in_a_row = self._pieces_in_a_row = 0
        start_thread(self._serve, name="batcher", cores=torch.get_num_threads())

    def call(self, request: Request) -> Any:
        """Return the request's outcome once it is there.

        Raises what its work raised, so torch's own error (`is_out_of_memory`) where it does not fit even alone; and
        `WhisperdError` (`cancelled`) at the next step once its run is cancelled.
        """
        with self._changed:
            self._waiting.append(request)
            self._changed.notify()
        request.done.wait()
        if request.error is not None:
            raise request.error
        return request.outcome

    def _serve(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._live.count)
                began = time.monotonic()
                try:
                    self._tick()
                except BaseException as error:  # what a request's own work raises does not come here
                    # Windows may be live that should not be, or half gone. Those who still wait did nothing wrong: they
                    # are told nothing, and begin anew in another process.
                    log.critical("model: the batcher failed, leaving", exc_info=error)
                    self._leave(EXIT_BROKEN)
                    return
                self.counters.busy_s += time.monotonic() - began

    def _tick(self) -> None:
        self._on_step()
        self._drop_cancelled()
        request = self._next()
        if request is not None:
            well = self._guarded([request], lambda: self._further(request))
            if well and not self._interactive_is_live():
                return  # a step of more rows costs little more: first take in all that may come in
        if self._live.count:
            self._guarded(self._live.owners, self._step)

    # -- what comes next -------------------------------------------------------------------------------------------

    def _next(self) -> Request | None:
        """Return the waiting request to bring further, or None when none may begin."""
        with self._changed:
            waiting = list(self._waiting)
        interactive = [request for request in waiting if request.turn.interactive]
        background = self._in_turn([request for request in waiting if not request.turn.interactive])
        due = min(self._windows_in_a_row, self._pieces_in_a_row) >= self._most_in_a_row and self._must_move(background)
        if due:
            order = background
        elif interactive or (self._interactive_is_live() and not self._kernels.encodes_beside_steps):
            order = interactive
        else:
            order = background
        order.sort(key=lambda request: request.pieces is None)  # what is half done comes first: it holds memory
        if due and order[0].window.features is None:
            return order[0]  # it needs no place yet, and when there is one it need not hold up anybody with that
        return next((request for request in order if self._fits(request)), None)

    def _must_move(self, background: list[Request]) -> bool:
        """Return whether background work stands still unless a piece of it comes first now.

        It crawls under a stream of interactive work, but it moves. While its windows take all its places it does, and
        interactive work need not wait for one of them to end.
        """
        if any(not request.turn.interactive for request in self._live.owners):
            return any(self._fits(request) for request in background)
        return bool(background)

    def _in_turn(self, background: list[Request]) -> list[Request]:
        """Leave out who would pass over somebody whom a batchful of others have passed over.

        A window of many rows seldom fits beside others: the rows that become free from now on are kept for it.
        """
        for place, request in enumerate(background):
            if request.passed_over >= self._limits.windows and not self._fits(request):
                return background[: place + 1] + [later for later in background[place + 1 :] if later.task is None]
        return background

    def _fits(self, request: Request) -> bool:
        if request.task is None or not self._live.count or request in self._live.beginning:
            return True
        windows = len(self._live.owners) + len(self._live.beginning) + 1
        if request.turn.interactive:
            return windows <= self._limits.windows + 1
        rows = self._live.count + sum(each.rows for each in self._live.beginning) + request.rows
        return windows <= self._limits.windows and rows <= self._limits.rows

    def _interactive_is_live(self) -> bool:
        return any(request.turn.interactive for request in self._live.owners)

    # -- pieces of work --------------------------------------------------------------------------------------------

    def _further(self, request: Request) -> None:
        """Compute one piece more of it; after the last one it is live, or answered."""
        self._pieces_in_a_row = self._pieces_in_a_row + 1 if request.turn.interactive else 0
        if request.pieces is None:
            request.pieces = self._pieces(request)
        try:
            next(request.pieces)
            return
        except StopIteration as end:
            request.pieces, outcome = None, end.value
        with self._changed:
            others = any(not each.turn.interactive for each in self._waiting)
            place = self._waiting.index(request)
            earlier = self._waiting[:place]
            del self._waiting[place]
        self._windows_in_a_row = self._windows_in_a_row + 1 if request.turn.interactive and others else 0
        if request.task is None:
            request.settle(outcome)
        elif not request.turn.interactive:
            for each in earlier:
                each.passed_over += 1

    def _pieces(self, request: Request) -> Pieces[Any]:
        """Encode the window, a block a piece; then begin or use it, a layer a piece."""
        window = request.window
        if window.features is None:
            assert window.mel is not None, "a window has its mel until it has features"
            window.features = yield from self._encoder.encode(window.mel)
            window.mel = None
            self.counters.encoded += 1
            yield
        if request.use is not None:
            reading = request.use(window.features)
        else:
            assert request.task is not None
            assert request.search is not None
            reading = self._live.begin_in_pieces(
                request, request.task, request.search(), window.features, speech_until=request.speech_until
            )
        # All layers together are milliseconds of a GPU; a step beside each would have the window begin late.
        return at_once(reading) if self._kernels.encodes_beside_steps else (yield from reading)

    def _step(self) -> None:
        counters, live = self.counters, self._live
        ended = live.step()
        counters.place_steps += (live.steps - counters.steps) * self._limits.windows
        counters.steps, counters.window_steps, counters.tokens = live.steps, live.window_steps, live.tokens
        for request, outcome in ended:
            counters.windows += 1
            self._limits.window_ended()
            request.settle(outcome)

    # -- what goes wrong -------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled = [request for request in self._waiting if request.turn.cancelled]
        cancelled += [request for request in self._live.owners if request.turn.cancelled]
        if cancelled:
            self._give_up(cancelled, WhisperdError(ErrorCode.CANCELLED, "cancelled"))

    def _guarded(self, concerned: list[Request], work: Callable[[], None]) -> bool:
        """Do a piece of work; an error ends the requests that it concerns, want of memory is tried again smaller.

        Returns whether it went well.
        """
        try:
            work()
        except BaseException as error:  # it is raised again where the requests came from
            alone = len({*self._live.owners, *self._live.beginning, *concerned}) == 1
            if is_out_of_memory(error) and not alone:
                for request in concerned:
                    self._wait_again(request)
            else:
                self._give_up(concerned, error)
            if is_out_of_memory(error):
                self._take_less(for_interactive=any(request.turn.interactive for request in concerned))
            return False
        return True

    def _take_less(self, *, for_interactive: bool) -> None:
        """Work on half as many windows at once from now on, and give memory back."""
        if for_interactive and self._limits.windows == 1:
            for request in (*self._live.owners, *self._live.beginning):
                self._wait_again(request)
        self._limits.halve()
        try:
            self._live.shrink(windows=self._limits.windows + 1, rows=self._limits.rows)
        except (RuntimeError, MemoryError) as error:  # a smaller cache is made before the larger one goes
            if not is_out_of_memory(error):
                raise
        self._kernels.give_back()

    def _wait_again(self, request: Request) -> None:
        """Begin a request anew when there is room. It will find the same: what is drawn depends on nothing else."""
        self._live.drop(request)
        request.pieces = None
        with self._changed:
            if request not in self._waiting:
                self._waiting.insert(0, request)

    def _give_up(self, requests: list[Request], error: BaseException) -> None:
        with self._changed:
            self._waiting = [request for request in self._waiting if request not in requests]
        for request in requests:  # all of them first: a device that is lost cannot even drop one
            request.settle(error=error)
        for request in requests:
            self._live.drop(request)
