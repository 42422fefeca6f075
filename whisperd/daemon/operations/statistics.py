"""The reply to `stats`: totals only, so that nobody learns of another's jobs."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Mapping
from functools import partial
from typing import Any

from whisperd.daemon.helpers.helper import process_rss_bytes
from whisperd.daemon.house import House
from whisperd.daemon.lanes.copying import CopyLane
from whisperd.daemon.lanes.pool import Pool
from whisperd.daemon.operations.call import Call
from whisperd.daemon.operations.turns import ask_in_turn
from whisperd.protocol.jobs import JobState, Priority
from whisperd.protocol.messages import Stats

_INSPECT_S = 20.0  # a fetcher is up in one or two; on a busy machine it may take longer
_MODEL_SOFTWARE = ("torch", "whisper", "cuda", "cuda_devices", "cuda_problem")


def statistics(call: Call, params: Stats) -> None:
    """Answer `stats`; with `inspect` once the helpers that are there only when needed have told what they know."""
    if not params.inspect:
        _look_and_reply(call)
        return
    unknown = {call.house.decoding.pool, call.house.fetching.pool}
    answered = False

    def answer() -> None:
        nonlocal answered
        if not answered:
            answered = True
            timer.cancel()
            _look_and_reply(call)

    def known(pool: Pool) -> None:
        unknown.discard(pool)
        if not unknown:
            answer()

    timer = call.house.loop.call_later(_INSPECT_S, answer)
    for pool in list(unknown):
        pool.when_known(partial(known, pool))


def _look_and_reply(call: Call) -> None:
    """Have counted what only the disk knows, then answer. In turn: a count is waited for, and many may ask for one."""
    house = call.house
    ask_in_turn(call.peer, house.inventory.ask, lambda disk: call.reply(_collect(house, disk)), call.fail)


def _collect(house: House, disk: Mapping[str, Any]) -> dict[str, Any]:
    metrics, config = house.metrics, house.config
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "jobs": {
            "since_start": {str(state): metrics.states[state] for state in JobState},
            "total": {str(state): disk["totals"].get(state, 0) for state in JobState},
        },
        "queue": _waiting(house) | {"capacity": config.capacity},
        "wait_s": metrics.waits(),
        "run_s": metrics.runs(),
        "audio": {
            "transcribed_s": metrics.transcribed_s,
            "speed": _ratio(house.model.gauges, "audio_s", "busy_s"),
        },
        "model": _model(house),
        "software": _software(house),
        "lanes": {
            "copy": _copies(house.copying),
            "upload": _copies(house.receiving),
            "fetch": house.fetching.show(),
            "weights": house.weights.show(),
            "decode": {
                "active": sum(house.decoding.pool.busy.values()),
                "waiting": house.decoding.waiting,
                "failed": house.decoding.failed,
            },
            "model": {
                "active": house.modelling.active,
                "waiting": len(house.modelling.candidates()),
                "failed": house.modelling.failed,
            },
        },
        "cache_hits": metrics.cache_hits,
        "spool_bytes": disk["spool_bytes"],
        "database_bytes": disk["database_bytes"],
        "free_bytes": house.disk.free_bytes,
        "min_free_bytes": config.kept_free_bytes,
        "connections": house.connections(),
        "daemon": {
            "pid": os.getpid(),
            "rss_bytes": process_rss_bytes(os.getpid()),
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "uptime_s": house.loop.time() - house.started_at,
        },
    }


def _copies(lane: CopyLane) -> dict[str, int]:
    return {"active": sum(lane.pool.busy.values()), "waiting": lane.waiting, "failed": lane.failed}


def _model(house: House) -> dict[str, Any]:
    model = house.model
    helper, gauges = model.helper, model.gauges
    return {
        "state": model.status.state,
        "pid": None if helper is None else helper.pid,
        "rss_bytes": None if helper is None else helper.rss_bytes(),
        "starts": model.starts,
        "crashes": model.crashes,
        "windows": gauges.get("windows", 0),
        "tokens": gauges.get("tokens", 0),
        "audio_s": gauges.get("audio_s", 0.0),
        "busy_s": gauges.get("busy_s", 0.0),
        "windows_per_s": _ratio(gauges, "windows", "busy_s"),
        "tokens_per_s": _ratio(gauges, "tokens", "busy_s"),
        "windows_reused": gauges.get("windows_reused", 0),
        "steps": gauges.get("steps", 0),
        "batch_windows": gauges.get("batch_windows"),
        "batch_occupancy": gauges.get("batch_occupancy") if gauges.get("steps") else None,
        "device_used_bytes": gauges.get("device_used_bytes"),
        "device_total_bytes": gauges.get("device_total_bytes"),
    }


def _software(house: House) -> dict[str, Any]:
    """Return the versions of what does the work, as the helpers that have it told them."""
    decoder = house.decoding.pool.gauges
    return {
        "python": platform.python_version(),
        **{name: house.model.gauges.get(name) for name in _MODEL_SOFTWARE},
        "av": decoder.get("av"),
        "ffmpeg": decoder.get("ffmpeg"),
    }


def _waiting(house: House) -> dict[str, int]:
    counts = dict.fromkeys(map(str, Priority), 0)
    for (_, priority), count in house.admission.waiting().items():
        counts[priority] += count
    return counts


def _ratio(gauges: Mapping[str, Any], amount: str, time: str) -> float | None:
    seconds = gauges.get(time) or 0.0
    return gauges.get(amount, 0) / seconds if seconds > 0 else None
