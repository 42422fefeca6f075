"""Fixtures that every test may use, and how a daemon's log gets into a failure's report."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.machine import Machine
from tests.support import Daemon, need, write_noise

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
        for daemon in (daemon for node in item.listchain() for daemon in node.stash.get(_DAEMONS, [])):
            report.sections.append((f"stderr of whisperd in {daemon.folder}", daemon.log()[-20_000:]))
    return report


def _make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Daemon]]:
    daemons = request.node.stash.setdefault(_DAEMONS, [])

    def make(**settings: Any) -> Daemon:
        daemon = Daemon(**settings)
        daemons.append(daemon)
        return daemon

    yield make
    with ExitStack() as stack:  # every daemon ends, whatever the one before it did
        for daemon in daemons:
            stack.callback(daemon.close)


def _start(make: Callable[..., Daemon]) -> Callable[..., Daemon]:
    def start(*, wait: bool = True, ready: bool = False, **settings: Any) -> Daemon:
        daemon = make(**settings)
        daemon.start(wait=wait, ready=ready)
        return daemon

    return start


@pytest.fixture
def make_daemon(request: pytest.FixtureRequest) -> Iterator[Callable[..., Daemon]]:
    """A function that prepares a daemon that is not started; it ends with the test."""
    yield from _make(request)


@pytest.fixture
def start_daemon(make_daemon: Callable[..., Daemon]) -> Callable[..., Daemon]:
    """A function that starts a daemon: `start_daemon(model=..., ready=True, capacity=4)`. It ends with the test."""
    return _start(make_daemon)


@pytest.fixture(scope="module")
def start_module_daemon(request: pytest.FixtureRequest) -> Iterator[Callable[..., Daemon]]:
    """As `start_daemon`, for a module's own fixture: the daemon serves all tests of the module (on one worker)."""
    yield from map(_start, _make(request))


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the micro model."""
    from tests.models import micro_checkpoint  # imports torch, which most tests do without

    return micro_checkpoint(tmp_path_factory.mktemp("micro"))


@pytest.fixture
def recording(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a recording nobody has had before, of so many seconds."""
    numbers = itertools.count(1)
    return lambda seconds=2.0: write_noise(tmp_path / f"noise-{next(numbers)}.wav", seconds)


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """A machine with the installed service, one for all tests of a worker: each leaves it as it found it."""
    from tests.installed import installed_machine  # imports torch

    with installed_machine() as machine:
        yield machine
