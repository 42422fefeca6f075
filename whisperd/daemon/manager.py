"""What the service manager hears of the daemon: that it is usable, what it does, that it lives.

Under anything but systemd nobody is told, and nothing here costs a timer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from whisperd.daemon.house import House
from whisperd.daemon.loop import Loop, Timer
from whisperd.daemon.operations.health import problems, status
from whisperd.protocol import systemd
from whisperd.protocol.jobs import JobState

_STATUS_EVERY_S = 1.0
# sd_watchdog_enabled(3) asks for half the time; a third leaves room for one that is late.
_PINGS_A_TIMEOUT = 3


class ServiceManager:
    """Tells systemd. Made once the house stands; `ready` is for the loop's first turn."""

    def __init__(self, loop: Loop, house: House, environ: Mapping[str, str] = os.environ) -> None:
        self._loop, self._house, self._environ = loop, house, environ
        self._told = ""
        self._due: Timer | None = None
        self._pinged_at_turn = -1
        self._watchdog_s = systemd.watchdog_timeout_s(environ)
        if "NOTIFY_SOCKET" in environ:
            house.ledger.when_changed.append(lambda change: self._changed())
            house.modelling.when_status_changed.append(self._changed)

    def ready(self) -> None:
        """The database is recovered and the loop accepts: whoever was ordered after us may start."""
        self._told = status_text(self._house)
        systemd.notify(f"READY=1\nSTATUS={self._told}", self._environ)
        if self._watchdog_s is not None:
            self._ping()

    def stopping(self) -> None:
        """The stop was asked for."""
        self._told = "stopping: the work under way returns to the queue"
        systemd.notify(f"STOPPING=1\nSTATUS={self._told}", self._environ)

    def _changed(self) -> None:
        if self._due is None and not self._house.stopping:
            self._due = self._loop.call_later(_STATUS_EVERY_S, self._tell_status)

    def _tell_status(self) -> None:
        self._due = None
        text = status_text(self._house)
        if text != self._told and not self._house.stopping:
            self._told = text
            systemd.notify(f"STATUS={text}", self._environ)

    def _ping(self) -> None:
        """Tell that the loop lives, if it has turned since we last said so. No thread does this: that would lie."""
        assert self._watchdog_s is not None
        if self._loop.turns != self._pinged_at_turn:
            self._pinged_at_turn = self._loop.turns
            systemd.notify("WATCHDOG=1", self._environ)
        self._loop.call_later(self._watchdog_s / _PINGS_A_TIMEOUT, self._ping)


def status_text(house: House) -> str:
    """Return one line for people: `ready: small on cuda:0; 12 waiting, 1 running`."""
    model = house.model.show()
    match status(house):
        case "ready":
            text = f"ready: {model['name']} " + (
                f"on {model['device']}" if model["device"] else "unloaded until work comes"
            )
        case "starting":
            text = house.model.arrival.words or f"loading the model {model['name']}"
        case other:
            text = "; ".join([other, *problems(house)])
    states = [job.state for job in house.board.jobs.values()]
    running = sum(state is JobState.RUNNING for state in states)
    line = f"{text}; {len(states) - running} waiting, {running} running"
    return " ".join(line.split())  # a message of many lines would be taken for more of the protocol
