"""Who may have one more job wait: pure functions over counts, so that every bound is tested without a daemon.

The queue as a whole is bounded, with places that only interactive jobs may take; what one user may take of it is
bounded besides, so that whatever he submits, others find room. Administrators are bound by the whole alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from whisperd.daemon.config import Config
from whisperd.daemon.scheduler import admits
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.jobs import Priority

Waiting = Mapping[tuple[int, Priority], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applicant:
    """A job to be, with what its user has already: `spool_bytes` of audio kept for him, copies under way included."""

    uid: int
    unlimited: bool  # an administrator
    priority: Priority
    size_bytes: int
    spool_bytes: int


def check_admission(
    config: Config, applicant: Applicant, waiting: Waiting, free_bytes: int, *, joined_jobs: int
) -> None:
    """Raise what refuses one more job: `storage_full`, `queue_full` or `quota_exceeded`.

    `joined_jobs` of the applicant, waiting or running, are for work that another of his is for already.
    """
    _check_disk(config, applicant, free_bytes)
    # First what the user can mend himself, and what tells him least of others.
    if not applicant.unlimited:
        _check_places(config, applicant, waiting)
        _check_joined(config, joined_jobs)
        _check_spool(config, applicant)
    reserved = max(1, int(config.capacity * config.interactive_capacity_share))
    total = sum(waiting.values())
    if not admits(priority=applicant.priority, capacity=config.capacity, reserved=reserved, waiting=total):
        raise WhisperdError(
            ErrorCode.QUEUE_FULL,
            f"{total} jobs wait already and the queue holds {config.capacity} (of which {reserved} for "
            "interactive jobs only): submit again when some have ended",
        )


def places_per_user(config: Config) -> int:
    """Return how many waiting jobs one user may have."""
    return max(1, int(config.capacity * config.capacity_share_per_user))


def check_room(config: Config, applicant: Applicant, free_bytes: int) -> None:
    """Raise what refuses more bytes of a job that was admitted without its size: `storage_full`, `quota_exceeded`."""
    _check_disk(config, applicant, free_bytes)
    if not applicant.unlimited:
        _check_spool(config, applicant)


def _check_disk(config: Config, applicant: Applicant, free_bytes: int) -> None:
    if free_bytes - applicant.size_bytes < config.kept_free_bytes:
        raise WhisperdError(
            ErrorCode.STORAGE_FULL,
            f"{config.state_dir} has {free_bytes} bytes free, and {config.kept_free_bytes} must stay free "
            "(setting min_free_bytes, at least twice ballast_bytes): make room and submit again",
        )


def _check_places(config: Config, applicant: Applicant, waiting: Waiting) -> None:
    uid = applicant.uid
    interactive = waiting.get((uid, Priority.INTERACTIVE), 0)
    total = interactive + waiting.get((uid, Priority.BACKGROUND), 0)
    most = places_per_user(config)
    if total >= most:
        raise WhisperdError(
            ErrorCode.QUOTA_EXCEEDED,
            f"{total} jobs of yours wait, and one user may have {most} (setting capacity_share_per_user): "
            "submit again when some have ended, or cancel some",
        )
    if applicant.priority is Priority.INTERACTIVE and interactive >= config.interactive_per_user:
        raise WhisperdError(
            ErrorCode.QUOTA_EXCEEDED,
            f"{interactive} interactive jobs of yours wait, and one user may have {config.interactive_per_user} "
            "(setting interactive_per_user): submit this one as background work, or when some have ended",
        )


def _check_joined(config: Config, joined_jobs: int) -> None:
    """Refuse a crowd at one recording: who joins work that runs takes no place, but each segment is a row for each."""
    most = places_per_user(config)
    if joined_jobs >= most:
        raise WhisperdError(
            ErrorCode.QUOTA_EXCEEDED,
            f"{joined_jobs} jobs of yours ask for what another of yours is at, and one user may have {most} (setting "
            "capacity_share_per_user): wait for those, or cancel some",
        )


def _check_spool(config: Config, applicant: Applicant) -> None:
    if applicant.spool_bytes + applicant.size_bytes > config.spool_bytes_per_user:
        raise WhisperdError(
            ErrorCode.QUOTA_EXCEEDED,
            f"your recordings take {applicant.spool_bytes} bytes on the daemon's disk, this one has "
            f"{applicant.size_bytes}, and one user may have {config.spool_bytes_per_user} (setting "
            "spool_bytes_per_user): submit again when some have ended, or forget failed and cancelled ones",
        )
