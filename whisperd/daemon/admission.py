"""Who may have one more job wait, and the places of those that are to be jobs.

The queue as a whole is bounded, with places that only interactive jobs may take; what one user may take of it is
bounded besides, so that whatever he submits, others find room. Administrators are bound by the whole alone. What
decides are pure functions over counts, so that every bound is tested without a daemon.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from whisperd.daemon.config import Config
from whisperd.daemon.scheduler import admits
from whisperd.daemon.state.board import Board
from whisperd.daemon.state.disk import Disk
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


@dataclass(eq=False, slots=True, kw_only=True)
class Place:
    """A place of the queue, held by a job to be. `size_bytes` of audio are on their way to the spool with it."""

    uid: int
    priority: Priority
    size_bytes: int  # of what does not tell its size, and of a file that grows: what has come so far
    stored_bytes: int  # its user's audio in the spool when it was admitted (`Store.spool_bytes`)


class Admission:
    """The places of the queue: one for each job that waits and, from `enter` to `leave`, for each that is to be."""

    def __init__(self, config: Config, board: Board, disk: Disk, is_admin: Callable[[int], bool]) -> None:
        self._config, self._board, self._disk, self._is_admin = config, board, disk, is_admin
        self._places: set[Place] = set()
        self._submitting: Counter[int] = Counter()

    def waiting(self) -> Counter[tuple[int, Priority]]:
        """Return how many places of the queue are taken, by user and priority."""
        return self._board.waiting_jobs() + Counter((place.uid, place.priority) for place in self._places)

    # --- places ---

    def enter(self, uid: int, priority: Priority, *, size_bytes: int = 0, stored_bytes: int) -> Place:
        """Take a place for one more job; `leave` it. Raises `storage_full`, `queue_full`, `quota_exceeded`."""
        self._disk.refuse_when_full()
        place = Place(uid=uid, priority=priority, size_bytes=size_bytes, stored_bytes=stored_bytes)
        free_bytes, joined_jobs = self._disk.free_bytes, self._board.joined_jobs(uid)
        applicant = self._applicant(place, size_bytes)
        check_admission(self._config, applicant, self.waiting(), free_bytes, joined_jobs=joined_jobs)
        self._places.add(place)
        return place

    def grow(self, place: Place, to_bytes: int) -> None:
        """Count what has come beyond what was admitted. Raises `storage_full`, `quota_exceeded`."""
        if (more := to_bytes - place.size_bytes) > 0:
            self._disk.refuse_when_full()
            check_room(self._config, self._applicant(place, more), self._disk.free_bytes)
            place.size_bytes = to_bytes

    def leave(self, place: Place) -> None:
        """Give a place back: it is a job now, which counts by itself, or could not become one."""
        self._places.discard(place)

    def _applicant(self, place: Place, more_bytes: int) -> Applicant:
        under_way = sum(other.size_bytes for other in self._places if other.uid == place.uid)
        return Applicant(
            uid=place.uid,
            unlimited=self._is_admin(place.uid),
            priority=place.priority,
            size_bytes=more_bytes,
            spool_bytes=place.stored_bytes + under_way,
        )

    # --- submits, which need no place while their key is looked up or compared ---

    def check_descriptor(self, uid: int, key: str | None) -> None:
        """Raise `quota_exceeded` where one more submit may not hold a descriptor until it is answered.

        One with a key may be a retry of one that is not answered yet, and is not to be refused for that one's sake.
        """
        most = places_per_user(self._config) * (1 if key is None else 2)
        if self._submitting[uid] >= most and not self._is_admin(uid):
            raise WhisperdError(
                ErrorCode.QUOTA_EXCEEDED,
                f"{self._submitting[uid]} of your submits are not answered yet, and with {most} of them no more files "
                "are taken from one user (setting capacity_share_per_user): wait for some",
            )

    def take_up(self, uid: int) -> None:
        """A submit has come, which is to be `answered` once."""
        self._submitting[uid] += 1

    def answered(self, uid: int) -> None:
        """Its answer is out."""
        self._submitting[uid] -= 1
        if not self._submitting[uid]:
            del self._submitting[uid]

    def submitting(self) -> frozenset[int]:
        """Return the users of whom a submit is not answered."""
        return frozenset(self._submitting)


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
