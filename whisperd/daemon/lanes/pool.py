"""A pool of helpers that each work on one thing at a time. Knows no jobs: tasks in, answers or losses out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whisperd.daemon.config import Config
from whisperd.daemon.helpers.helper import ExitReason, Helper
from whisperd.daemon.loop import Loop, Timer
from whisperd.protocol.errors import ErrorCode
from whisperd.protocol.helper_messages import Cancel, Failed, Heartbeat, HelperMessage, Progress
from whisperd.protocol.jobs import Priority

log = logging.getLogger("whisperd.lanes")

_MAX_FAILED_STARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """How a task lost its helper. `began` is False where the helper never came up: that is not the task's fault."""

    reason: str
    began: bool
    hung: bool  # it made no progress, and was killed for it


@dataclass(slots=True, kw_only=True)
class Task:
    """One piece of work for a pool. Exactly one of `done` and `lost` is called, in the end.

    `done` gets the helper's answer (a cancelled task: `Failed` with `cancelled`), `lost` how the helper went.
    """

    run: int
    generation: int
    priority: Priority
    message: HelperMessage
    descriptors: Sequence[int] = ()
    progressed: Callable[[Progress], None] = lambda progress: None
    done: Callable[[HelperMessage], None]
    lost: Callable[[Loss], None]


@dataclass(eq=False, slots=True)
class _Worker:
    helper: Helper
    task: Task | None = None
    cancelled: bool = False
    hung: bool = False
    spent: bool = False  # it has done its one task
    overdue: Timer | None = field(default=None)


