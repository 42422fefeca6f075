"""What the helpers that work on one thing at a time do alike: take it, answer it, look out for `Cancel` meanwhile."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import (
    Cancel,
    CopyIn,
    Decode,
    Failed,
    Fetch,
    FetchWeights,
    HelperMessage,
    Progress,
    UploadBegin,
)
from whisperd.protocol.helpers import HelperLink

_CHECK_S = 0.05  # how often the inbox is looked at: well under the 2 s in which a Cancel must be answered
_PROGRESS_S = 0.3

Order = CopyIn | Decode | Fetch | FetchWeights | UploadBegin
# Gets the task, its order and the descriptors that came with it.
Perform = Callable[["Task", Any, list[int]], HelperMessage]
log = logging.getLogger("whisperd.helper")


class Task:
    """One order at work: how it tells its progress and hears that it is no longer wanted."""

    def __init__(self, link: HelperLink, order: Order, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._order = order
        self._clock = clock
        self._next_check_s = 0.0
        self._next_progress_s = clock() + _PROGRESS_S

    def checkpoint(self, done: float, total: float) -> None:
        """Call this often, at least between any two pieces of work that may take a while; it costs next to nothing.

        Raises `WhisperdError` (`cancelled`) once the daemon has taken the order back.
        """
        now_s = self._clock()
        if now_s < self._next_check_s:
            return
        self._next_check_s = now_s + _CHECK_S
        self._link.step()
        while message := self._link.poll():
            # A Cancel for an order that ended before it arrived is late and means nothing.
            if isinstance(message, Cancel) and (message.run, message.generation) == self._name:
                raise WhisperdError(ErrorCode.CANCELLED, "cancelled")
        if now_s >= self._next_progress_s:
            self._next_progress_s = now_s + _PROGRESS_S
            self._link.send(
                Progress(run=self._order.run, generation=self._order.generation, done=float(done), total=float(total))
            )

    @property
    def _name(self) -> tuple[int, int]:
        return self._order.run, self._order.generation


def serve(link: HelperLink, performers: Mapping[type[Any], Perform]) -> NoReturn:
    """Answer orders for ever, each kind by its performer (the link ends the process with its daemon).

    A performer returns the answer or raises `WhisperdError`, which becomes `Failed`; the descriptors are closed here.
    """
    while True:
        message, descriptors = link.next()
        try:
            if isinstance(message, Order) and type(message) in performers:  # else: a Cancel that came too late
                link.send(_answer(Task(link, message), message, descriptors, performers[type(message)]))
        finally:
            for fd in descriptors:
                os.close(fd)


def _answer(task: Task, order: Order, descriptors: list[int], perform: Perform) -> HelperMessage:
    try:
        return perform(task, order, descriptors)
    except WhisperdError as error:
        return Failed(run=order.run, generation=order.generation, code=error.code, message=error.message)
    except MemoryError:
        # Not the order's fault, and every further one would fail likewise: end, and be replaced.
        log.error("run=%d no memory is left to this process: it ends", order.run)
        os._exit(1)
    except Exception as error:
        log.exception("run=%d an order failed in a way nobody thought of", order.run)
        message = f"{type(error).__name__}: {error}; the daemon's log has more"
        return Failed(run=order.run, generation=order.generation, code=ErrorCode.INTERNAL, message=message)
