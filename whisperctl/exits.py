"""Exit codes of the command line: one for each error code, the same for ever, because scripts test them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from whisperctl.errors import DaemonUnreachable, JobCancelled, JobFailed, JobTimeout, SourceUnreadable, WhisperdError
from whisperd.protocol.errors import ErrorCode


class Exit(IntEnum):
    """What the shell sees."""

    DONE = 0
    JOB_FAILED = 1
    WRONG_USAGE = 2
    UNREACHABLE = 3
    NO_SUCH_JOB = 4
    CANCELLED = 5
    FULL = 6
    NOT_FINISHED = 7
    REFUSED = 8
    INTERRUPTED = 130
    CLOSED_PIPE = 141  # as the shell shows any program that a closed pipe ended


# Of a request that was refused. A job that was accepted and failed later is 1 whatever its code, `cancelled` 5.
EXIT_CODES: Mapping[str, Exit] = {
    ErrorCode.BAD_FRAME: Exit.WRONG_USAGE,
    ErrorCode.BAD_REQUEST: Exit.WRONG_USAGE,
    ErrorCode.UNKNOWN_OP: Exit.WRONG_USAGE,
    ErrorCode.TOO_LARGE: Exit.WRONG_USAGE,
    ErrorCode.NO_DESCRIPTOR: Exit.WRONG_USAGE,
    ErrorCode.KEY_CONFLICT: Exit.WRONG_USAGE,
    ErrorCode.QUEUE_FULL: Exit.FULL,
    ErrorCode.QUOTA_EXCEEDED: Exit.FULL,
    ErrorCode.NOT_FOUND: Exit.NO_SUCH_JOB,
    ErrorCode.FORBIDDEN: Exit.REFUSED,
    ErrorCode.BAD_AUDIO: Exit.JOB_FAILED,
    ErrorCode.TOO_LONG: Exit.JOB_FAILED,
    ErrorCode.FETCH_FAILED: Exit.JOB_FAILED,
    ErrorCode.FETCH_UNAVAILABLE: Exit.JOB_FAILED,
    ErrorCode.FETCH_PRIVATE: Exit.JOB_FAILED,
    ErrorCode.FETCH_AGE_RESTRICTED: Exit.JOB_FAILED,
    ErrorCode.FETCH_RATE_LIMITED: Exit.JOB_FAILED,
    ErrorCode.FETCH_BLOCKED: Exit.JOB_FAILED,
    ErrorCode.MODEL_UNAVAILABLE: Exit.JOB_FAILED,
    ErrorCode.OUT_OF_MEMORY: Exit.JOB_FAILED,
    ErrorCode.WORKER_CRASHED: Exit.JOB_FAILED,
    ErrorCode.TIMED_OUT: Exit.JOB_FAILED,
    ErrorCode.CANCELLED: Exit.CANCELLED,
    ErrorCode.STORAGE_FULL: Exit.REFUSED,
    ErrorCode.UNAVAILABLE: Exit.UNREACHABLE,
    ErrorCode.STOPPING: Exit.UNREACHABLE,
    ErrorCode.INTERNAL: Exit.JOB_FAILED,
    DaemonUnreachable.CODE: Exit.UNREACHABLE,
    SourceUnreadable.CODE: Exit.WRONG_USAGE,
    JobTimeout.CODE: Exit.NOT_FINISHED,
}


def exit_code(error: WhisperdError) -> Exit:
    """Return the exit code for an error; a code that only a newer daemon knows counts as a failed job."""
    if isinstance(error, JobFailed):
        return Exit.JOB_FAILED
    if isinstance(error, JobCancelled):
        return Exit.CANCELLED
    return EXIT_CODES.get(error.code, Exit.JOB_FAILED)


def exit_of_state(state: str) -> Exit:
    """Return the exit code that a job in this state stands for."""
    return _EXIT_OF_STATE.get(state, Exit.NOT_FINISHED)


_EXIT_OF_STATE = {"done": Exit.DONE, "failed": Exit.JOB_FAILED, "cancelled": Exit.CANCELLED}