class Pool:
    """Up to `size` helpers of one role, started when needed, the first one ahead of time.

    A task that shows no progress for `silent_s` loses its helper. `freed` is called whenever a place became free.
    With `address` the helpers are instances behind that socket of systemd's, and each does one task and goes.
    """

    def __init__(
        self,
        loop: Loop,
        config: Config,
        *,
        role: str,
        module: str,
        size: int,
        silent_s: float,
        settings: Mapping[str, Any],
        env: Mapping[str, str],
        freed: Callable[[], None],
        address: Path | None = None,
    ) -> None:
        self._loop, self._config = loop, config
        self._role, self._module, self._size, self._silent_s = role, module, size, silent_s
        self._settings, self._env, self._freed, self._address = settings, env, freed, address
        if address is not None:  # else the command line says it
            self._settings = {**settings, "log_level": config.log_level}
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._stopping = False
        self.left: Callable[[], None] = lambda: None  # a helper has gone while all stops
        self.problem: str | None = None
        self.gauges: dict[str, Any] = {}  # as the last helper that spoke gave them
        self._curious: list[Callable[[], None]] = []

    @property
    def size(self) -> int:
        """How many tasks can be worked on at once: none while helpers do not even start, or when all stops."""
        return 0 if self.problem or self._stopping else self._size

    @property
    def busy(self) -> dict[Priority, int]:
        """How many tasks are being worked on, by priority."""
        counts = dict.fromkeys(Priority, 0)
        for worker in self._workers:
            if worker.task is not None:
                counts[worker.task.priority] += 1
        return counts

    @property
    def helpers(self) -> list[Helper]:
        """The helper processes that live."""
        return [worker.helper for worker in self._workers]

    def warm_up(self) -> None:
        """Start one helper ahead of the first task."""
        if not self._workers and not self._stopping:
            self._spawn()

    def when_known(self, then: Callable[[], None]) -> None:
        """Call `then` once a helper has told its `gauges`, starting one if there is none.

        At once where that is known, or once a helper has ended instead. One that never tells: the caller has a limit.
        """
        if self.gauges or not self.size:
            then()
            return
        self._curious.append(then)
        self.warm_up()

    def run(self, task: Task) -> None:
        """Give a task to a free helper, or to a new one. The caller has seen a free place."""
        worker = next((worker for worker in self._workers if worker.task is None and worker.helper.alive), None)
        try:
            if worker is None:
                worker = self._spawn()
            worker.helper.send(task.message, task.descriptors)
        except OSError as error:  # no descriptor is left
            self._rest(f"it could not be given work: {error}")
            loss = Loss(reason=str(error), began=False, hung=False)
            self._loop.call_soon(lambda: task.lost(loss))
            return
        worker.task, worker.cancelled = task, False
        self._expect_progress(worker)

    def feed(self, run: int, message: HelperMessage) -> None:
        """Send more to the helper that works on a run."""
        for worker in self._workers:
            if worker.task is not None and worker.task.run == run and not worker.cancelled:
                worker.helper.send(message)

    def cancel(self, run: int) -> None:
        """End the work on a run; its helper is replaced if it does not give up within the grace."""
        for worker in self._workers:
            if worker.task is not None and worker.task.run == run and not worker.cancelled:
                worker.cancelled = True
                worker.helper.send(Cancel(run=run, generation=worker.task.generation))
                self._set_timer(worker, self._config.cancel_grace_s, "did not give up a cancelled task")

    def dismiss(self) -> None:
        """End the helpers that have nothing to do; the next task starts one."""
        for worker in [worker for worker in self._workers if worker.task is None]:
            self._workers.remove(worker)
            worker.helper.close()

    def stop(self) -> None:
        """End all helpers; their tasks are lost without a call."""
        self._stopping = True
        for worker in self._workers:
            worker.task = None
            self._clear_timer(worker)
            worker.helper.close()

    def _spawn(self) -> _Worker:
        helper = Helper(
            self._loop,
            role=self._role,
            module=self._module,
            settings=self._settings,
            nice=self._config.helper_nice,
            log_level=self._config.log_level,
            env=self._env,
            on_message=self._on_message,
            on_exit=self._on_exit,
            heartbeat_timeout_s=self._config.heartbeat_timeout_s,
            address=self._address,
        )
        worker = _Worker(helper)
        self._workers.append(worker)
        return worker

    def _expect_progress(self, worker: _Worker) -> None:
        self._set_timer(worker, self._silent_s, f"made no progress for {self._silent_s:g} s")

    def _set_timer(self, worker: _Worker, delay_s: float, reason: str) -> None:
        def late() -> None:
            worker.hung = True
            worker.helper.kill(reason)

        self._clear_timer(worker)
        worker.overdue = self._loop.call_later(delay_s, late)

    def _clear_timer(self, worker: _Worker) -> None:
        if worker.overdue is not None:
            worker.overdue.cancel()
            worker.overdue = None

    def _worker(self, helper: Helper) -> _Worker | None:
        return next((worker for worker in self._workers if worker.helper is helper), None)

    def _on_message(self, helper: Helper, message: HelperMessage) -> None:
        self._failed_starts = 0
        worker = self._worker(helper)
        if isinstance(message, Heartbeat):
            if message.gauges:  # one that has just begun does not know them yet
                self.gauges = message.gauges
                self._satisfy_curious()
                if worker is not None and worker.task is None:
                    self._release(worker)
            return
        if worker is None or worker.task is None:
            return
        task = worker.task
        if (getattr(message, "run", None), getattr(message, "generation", None)) != (task.run, task.generation):
            return  # a late word about work that is over
        if isinstance(message, Progress):
            if not worker.cancelled:
                self._expect_progress(worker)
                task.progressed(message)
            return
        worker.task = None
        self._clear_timer(worker)
        self._release(worker)
        task.done(message)
        self._freed()

    def _release(self, worker: _Worker) -> None:
        """A helper without work: one of ours waits for more, an instance of a unit goes."""
        if self._address is not None:
            worker.spent = True
            worker.helper.close()

    def _on_exit(self, helper: Helper, reason: ExitReason) -> None:
        worker = self._worker(helper)
        if worker is None:
            return
        self._workers.remove(worker)
        self._clear_timer(worker)
        if self._stopping:
            self.left()
            return
        self._satisfy_curious()
        if worker.spent:
            return
        if not reason.ready:
            self._failed_start(reason.reason)
        task = worker.task
        if task is not None and worker.cancelled:
            task.done(Failed(run=task.run, generation=task.generation, code=ErrorCode.CANCELLED, message="cancelled"))
        elif task is not None:
            log.warning("helper lost role=%s run=%d reason=%s", self._role, task.run, reason.reason)
            task.lost(Loss(reason=reason.reason, began=reason.ready, hung=worker.hung))
        self._freed()

    def _satisfy_curious(self) -> None:
        curious, self._curious = self._curious, []
        for then in curious:
            then()

    def _failed_start(self, reason: str) -> None:
        """Helpers that die before their first word would be started for ever: rest, then try one."""
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS and not self.problem:
            self._rest(f"it does not start ({reason})")

    def _rest(self, reason: str) -> None:
        self.problem = f"the {self._role} helper: {reason}; the log says more; trying again"
        log.error("helpers rest role=%s reason=%s", self._role, reason)
        self._loop.call_later(self._config.helper_backoff_max_s, self._try_again)

    def _try_again(self) -> None:
        self.problem, self._failed_starts = None, _MAX_FAILED_STARTS - 1
        self.warm_up()
        self._freed()
