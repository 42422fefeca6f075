"""The stable error codes of the protocol, and the one exception that carries them."""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """Codes are for programs and never change; the message beside a code is for people."""

    BAD_FRAME = "bad_frame"
    BAD_REQUEST = "bad_request"
    UNKNOWN_OP = "unknown_op"
    TOO_LARGE = "too_large"
    NO_DESCRIPTOR = "no_descriptor"
    KEY_CONFLICT = "key_conflict"
    QUEUE_FULL = "queue_full"
    QUOTA_EXCEEDED = "quota_exceeded"
    NOT_FOUND = "not_found"
    FORBIDDEN = "forbidden"
    BAD_AUDIO = "bad_audio"
    TOO_LONG = "too_long"
    FETCH_FAILED = "fetch_failed"
    FETCH_UNAVAILABLE = "fetch_unavailable"
    FETCH_PRIVATE = "fetch_private"
    FETCH_AGE_RESTRICTED = "fetch_age_restricted"
    FETCH_RATE_LIMITED = "fetch_rate_limited"
    FETCH_BLOCKED = "fetch_blocked"
    MODEL_UNAVAILABLE = "model_unavailable"
    OUT_OF_MEMORY = "out_of_memory"
    WORKER_CRASHED = "worker_crashed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    STORAGE_FULL = "storage_full"
    UNAVAILABLE = "unavailable"
    STOPPING = "stopping"
    INTERNAL = "internal"


class WhisperdError(Exception):
    """Base of every error that whisperd reports.

    `code` is one of `ErrorCode`'s values (a plain string on the client's side when a newer daemon sends a code that
    this version does not know); `message` says what happened and what to do next.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = str(code)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def to_wire(self) -> dict[str, str]:
        """Return `{"code": ..., "message": ...}` as a reply or a job carries it."""
        return {"code": self.code, "message": self.message}


def internal_error() -> WhisperdError:
    """Return the error for a defect of our own, which whoever met it has logged."""
    return WhisperdError(ErrorCode.INTERNAL, "whisperd met an error of its own, which its log describes")
