"""What the client raises: one hierarchy under `WhisperdError`, each error with a stable `.code`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from whisperd.protocol.errors import ErrorCode, WhisperdError

if TYPE_CHECKING:
    from whisperd.protocol.jobs import Job

__all__ = [
    "BadRequest",
    "DaemonUnreachable",
    "Forbidden",
    "JobCancelled",
    "JobFailed",
    "JobTimeout",
    "KeyConflict",
    "NotFound",
    "QueueFull",
    "SourceUnreadable",
    "StorageFull",
    "WhisperdError",
    "error_of",
    "refusal",
]


class DaemonUnreachable(WhisperdError):
    """No daemon answers on the socket, or it went away and did not come back in time."""

    CODE = "unreachable"

    def __init__(self, message: str) -> None:
        super().__init__(self.CODE, message)


class SourceUnreadable(WhisperdError):
    """The client cannot open or read what it was given; nothing was sent to the daemon."""

    CODE = "unreadable"

    def __init__(self, message: str) -> None:
        super().__init__(self.CODE, message)


class JobTimeout(WhisperdError):
    """The time given has passed, and the job goes on: ask for `result(job_id)` later.

    `job_id` is None when the time was over before the daemon had taken the recording; submit again with `key` then,
    and it is the same job.
    """

    CODE = "not_finished"

    def __init__(self, message: str, *, job_id: int | None, key: str | None = None) -> None:
        super().__init__(self.CODE, message)
        self.job_id = job_id
        self.key = key


class JobFailed(WhisperdError):
    """The job ended without a transcript. `code` and the message are the job's own; `job` is the whole job."""

    def __init__(self, job: Job) -> None:
        error = job.error or {}
        super().__init__(error.get("code", ErrorCode.INTERNAL), error.get("message", f"job {job.id} {job.state}"))
        self.job = job


class JobCancelled(WhisperdError):
    """Somebody cancelled the job. `job` is the whole job."""

    def __init__(self, job: Job) -> None:
        super().__init__(ErrorCode.CANCELLED, f"job {job.id} was cancelled")
        self.job = job


class BadRequest(WhisperdError):
    """This request is not accepted: an unknown option, an impossible source, a value that cannot be sent at all."""


class KeyConflict(BadRequest):
    """The key belongs to a job with another source or other options."""


class QueueFull(WhisperdError):
    """No waiting place is free, in all or for this user (`quota_exceeded`): try again later."""


class NotFound(WhisperdError):
    """There is no such job, or it is somebody else's."""


class Forbidden(WhisperdError):
    """This needs an admin, or the daemon's settings do not allow it."""


class StorageFull(WhisperdError):
    """The daemon's disk is too full to take the recording; nothing was accepted."""


_CLASSES: Mapping[str, type[WhisperdError]] = {
    ErrorCode.BAD_FRAME: BadRequest,
    ErrorCode.BAD_REQUEST: BadRequest,
    ErrorCode.UNKNOWN_OP: BadRequest,
    ErrorCode.TOO_LARGE: BadRequest,
    ErrorCode.NO_DESCRIPTOR: BadRequest,
    ErrorCode.KEY_CONFLICT: KeyConflict,
    ErrorCode.QUEUE_FULL: QueueFull,
    ErrorCode.QUOTA_EXCEEDED: QueueFull,
    ErrorCode.NOT_FOUND: NotFound,
    ErrorCode.FORBIDDEN: Forbidden,
    ErrorCode.STORAGE_FULL: StorageFull,
}


def refusal(error: Mapping[str, Any]) -> WhisperdError:
    """Return the exception for the `error` map of a reply."""
    code = str(error.get("code", ErrorCode.INTERNAL))
    return _CLASSES.get(code, WhisperdError)(code, str(error.get("message", code)))


def error_of(job: Job) -> WhisperdError:
    """Return the exception that says why an ended job has no transcript."""
    return JobCancelled(job) if job.state == "cancelled" else JobFailed(job)
