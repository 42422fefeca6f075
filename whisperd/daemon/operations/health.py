"""The reply to `health`, and the word and the lines that others show of it: memory only, whatever else goes on."""

from __future__ import annotations

import os
from typing import Any

from whisperd import __version__
from whisperd.daemon.house import House
from whisperd.daemon.wire.descriptors import closing_is_stuck
from whisperd.protocol import PROTOCOL_VERSION


def health(house: House) -> dict[str, Any]:
    """Return the reply to `health`."""
    return {
        "status": status(house),
        "version": __version__,
        "protocol": PROTOCOL_VERSION,
        "pid": os.getpid(),
        "uptime_s": house.loop.time() - house.started_at,
        "model": house.model.show(),
        "queue": {"depth": sum(house.admission.waiting().values()), "capacity": house.config.capacity},
        "problems": problems(house),
    }


def status(house: House) -> str:
    """Return the one word of `health`."""
    if house.stopping:
        return "stopping"
    if house.modelling.paused or house.model.held:
        return "paused"
    if _faults(house):
        return "degraded"
    return "ready" if house.model.status.state == "ready" or house.model.asleep else "starting"


def problems(house: House) -> list[str]:
    """Return what keeps the daemon from working as it should, each with what to do, or what is waited for."""
    waited_for = (house.model.arrival.words, house.housekeeping.problem)
    return _faults(house) + [words for words in waited_for if words]


def _faults(house: House) -> list[str]:
    pools = (house.copying.pool.problem, house.receiving.pool.problem, house.weights.pool.problem)
    found = [house.disk.problem, *pools, house.fetching.problem, house.decoding.problem]
    if house.model.status.state == "failed":
        found.append(f"the model is not loaded: {house.model.status.error}")
    if closing_is_stuck():
        found.append(
            "a file system of a client does not answer, and its files cannot be closed: end what serves it (a FUSE "
            "mount, a lost server); until then recordings are taken as uploads only"
        )
    if house.modelling.paused:
        found.append("an administrator has paused the queue: `whisperctl resume` goes on")
    elif house.model.held and not house.stopping:
        found.append("an administrator has unloaded the model: `whisperctl model load` loads it again")
    return [problem for problem in found if problem]
