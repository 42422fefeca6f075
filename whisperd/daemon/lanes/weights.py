"""The weights lane: a named model that is not on this machine is downloaded, by a fetch helper of its own."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whisperd.daemon.config import Config
from whisperd.daemon.lanes.pool import Loss, Pool, Task
from whisperd.daemon.loop import Loop, Timer
from whisperd.protocol.catalogue import Checkpoint, catalogue
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import Failed, FetchFailed, FetchWeights, HelperMessage, Progress, WeightsFetched
from whisperd.protocol.jobs import Priority

log = logging.getLogger("whisperd.lanes")

_TRIES = 4
_BACKOFF_FACTOR = 3


@dataclass(eq=False, frozen=True, slots=True, kw_only=True)
class Listener:
    """Somebody who waits for a model's file. `owner` is the client's number, None for the daemon itself.

    `progressed` gets the bytes that are there and all there will be (0: not known), `halted` why it will be tried again
    and in how many seconds, `ended` where the file lies or why it does not come: exactly once, unless he leaves before.
    """

    owner: int | None
    progressed: Callable[[float, float], None]
    halted: Callable[[WhisperdError, float], None]
    ended: Callable[[Path | WhisperdError], None]


@dataclass(eq=False, slots=True, kw_only=True)
class _Pull:
    """A file on its way. `number` stands where other tasks have a run's."""

    number: int
    wanted: Checkpoint
    listeners: list[Listener] = field(default_factory=list)
    active: bool = False
    failures: int = 0
    rests: Timer | None = None  # until it is tried again


