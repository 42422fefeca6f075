"""What is deleted for its age, and when the machine's date is not believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import NO_MODEL, Daemon, submit, wait_until
from whisperd.daemon.state.housekeeping import ClockGuard, Doubt

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

    def guard(self, seen_at: float | None = None, grace_s: float = DAY_S, doubt: Doubt | None = None) -> ClockGuard:
        return ClockGuard(grace_s=grace_s, seen_at=seen_at, doubt=doubt, wall=lambda: self.wall, boot=lambda: self.boot)


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
        assert guard.doubt
        assert guard.jump_s == pytest.approx(12 * YEAR_S)
        clocks.pass_(HOUR_S)
    assert guard.believes()
    assert not guard.doubt


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


def test_a_date_that_is_set_back_is_not_followed_and_the_way_forward_costs_nothing(clocks: Clocks) -> None:
    guard = clocks.guard()
    clocks.wall -= 50 * YEAR_S  # a dead battery
    was = clocks.wall + 50 * YEAR_S
    assert guard.date() == pytest.approx(was), "what ends now would be fifty years old once the date is set right"
    assert guard.believes()
    assert guard.gone_back
    clocks.pass_(3 * DAY_S)
    assert guard.date() == pytest.approx(was + 3 * DAY_S)
    clocks.wall += 50 * YEAR_S
    assert guard.believes()
    assert not guard.gone_back
    assert guard.date() == clocks.wall
    clocks.wall -= 8 * HOUR_S  # another system's idea of the time zone
    assert guard.believes()
    assert guard.date() == clocks.wall
    clocks.wall -= 50 * YEAR_S
    assert clocks.guard(seen_at=was).date() == pytest.approx(was), "nor is it after a restart"
    assert clocks.guard(seen_at=was, grace_s=0).date() == clocks.wall, "the setting 0 believes any date"


def test_a_start_after_a_long_absence_waits_a_day(clocks: Clocks) -> None:
    assert clocks.guard(seen_at=clocks.wall - HOUR_S).believes()
    assert clocks.guard(seen_at=clocks.wall + YEAR_S).believes()
    guard = clocks.guard(seen_at=clocks.wall - YEAR_S)
    assert not guard.believes()
    clocks.pass_(DAY_S)
    assert guard.believes()
    assert clocks.guard(seen_at=clocks.wall - YEAR_S, grace_s=0).believes(), "the setting 0 believes any date"


def days_at_work(clocks: Clocks, doubt: Doubt | None, hours: list[int], seen_at: float) -> tuple[bool, Doubt | None]:
    """Run for so many hours each day, off in between; return whether the date was believed, and what is kept."""
    for day in hours:
        clocks.boot = 500.0  # the machine was started
        guard = clocks.guard(seen_at=seen_at, doubt=doubt)
        for _ in range(day):
            if guard.believes():
                return True, guard.doubt
            clocks.pass_(HOUR_S)
        guard.believes()
        doubt = guard.doubt
        clocks.wall += DAY_S - day * HOUR_S
    return False, doubt


def test_a_machine_that_is_off_at_night_believes_its_date_in_the_end(clocks: Clocks) -> None:
    seen_at = clocks.wall
    clocks.wall += 62 * HOUR_S  # a weekend
    believed, doubt = days_at_work(clocks, None, [10, 10], seen_at)
    assert not believed
    assert doubt is not None
    assert doubt.stood_s == pytest.approx(20 * HOUR_S)
    assert days_at_work(clocks, doubt, [10], seen_at) == (True, None)


def test_a_doubt_outlives_a_weekend_and_no_other_jump(clocks: Clocks) -> None:
    seen_at = clocks.wall
    clocks.wall += 3 * DAY_S
    _, doubt = days_at_work(clocks, None, [4] * 5, seen_at)
    clocks.wall += 2 * DAY_S
    assert days_at_work(clocks, doubt, [5], seen_at) == (True, None)
    clocks.wall += YEAR_S
    believed, doubt = days_at_work(clocks, doubt, [5], seen_at)
    assert not believed
    assert doubt is not None
    assert doubt.stood_s == pytest.approx(5 * HOUR_S), "the year after is another date, and begins anew"


def with_an_ended_job(
    make_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> tuple[Daemon, dict[str, Any]]:
    """Return a stopped daemon that keeps ended jobs for no time, and the one that it has."""
    daemon = make_daemon(model=NO_MODEL, retention_days=0)
    daemon.start()
    with daemon.client() as client:
        job = submit(client, recording())
        client.call("cancel", job=job["id"])
    assert daemon.stop() == 0
    return daemon, job


def test_a_daemon_that_starts_years_later_keeps_what_would_be_too_old(
    make_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon, job = with_an_ended_job(make_daemon, recording)
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


def test_a_doubt_goes_on_after_a_restart(make_daemon: Callable[..., Daemon], recording: Callable[..., Path]) -> None:
    daemon, _ = with_an_ended_job(make_daemon, recording)
    mark, kept = daemon.state_dir / "whisperd.lock", daemon.state_dir / "whisperd.doubt"
    mark.touch()
    shift_date(mark, -3 * YEAR_S)
    daemon.start()
    assert daemon.stop() == 0
    stood_s, date = kept.read_text().split()
    assert int(stood_s) == 0, "it was looked at once"
    kept.write_text(kept.read_text().replace(stood_s, f"{DAY_S:012.0f}"))  # as if it had run for a day
    daemon.start()
    with daemon.client() as client:
        wait_until(lambda: client.call("jobs")["jobs"] == [])
        wait_until(lambda: not kept.exists())
    assert mark.stat().st_mtime >= int(date)


def test_what_ends_while_the_date_stands_years_in_the_past_ends_after_what_ended_before(
    make_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = make_daemon(model=NO_MODEL)
    daemon.start()
    assert daemon.stop() == 0
    mark = daemon.state_dir / "whisperd.lock"
    shift_date(mark, 3 * YEAR_S)
    was = mark.stat().st_mtime
    daemon.start()
    with daemon.client() as client:
        job = submit(client, recording())
        assert client.call("cancel", job=job["id"])["job"]["ended_at"] >= was
        assert any("lies 1095 days before" in problem for problem in client.call("health")["problems"])
    assert daemon.stop() == 0
    assert mark.stat().st_mtime >= was, "else a date set right would be a jump"


def shift_date(path: Path, shift_s: float) -> None:
    """Date a file earlier or later than it is."""
    then = path.stat().st_mtime + shift_s
    os.utime(path, (then, then))
