"""What the lanes that have one helper work on one run do alike: choose, hand out, and commit what became of it."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from whisperd.daemon.lanes.pool import Loss, Pool, Task
from whisperd.daemon.lanes.recording import record
from whisperd.daemon.loop import Loop
from whisperd.daemon.scheduler import Turns, pick
from whisperd.daemon.state.board import LiveRun
from whisperd.daemon.state.ledger import Ledger, StoreCall
from whisperd.daemon.state.line import Line
from whisperd.daemon.store.rows import Change
from whisperd.protocol.helper_messages import HelperMessage, Progress
from whisperd.protocol.jobs import Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class Active:
    """A run of which the lane has taken charge; it may have ended since, and then the board does not know it."""

    live: LiveRun
    priority: Priority


class RunLane(ABC):
    """Works on the runs of a line, by priority and in turns. What starts and ends one, the heirs say."""

    def __init__(
        self, make_pool: Callable[[Callable[[], None]], Pool], ledger: Ledger, loop: Loop, line: Line, turns: Turns
    ) -> None:
        self.pool = make_pool(self.pump)
        self._ledger, self._loop, self._line, self._turns = ledger, loop, line, turns
        self._generations = itertools.count(1)
        self._active: dict[int, Active] = {}  # until the commit of what became of it, so that nobody starts it again
        self.failed = 0

    @property
    def waiting(self) -> int:
        """Runs that wait for this lane, whatever they wait for."""
        return len(self._line) - sum(run_id in self._line for run_id in self._active)

    def changed(self, change: Change) -> None:
        """Look at what a commit changed: give up runs that ended, start what came."""
        for run in change.runs:
            if run.state.ended and run.id in self._active:
                self.pool.cancel(run.id)
        self.pump()

    def stop(self) -> None:
        """End the helpers; their runs are begun anew after the next start."""
        self.pool.stop()

    def pump(self) -> None:
        """Start what may start. Nobody who waits is looked at while no place is free."""
        while len(self._active) < self.pool.size and (priorities := self._begins()):
            busy = dict.fromkeys(Priority, 0) | Counter(active.priority for active in self._active.values())
            heads = self._line.heads(priorities, lambda run_id: run_id not in self._active and self._may_start(run_id))
            chosen = pick(heads, self._turns, capacity=self.pool.size, busy=busy)
            if chosen is None:
                return
            self._turns.serve(chosen.priority, chosen.uid)
            active = Active(live=self._ledger.board.runs[chosen.id], priority=chosen.priority)
            self._active[chosen.id] = active
            self._start(active)

    # -- what a lane decides ---------------------------------------------------------------------------------------

    @abstractmethod
    def _begins(self) -> Sequence[Priority]:
        """Return of which priorities runs are begun now."""

    @abstractmethod
    def _may_start(self, run_id: int) -> bool:
        """Return whether this run may be begun."""

    @abstractmethod
    def _start(self, active: Active) -> None:
        """Begin a run: `_hand_out` it, now or once its start is committed."""

    @abstractmethod
    def _doing(self, progress: Progress) -> str:
        """Return in a few words, for people, how far a helper is."""

    @abstractmethod
    def _answered(self, live: LiveRun, message: HelperMessage) -> None:
        """Take a helper's last word on a run: `_settle` it, or `_drop` it."""

    @abstractmethod
    def _lost(self, live: LiveRun, loss: Loss) -> None:
        """Take the end of a helper: `_settle` its run."""

    # -- what they use for it --------------------------------------------------------------------------------------

    def _hand_out(self, active: Active, order: Callable[[int], HelperMessage]) -> None:
        """Give a run to a helper; `order` makes the message, of its generation."""
        live, generation = active.live, next(self._generations)
        self.pool.run(
            Task(
                run=live.row.id,
                generation=generation,
                priority=active.priority,
                message=order(generation),
                progressed=lambda progress: self._tell(live.row.id, self._doing(progress)),
                done=lambda message: self._answered(live, message),
                lost=lambda loss: self._lost(live, loss),
            )
        )

    def _tell(self, run_id: int, phase: str) -> None:
        """Tell those who follow a run what it does, or waits for."""
        live = self._ledger.board.runs.get(run_id)
        if live is not None:
            live.phase = phase
            self._ledger.teller.tell(run_id)

    def _settle(self, run_id: int, call: StoreCall[Change], phase: str) -> None:
        """Commit what became of a run; until then it stays active. A full disk only delays that."""

        def then(change: Change) -> None:
            self._active.pop(run_id, None)
            self._tell(run_id, phase)
            self.pump()

        record(self._loop, self._ledger, run_id, call, then)

    def _drop(self, run_id: int) -> None:
        """Let go of a run of which there is nothing to commit."""
        self._active.pop(run_id, None)
        self.pump()