class WeightsLane:
    """Downloads one file at a time; whoever asks for the same one waits with the others.

    What nobody waits for any more is given up; what had arrived stays for the next time.
    """

    def __init__(
        self, make_pool: Callable[[Callable[[], None]], Pool], loop: Loop, config: Config, environ: Mapping[str, str]
    ) -> None:
        self.pool = make_pool(self._pump)
        self._loop, self._config, self._environ = loop, config, environ
        self._catalogue = catalogue(config.extra_models)
        self._numbers = itertools.count(1)
        self._generations = itertools.count(1)
        self._pulls: dict[str, _Pull] = {}  # by file: some have two names
        self.failed = 0
        self.fetched: Callable[[Checkpoint], None] = lambda wanted: None  # whoever asked for it

    # -- what others read ----------------------------------------------------------------------------------------

    def find(self, name: str) -> Checkpoint | None:
        """Return the file of a name, or None for what is no name (a path, or `demo`)."""
        return self._catalogue.get(name)

    def place(self, wanted: Checkpoint) -> Path | None:
        """Return where a file lies; whether it is whole, its hash will tell the helper that loads it."""
        return next(iter(wanted.present(self._config.cache_dir, self._environ)), None)

    def show(self) -> dict[str, Any]:
        """Return the lane as `stats` shows it."""
        active = sum(pull.active for pull in self._pulls.values())
        return {"active": active, "waiting": len(self._pulls) - active, "failed": self.failed}

    # -- asking ----------------------------------------------------------------------------------------------------

    def pull(self, name: str, listener: Listener) -> None:
        """See that a model's file is there, and whole. `listener` is never called from inside this.

        Raises `WhisperdError`: `bad_request` for a name that is none, `forbidden` where it is not there
        and nothing is to be downloaded.
        """
        wanted = self._catalogue.get(name)
        if wanted is None:
            names = ", ".join(self._catalogue)
            raise WhisperdError(ErrorCode.BAD_REQUEST, f"{name!r} is not the name of a model to download: {names}")
        if not self._config.models_url and self.place(wanted) is None:  # one that is there is only looked at
            raise WhisperdError(ErrorCode.FORBIDDEN, wanted.only_by_hand(self._config.cache_dir))
        pull = self._pulls.get(wanted.file_name)
        if pull is None:
            pull = self._pulls[wanted.file_name] = _Pull(number=next(self._numbers), wanted=wanted)
        pull.listeners.append(listener)
        self._loop.call_soon(self._pump)

    def leave(self, listener: Listener) -> None:
        """Wait no more."""
        self._drop(lambda other: other is listener)

    def client_left(self, owner: int) -> None:
        """A client is gone, and so are its waits."""
        self._drop(lambda listener: listener.owner == owner)

    def stop(self) -> None:
        """End the helper. What has arrived stays."""
        self.pool.stop()

    def _drop(self, leaves: Callable[[Listener], bool]) -> None:
        for pull in list(self._pulls.values()):
            pull.listeners = [listener for listener in pull.listeners if not leaves(listener)]
            if pull.listeners:
                continue
            if pull.active:
                self.pool.cancel(pull.number)
            else:
                self._forget(pull)

    # -- the work --------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        for pull in list(self._pulls.values()):
            if sum(self.pool.busy.values()) >= self.pool.size:
                return
            if not pull.active and pull.rests is None:
                self._start(pull)
        if not self._pulls:
            self.pool.dismiss()

    def _start(self, pull: _Pull) -> None:
        pull.active = True
        generation = next(self._generations)
        wanted = pull.wanted
        self.pool.run(
            Task(
                run=pull.number,
                generation=generation,
                priority=Priority.INTERACTIVE,
                message=FetchWeights(
                    run=pull.number, generation=generation, file_name=wanted.file_name, sha256=wanted.sha256
                ),
                progressed=lambda progress: self._progressed(pull, progress),
                done=lambda message: self._answered(pull, message),
                lost=lambda loss: self._lost(pull, loss),
            )
        )

    def _progressed(self, pull: _Pull, progress: Progress) -> None:
        for listener in pull.listeners:
            listener.progressed(progress.done, progress.total)

    def _answered(self, pull: _Pull, message: HelperMessage) -> None:
        pull.active = False
        match message:
            case WeightsFetched():
                log.info("model file=%s lies at path=%s", pull.wanted.file_name, message.path)
                self._end(pull, Path(message.path))
            case FetchFailed(transient=True):
                self._try_again(pull, WhisperdError(message.code, message.message), message.wait_s)
            case Failed(code=ErrorCode.CANCELLED) if pull.listeners:  # somebody came after all had left
                self._pump()
            case Failed() | FetchFailed():
                self._end(pull, WhisperdError(message.code, message.message))

    def _lost(self, pull: _Pull, loss: Loss) -> None:
        pull.active = False
        if loss.began:
            text = f"the download of {pull.wanted.file_name} was cut off ({loss.reason}): try again"
            self._try_again(pull, WhisperdError(ErrorCode.FETCH_FAILED, text), 0.0)
        # Else helpers do not start, and the pool rests: it calls when there is one.

    def _try_again(self, pull: _Pull, error: WhisperdError, wait_s: float) -> None:
        pull.failures += 1
        if pull.failures >= _TRIES or not pull.listeners:
            self._end(pull, error)
            return
        delay_s = max(wait_s, self._config.fetch_backoff_s * _BACKOFF_FACTOR ** (pull.failures - 1))
        log.warning("model file=%s again_in_s=%.0f reason=%s", pull.wanted.file_name, delay_s, error.message)

        def again() -> None:
            pull.rests = None
            self._pump()

        pull.rests = self._loop.call_later(delay_s, again)
        for listener in pull.listeners:
            listener.halted(error, delay_s)

    def _end(self, pull: _Pull, outcome: Path | WhisperdError) -> None:
        self._forget(pull)
        if isinstance(outcome, WhisperdError) and pull.listeners:
            self.failed += 1
            log.error("model file=%s not downloaded reason=%s", pull.wanted.file_name, outcome.message)
        for listener in pull.listeners:
            listener.ended(outcome)
        if isinstance(outcome, Path):
            self.fetched(pull.wanted)
        self._pump()

    def _forget(self, pull: _Pull) -> None:
        if pull.rests is not None:
            pull.rests.cancel()
        self._pulls.pop(pull.wanted.file_name, None)
