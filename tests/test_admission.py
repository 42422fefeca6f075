"""Who may have how much: the bounds of the whole and of each user, as functions and against a daemon with two users."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import NO_MODEL, Daemon, client_as, error_of, requires_root, stop_process, submit, wait_until
from whisperd.daemon.admission import Applicant, check_admission, check_room
from whisperd.daemon.config import Config
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.jobs import Priority

INTERACTIVE, BACKGROUND = Priority.INTERACTIVE, Priority.BACKGROUND
MIB = 2**20
ANNA, BERT = 20_001, 20_002


CONFIG = Config(
    socket=Path("/run/s"),
    state_dir=Path("/state"),
    cache_dir=Path("/cache"),
    capacity=20,
    min_free_bytes=100,
    ballast_bytes=0,
    spool_bytes_per_user=MIB,
)
APPLICANT = Applicant(uid=ANNA, unlimited=False, priority=BACKGROUND, size_bytes=10, spool_bytes=0)


def refusal(
    applicant: Applicant, waiting: dict[tuple[int, Priority], int], *, free_bytes: int = MIB, joined_jobs: int = 0
) -> str | None:
    try:
        check_admission(CONFIG, applicant, waiting, free_bytes, joined_jobs=joined_jobs)
    except WhisperdError as error:
        return error.code
    return None


def test_a_user_may_take_half_of_the_queue() -> None:
    assert refusal(APPLICANT, {(ANNA, BACKGROUND): 9}) is None
    assert refusal(APPLICANT, {(ANNA, BACKGROUND): 10}) == "quota_exceeded"
    assert refusal(APPLICANT, {(ANNA, BACKGROUND): 5, (ANNA, INTERACTIVE): 5}) == "quota_exceeded"
    assert refusal(replace(APPLICANT, uid=BERT), {(ANNA, BACKGROUND): 10}) is None


def test_a_user_may_have_eight_interactive_jobs_wait() -> None:
    urgent = replace(APPLICANT, priority=INTERACTIVE)
    assert refusal(urgent, {(ANNA, INTERACTIVE): 7}) is None
    assert refusal(urgent, {(ANNA, INTERACTIVE): 8}) == "quota_exceeded"
    assert refusal(replace(urgent, priority=BACKGROUND), {(ANNA, INTERACTIVE): 8}) is None


def test_a_user_may_have_as_many_jobs_join_work_of_his() -> None:
    assert refusal(APPLICANT, {}, joined_jobs=9) is None
    assert refusal(APPLICANT, {}, joined_jobs=10) == "quota_exceeded"
    assert refusal(replace(APPLICANT, unlimited=True), {}, joined_jobs=10) is None


def test_a_users_audio_on_disk_is_bounded() -> None:
    assert refusal(replace(APPLICANT, spool_bytes=MIB - 10), {}, free_bytes=9 * MIB) is None
    assert refusal(replace(APPLICANT, spool_bytes=MIB - 9), {}, free_bytes=9 * MIB) == "quota_exceeded"


def test_administrators_are_bound_by_the_whole_alone() -> None:
    admin = replace(APPLICANT, unlimited=True, spool_bytes=9 * MIB)
    assert refusal(admin, {(ANNA, BACKGROUND): 17}) is None
    assert refusal(admin, {(ANNA, BACKGROUND): 18}) == "queue_full"
    assert refusal(replace(admin, priority=INTERACTIVE), {(ANNA, BACKGROUND): 19}) is None


def test_what_is_announced_late_is_bound_by_disk_and_quota_alone() -> None:
    check_room(CONFIG, APPLICANT, 110)
    for applicant, free_bytes, code in (
        (APPLICANT, 109, "storage_full"),
        (replace(APPLICANT, spool_bytes=MIB - 9), MIB, "quota_exceeded"),
    ):
        assert error_of(lambda applicant=applicant, free=free_bytes: check_room(CONFIG, applicant, free)) == code


def test_the_disk_comes_first() -> None:
    assert refusal(APPLICANT, {(ANNA, BACKGROUND): 10}, free_bytes=109) == "storage_full"
    assert refusal(APPLICANT, {}, free_bytes=110) is None


@pytest.mark.parametrize("users", [1, 2, 7])
def test_background_floods_leave_room_for_interactive_jobs_of_others(users: int) -> None:
    waiting: dict[tuple[int, Priority], int] = {}
    for uid in range(users):
        flood = replace(APPLICANT, uid=uid)
        while refusal(flood, waiting) is None:
            waiting[uid, BACKGROUND] = waiting.get((uid, BACKGROUND), 0) + 1
    assert refusal(replace(APPLICANT, uid=99, priority=INTERACTIVE), waiting) is None


# --- a daemon and two users ---


@requires_root
def test_a_user_over_quota_holds_up_nobody_else(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(
        model=NO_MODEL, socket_mode="0666", capacity=10, interactive_per_user=2, spool_bytes_per_user=MIB
    )
    with client_as(daemon, ANNA) as anna, client_as(daemon, BERT) as bert, daemon.client() as root:
        for _ in range(2):
            assert submit(anna, recording(1), priority="interactive")["uid"] == ANNA
        assert error_of(lambda: submit(anna, recording(1), priority="interactive")) == "quota_exceeded"
        for _ in range(3):
            submit(anna, recording(1))
        assert error_of(lambda: submit(anna, recording(1))) == "quota_exceeded", "half of ten"
        assert submit(bert, recording(1), priority="interactive")["state"] == "queued"
        assert error_of(lambda: submit(bert, recording(40))) == "quota_exceeded", "1.2 MiB"
        for _ in range(3):
            assert submit(root, recording(1), priority="interactive")["state"] == "queued", "admins are exempt"


@requires_root
def test_audio_kept_after_a_cancel_counts_until_it_is_forgotten(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, socket_mode="0666", spool_bytes_per_user=MIB)
    with client_as(daemon, ANNA) as anna:
        job = submit(anna, recording(20))
        anna.call("cancel", job=job["id"])
        assert error_of(lambda: submit(anna, recording(20))) == "quota_exceeded"
        anna.call("forget", job=job["id"])
        assert submit(anna, recording(20))["state"] == "queued"


@requires_root
def test_a_crowd_of_jobs_at_one_running_recording_is_bounded(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path], micro: Path
) -> None:
    daemon = start_daemon(model=str(micro), ready=True, socket_mode="0666", capacity=8)
    path = recording(600)
    with client_as(daemon, ANNA) as anna, client_as(daemon, BERT) as bert, daemon.client() as root:
        first = submit(anna, path)
        wait_until(lambda: anna.call("result", job=first["id"])["job"]["state"] == "running")
        stop_process(daemon.helpers("whisperd.model.main")[0].pid)
        joined = [submit(anna, path) for _ in range(4)]
        assert {job["state"] for job in joined} == {"running"}, "they take no place in the queue"
        assert error_of(lambda: submit(anna, path)) == "quota_exceeded", "half of eight"
        assert error_of(lambda: submit(anna, recording(1))) == "quota_exceeded"
        anna.call("cancel", job=joined[0]["id"])
        assert submit(anna, path)["state"] == "running"
        assert submit(bert, path)["uid"] == BERT
        assert [submit(root, path)["uid"] for _ in range(5)] == [0] * 5, "admins are exempt"
