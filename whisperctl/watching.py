"""`stats --watch`: looks every two seconds and shows what it sees, on a screen or in lines. Restarts are waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.util import find_spec
from typing import NoReturn, Protocol

from whisperctl.client import Client
from whisperctl.errors import DaemonUnreachable
from whisperctl.history import History, Snapshot
from whisperctl.options import Shell
from whisperctl.render import LIVE_STATES
from whisperctl.terminal import Screen
from whisperctl.words import number, safe, size, to_json
from whisperd.protocol.errors import ErrorCode, WhisperdError

WATCH_S = 2.0
_ANSWER_S = 10.0
_JOBS_A_STATE = 20
_AWAY = frozenset({DaemonUnreachable.CODE, ErrorCode.STOPPING, ErrorCode.UNAVAILABLE})


class View(Protocol):
    """Where it is shown."""

    def show(self, history: History) -> None:
        """Show the newest snapshot."""

    def gone(self) -> None:
        """Tell that the daemon does not answer."""


def watch(shell: Shell, *, as_json: bool, sleep: Callable[[float], None] = time.sleep) -> NoReturn:
    """Show the daemon until Ctrl-C. One that was never there raises `DaemonUnreachable`; one that goes is awaited."""
    history, met = History(), False
    # A look that fails is followed by the next one: this client itself need not be patient.
    with Client(shell.socket, _ANSWER_S, reconnect_s=0) as client, _view(shell.screen, as_json=as_json) as view:
        while True:
            try:
                history.add(look(client, with_jobs=not as_json))
                met = True
            except WhisperdError as error:
                if not met or error.code not in _AWAY:
                    raise
                view.gone()
            else:
                view.show(history)
            sleep(WATCH_S)  # the numbers have no event that says when to look again


def look(client: Client, *, with_jobs: bool = True) -> Snapshot:
    """Return the daemon as it is now: one's own jobs, an admin's everybody's."""
    stats, health = client.stats(), client.health()
    jobs = {}
    if with_jobs:
        everybody = False
        with suppress(WhisperdError):
            everybody = bool(client.hello().get("admin"))
        jobs = {each: client.jobs(state=each, limit=_JOBS_A_STATE, all_users=everybody) for each in LIVE_STATES}
    return Snapshot(at_s=time.monotonic(), stats=stats, health=health, jobs=jobs)


def _view(screen: Screen, *, as_json: bool) -> AbstractContextManager[View]:
    if as_json:
        return nullcontext(JsonView(screen))
    if not screen.is_canvas:
        return nullcontext(LineView(screen))
    if find_spec("rich") is None:
        screen.note("(pip install 'whisperd[watch]' shows more than these lines)")
        return nullcontext(LineView(screen))
    from whisperctl.dashboard import Dashboard  # rich, 25 ms

    return Dashboard(colours=screen.colours)


class JsonView:
    """For programs: an object a line, and nothing while the daemon is away."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def show(self, history: History) -> None:
        self._screen.data(to_json(history.last.stats))

    def gone(self) -> None:
        """Say nothing."""


class LineView:
    """For pipes and dumb terminals: a line a look, which never moves."""

    def __init__(self, screen: Screen, clock: Callable[[], str] = lambda: time.strftime("%H:%M:%S")) -> None:
        self._screen, self._clock = screen, clock
        self._is_gone = False

    def show(self, history: History) -> None:
        self._is_gone = False
        self._screen.data(f"{self._clock()}  {line(history)}")

    def gone(self) -> None:
        if not self._is_gone:
            self._screen.data(f"{self._clock()}  whisperd has gone away; waiting for it to come back")
        self._is_gone = True


def line(history: History) -> str:
    """Return the newest snapshot in a line of less than 80 columns."""
    last = history.last
    parts = [
        safe(last.health.get("status", "?")),
        f"{number(last.number('lanes.model.active'))} running",
        f"{number(last.number('queue.interactive'))} + {number(last.number('queue.background'))} waiting",
    ]
    if (speed := history.rate("model.audio_s")) is not None:
        parts.append(f"{speed:.1f} × real time")
    if (memory := last.number("model.rss_bytes")) is not None:
        parts.append(f"model {size(memory)}")
    return " · ".join(parts)
