"""The client and the command line of whisperd.

    from whisperctl import Client

Names are loaded when they are first used: `import whisperctl` itself costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whisperctl.client import Client
    from whisperctl.errors import (
        BadRequest,
        DaemonUnreachable,
        Forbidden,
        JobCancelled,
        JobFailed,
        JobTimeout,
        KeyConflict,
        NotFound,
        QueueFull,
        SourceUnreadable,
        StorageFull,
        WhisperdError,
    )
    from whisperctl.results import Coverage, Event, Result, Segment, Timing, Transcript
    from whisperd.protocol.jobs import Job, JobState, Priority

__all__ = [
    "BadRequest",
    "Client",
    "Coverage",
    "DaemonUnreachable",
    "Event",
    "Forbidden",
    "Job",
    "JobCancelled",
    "JobFailed",
    "JobState",
    "JobTimeout",
    "KeyConflict",
    "NotFound",
    "Priority",
    "QueueFull",
    "Result",
    "Segment",
    "SourceUnreadable",
    "StorageFull",
    "Timing",
    "Transcript",
    "WhisperdError",
]

_HOMES = {
    "Client": "whisperctl.client",
    "Coverage": "whisperctl.results",
    "Event": "whisperctl.results",
    "Result": "whisperctl.results",
    "Segment": "whisperctl.results",
    "Timing": "whisperctl.results",
    "Transcript": "whisperctl.results",
    "Job": "whisperd.protocol.jobs",
    "JobState": "whisperd.protocol.jobs",
    "Priority": "whisperd.protocol.jobs",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "whisperctl.errors")), name)
