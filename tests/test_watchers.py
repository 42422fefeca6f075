"""Who waits for what, and that nothing is left of who has gone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

from whisperd.daemon.loop import Loop
from whisperd.daemon.server import Peer
from whisperd.daemon.store.rows import Event
from whisperd.daemon.watchers import Wait, Watchers

END = Event(job_id=1, uid=0, seq=3, kind="end", payload={"state": "done", "error": None})


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def peer(number: int) -> Peer:
    return Peer(number, (1, 0, 0), cast(Any, None))


def test_a_wait_is_answered_once(loop: Loop) -> None:
    watchers, seen = Watchers(), []
    watchers.wait(1, peer(1), 7, Wait(lambda: seen.append("end"), loop.call_later(0, lambda: seen.append("late"))))
    watchers.publish([END, END])
    loop.call_later(0, loop.stop)
    loop.run()
    assert seen == ["end"]


def test_a_gone_client_leaves_no_timer_and_is_not_answered(loop: Loop) -> None:
    watchers, seen = Watchers(), []
    gone, there = peer(1), peer(2)
    watchers.wait(1, gone, 7, Wait(lambda: seen.append("gone"), loop.call_later(0, lambda: seen.append("timer"))))
    watchers.wait(1, there, 7, Wait(lambda: seen.append("there"), None))
    watchers.forget_peer(gone)
    loop.call_later(0, loop.stop)
    loop.run()
    watchers.publish([END])
    assert seen == ["there"]


def test_a_job_is_orphaned_by_its_last_holder() -> None:
    watchers = Watchers()
    first, second = peer(1), peer(2)
    watchers.hold(5, first)
    watchers.hold(5, second)
    assert watchers.forget_peer(first) == []
    assert watchers.held(5)
    assert watchers.forget_peer(second) == [5]
    assert not watchers.held(5)
