"""Fixtures that every test may use, and how a daemon's log gets into a failure's report."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from tests.support import Daemon, need

_DAEMONS = pytest.StashKey[list[Daemon]]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run (`support.requires_root` and its kin); in CI that fails."""
    for mark in item.iter_markers("requires"):
        need(*mark.args)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the test's daemons had to say beside its failure."""
    report = yield
    if report.failed:
        for daemon in item.stash.get(_DAEMONS, []):
            report.sections.append((f"stderr of whisperd in {daemon.folder}", daemon.log()[-20_000:]))
    return report


@pytest.fixture
def make_daemon(request: pytest.FixtureRequest) -> Iterator[Callable[..., Daemon]]:
    """A function that prepares a daemon that is not started; it ends with the test."""
    daemons = request.node.stash.setdefault(_DAEMONS, [])

    def make(**settings: Any) -> Daemon:
        daemon = Daemon(**settings)
        daemons.append(daemon)
        return daemon

    yield make
    errors = []
    for daemon in daemons:
        try:
            daemon.close()
        except BaseException as error:  # every daemon ends, whatever the one before it did
            errors.append(error)
    if errors:
        raise errors[0]


@pytest.fixture
def start_daemon(make_daemon: Callable[..., Daemon]) -> Callable[..., Daemon]:
    """A function that starts a daemon: `start_daemon(model=..., ready=True, capacity=4)`. It ends with the test."""

    def start(*, wait: bool = True, ready: bool = False, **settings: Any) -> Daemon:
        daemon = make_daemon(**settings)
        daemon.start(wait=wait, ready=ready)
        return daemon

    return start
