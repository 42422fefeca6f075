"""The copy lane: a submitted recording becomes a durable file in the spool, then a job.

Two of them: one whose helpers read descriptors, one whose helpers are fed what clients upload. Apart, because an upload
takes as long as its client likes, and must not keep files waiting that are on this machine already.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from whisperd.daemon.lanes.pool import Loss, Pool, Task
from whisperd.daemon.loop import Loop, Timer
from whisperd.daemon.scheduler import Turns, Waiting, pick
from whisperd.daemon.state.spool import Spool
from whisperd.daemon.wire.descriptors import close_apart
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import (
    Copied,
    CopyIn,
    Failed,
    HelperMessage,
    Progress,
    UploadBegin,
    UploadData,
)
from whisperd.protocol.jobs import Priority

_MAX_LOSSES = 3  # helpers that a copy may lose; a promise, as for decoders and the model, so no setting


@dataclass(eq=False, slots=True, kw_only=True)
class Copy:
    """A copy that waits or runs. It owns `descriptor` until it ends; without one it is an upload, which is fed.

    Ends with one call of `copied` or `refused`.
    """

    uid: int
    priority: Priority
    descriptor: int | None
    folder: str
    keep: bool = True  # False: it is read and hashed, and nothing is kept
    client: int | None  # the connection with which it ends, if it does not outlive its client
    started: Callable[[], None] = lambda: None
    progressed: Callable[[Progress], None] = lambda progress: None
    copied: Callable[[Copied], None]
    refused: Callable[[WhisperdError], None]
    ticket: int = 0
    active: bool = False
    refusal: WhisperdError | None = None  # why it is being given up
    losses: int = 0
    deadline: Timer | None = None

    def close(self) -> None:
        """Give back what it owns."""
        if self.descriptor is not None:
            close_apart([self.descriptor])
        if self.deadline is not None:
            self.deadline.cancel()


class CopyLane:
    """Copies by priority and in turns, at most `per_user` at a time of one user who is not `unlimited`.

    One that has begun has `limit_s` until its end: a file system may give a byte a minute, and so may a client.
    """

    def __init__(
        self,
        make_pool: Callable[[Callable[[], None]], Pool],
        spool: Spool,
        loop: Loop,
        *,
        limit_s: float,
        per_user: int,
        unlimited: Callable[[int], bool],
        turns: Turns,
    ) -> None:
        self.pool = make_pool(self.pump)
        self._spool, self._loop = spool, loop
        self._limit_s = limit_s
        self._per_user = per_user
        self._unlimited = unlimited
        self._turns = turns
        self._tickets = itertools.count(1)
        self._copies: dict[int, Copy] = {}
        self.failed = 0

    @property
    def waiting(self) -> int:
        """Copies that have not begun."""
        return sum(not copy.active for copy in self._copies.values())

    @property
    def crowded(self) -> bool:
        """True when a copy waits for nothing but a helper."""
        return bool(self._ready())

    def add(self, copy: Copy) -> None:
        """Take a copy over."""
        copy.ticket = next(self._tickets)
        self._copies[copy.ticket] = copy
        self.pump()

    def client_left(self, client: int) -> None:
        """Give up the copies that end with a connection: nobody could learn of their jobs any more."""
        for copy in [copy for copy in self._copies.values() if copy.client == client]:
            self.give_up(copy, WhisperdError(ErrorCode.CANCELLED, "the client left before its file was copied"))

    def give_up(self, copy: Copy, error: WhisperdError) -> None:
        """Refuse a copy, once its helper has let go of it."""
        if copy.ticket not in self._copies or copy.refusal is not None:
            return
        copy.refusal = error
        if copy.active:
            self.pool.cancel(copy.ticket)
        else:
            self._refuse(copy, error)

    def feed(self, copy: Copy, data: bytes, *, last: bool) -> None:
        """Hand the next bytes of a started upload to its helper, which answers with progress."""
        self.pool.feed(copy.ticket, UploadData(run=copy.ticket, generation=1, data=data, last=last))

    def stop(self) -> None:
        """Refuse every copy: the daemon stops, and what is not accepted is the client's to submit again."""
        self.pool.stop()
        for copy in list(self._copies.values()):
            self._refuse(
                copy, WhisperdError(ErrorCode.STOPPING, "the daemon is stopping: submit again when it is back")
            )

    def pump(self) -> None:
        """Start what may start."""
        while True:
            ready = self._ready()
            waiting = [Waiting(id=c.ticket, uid=c.uid, priority=c.priority, order=c.ticket) for c in ready]
            chosen = pick(waiting, self._turns, capacity=self.pool.size, busy=self.pool.busy)
            if chosen is None:
                return
            self._start(self._copies[chosen.id])

    def _ready(self) -> list[Copy]:
        active = Counter(copy.uid for copy in self._copies.values() if copy.active)
        return [
            copy
            for copy in self._copies.values()
            if not copy.active and (active[copy.uid] < self._per_user or self._unlimited(copy.uid))
        ]

    def _start(self, copy: Copy) -> None:
        copy.active = True
        self._turns.serve(copy.priority, copy.uid)
        if copy.deadline is None:
            copy.deadline = self._loop.call_later(self._limit_s, lambda: self._late(copy))
        name: dict[str, Any] = {"run": copy.ticket, "generation": 1, "folder": copy.folder}
        self.pool.run(
            Task(
                run=copy.ticket,
                generation=1,
                priority=copy.priority,
                message=UploadBegin(**name) if copy.descriptor is None else CopyIn(**name, keep=copy.keep),
                descriptors=[] if copy.descriptor is None else [copy.descriptor],
                progressed=lambda progress: copy.progressed(progress),
                done=lambda message: self._answered(copy, message),
                lost=lambda loss: self._lost(copy, loss),
            )
        )
        copy.started()

    def _late(self, copy: Copy) -> None:
        message = f"it was not complete after {self._limit_s:g} s (setting copy_limit_s): copy it to a local disk first"
        self.give_up(copy, WhisperdError(ErrorCode.TIMED_OUT, message))

    def _answered(self, copy: Copy, message: HelperMessage) -> None:
        if copy.refusal is not None:  # whatever the answer: it may have crossed the cancel
            self._refuse(copy, copy.refusal)
        elif isinstance(message, Copied):
            del self._copies[copy.ticket]
            copy.close()
            copy.copied(message)
        elif isinstance(message, Failed):
            self._refuse(copy, WhisperdError(message.code, message.message))

    def _lost(self, copy: Copy, loss: Loss) -> None:
        """Copy anew, as the descriptor is still there; not a file whose reading hangs, nor one that kills copiers.

        A copier that did not even come up says nothing of the file, which waits until the pool has one.
        """
        copy.losses += loss.began
        if copy.refusal is not None:
            self._refuse(copy, copy.refusal)
        elif copy.descriptor is None:
            message = f"the process that received it ended ({loss.reason}): upload it again"
            self._refuse(copy, WhisperdError(ErrorCode.WORKER_CRASHED, message))
        elif loss.began and loss.hung:
            message = f"the file could not be read to its end ({loss.reason}): copy it to a local disk and submit that"
            self._refuse(copy, WhisperdError(ErrorCode.TIMED_OUT, message))
        elif copy.losses == _MAX_LOSSES:
            message = f"{copy.losses} copiers ended at this file ({loss.reason}): the daemon's log says how"
            self._refuse(copy, WhisperdError(ErrorCode.WORKER_CRASHED, message))
        else:
            copy.active = False  # the pool asks for work next
            if not copy.losses and copy.deadline is not None:  # it has not begun
                copy.deadline.cancel()
                copy.deadline = None

    def _refuse(self, copy: Copy, error: WhisperdError) -> None:
        if self._copies.pop(copy.ticket, None) is None:
            return
        if error.code not in (ErrorCode.CANCELLED, ErrorCode.STOPPING):
            self.failed += 1
        copy.close()
        self._spool.remove(copy.folder)
        copy.refused(error)
