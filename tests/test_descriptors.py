"""Closing what clients passed: in threads, so many at most, and known to hang only where it does."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.support import wait_until
from whisperd.daemon.wire.descriptors import Closer


@pytest.fixture
def starved() -> Iterator[None]:
    """Threads that are started do not run for now, as on a machine that is very busy."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(30)
    yield
    sys.setswitchinterval(interval)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_threads_that_have_not_run_yet_are_not_taken_for_ones_that_hang(starved: None) -> None:
    seconds = 0.0
    closer = Closer(4, clock=lambda: seconds)
    seconds = 60.0  # nothing was to be closed for a minute
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
    closer.close(fds)
    for _ in range(10):
        closer.close([])  # each frame asks, with or without descriptors
    told_stuck = closer.stuck()
    sys.setswitchinterval(0.005)
    wait_until(lambda: not any(map(_is_open, fds)))
    assert not told_stuck
