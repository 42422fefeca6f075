"""What is deleted for its age, and when the machine's date is not believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import NO_MODEL, Daemon, submit, wait_until
from whisperd.daemon.state.housekeeping import ClockGuard

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
YEAR_S = 365 * DAY_S


@dataclass
class Clocks:
    """A machine's two clocks: its date, and the one that nobody can set."""

    wall: float = 1.8e9
    boot: float = 500.0

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds

    def guard(self, seen_at: float | None = None, grace_s: float = DAY_S) -> ClockGuard:
        return ClockGuard(grace_s=grace_s, seen_at=seen_at, wall=lambda: self.wall, boot=lambda: self.boot)


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def test_time_that_passes_is_believed_however_much_of_it(clocks: Clocks) -> None:
    guard = clocks.guard()
    for _ in range(100):
        clocks.pass_(30 * DAY_S)  # asleep for a month
        clocks.wall += 5  # and a clock that is a little slow is set
        assert guard.believes()


def test_a_date_years_ahead_deletes_nothing_until_it_has_stood_for_a_day(clocks: Clocks) -> None:
    guard = clocks.guard()
    clocks.wall += 12 * YEAR_S
    for _ in range(24):
        assert not guard.believes()
        assert guard.doubts
        assert guard.jump_s == pytest.approx(12 * YEAR_S)
        clocks.pass_(HOUR_S)
    assert guard.believes()
    assert not guard.doubts


def test_a_date_that_is_set_right_again_has_cost_nothing(clocks: Clocks) -> None:
    guard = clocks.guard()
    clocks.wall += YEAR_S
    assert not guard.believes()
    clocks.pass_(HOUR_S)
    clocks.wall -= YEAR_S
    assert guard.believes()
    clocks.wall += YEAR_S  # and once more: the day begins anew
    clocks.pass_(23 * HOUR_S)
    assert not guard.believes()
    clocks.pass_(23 * HOUR_S)
    assert not guard.believes()


def test_a_date_that_is_set_back_is_believed_and_the_way_forward_is_not(clocks: Clocks) -> None:
    guard = clocks.guard()
    clocks.wall -= 50 * YEAR_S  # a dead battery
    assert guard.believes()
    clocks.wall += 50 * YEAR_S
    assert not guard.believes()


def test_a_start_after_a_long_absence_waits_a_day(clocks: Clocks) -> None:
    assert clocks.guard(seen_at=clocks.wall - HOUR_S).believes()
    assert clocks.guard(seen_at=clocks.wall + YEAR_S).believes()
    guard = clocks.guard(seen_at=clocks.wall - YEAR_S)
    assert not guard.believes()
    clocks.pass_(DAY_S)
    assert guard.believes()
    assert clocks.guard(seen_at=clocks.wall - YEAR_S, grace_s=0).believes(), "the setting 0 believes any date"


def test_a_daemon_that_starts_years_later_keeps_what_would_be_too_old(
    make_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = make_daemon(model=NO_MODEL, retention_days=0)
    daemon.start()
    with daemon.client() as client:
        job = submit(client, recording())
        client.call("cancel", job=job["id"])
    assert daemon.stop() == 0
    mark = daemon.state_dir / "whisperd.lock"
    mark.touch()
    shift_date(mark, -3 * YEAR_S)
    daemon.start()
    with daemon.client() as client:
        assert [row["id"] for row in client.call("jobs")["jobs"]] == [job["id"]]
        assert any("date has jumped ahead by 1095 days" in problem for problem in client.call("health")["problems"])
    assert daemon.stop() == 0
    shift_date(mark, 3 * YEAR_S)
    daemon.start()
    with daemon.client() as client:
        wait_until(lambda: client.call("jobs")["jobs"] == [])


def shift_date(path: Path, shift_s: float) -> None:
    """Date a file earlier or later than it is."""
    then = path.stat().st_mtime + shift_s
    os.utime(path, (then, then))
