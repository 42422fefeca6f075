"""Who waits for what, and that nothing is left of who has gone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

from tests.support import error_of
from whisperd.daemon.loop import Loop
from whisperd.daemon.store.rows import Event
from whisperd.daemon.watchers import Wait, Watchers
from whisperd.daemon.wire.server import Peer

END = Event(job_id=1, uid=0, seq=3, kind="end", payload={"state": "done", "error": None})


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def peer(number: int, uid: int = 0) -> Peer:
    return Peer(number, (1, uid, 0), cast(Any, None))


def some_watchers(*, most_per_user: int = 100) -> Watchers:
    return Watchers(most_per_user=most_per_user, unlimited=lambda uid: uid == 0)


def test_a_wait_is_answered_once(loop: Loop) -> None:
    watchers, seen = some_watchers(), []
    late = loop.call_later(0, lambda: seen.append("late"))
    watchers.wait(1, 7, Wait(peer(1), lambda: seen.append("end"), late))
    watchers.publish([END, END])
    loop.call_later(0, loop.stop)
    loop.run()
    assert seen == ["end"]


def test_a_gone_client_leaves_no_timer_and_is_not_answered(loop: Loop) -> None:
    watchers, seen = some_watchers(), []
    gone, there = peer(1), peer(2)
    timer = loop.call_later(0, lambda: seen.append("timer"))
    watchers.wait(1, 7, Wait(gone, lambda: seen.append("gone"), timer))
    watchers.wait(1, 7, Wait(there, lambda: seen.append("there"), None))
    watchers.forget_peer(gone)
    loop.call_later(0, loop.stop)
    loop.run()
    watchers.publish([END])
    assert seen == ["there"]


def test_a_job_is_orphaned_by_its_last_holder() -> None:
    watchers = some_watchers()
    first, second = peer(1), peer(2)
    watchers.hold(5, first)
    watchers.hold(5, second)
    assert watchers.forget_peer(first) == []
    assert watchers.held(5)
    assert watchers.forget_peer(second) == [5]
    assert not watchers.held(5)


def test_what_one_user_may_wait_for_is_bounded_and_free_again_when_it_ends() -> None:
    watchers, (first, second, admin) = some_watchers(most_per_user=3), (peer(1, 5), peer(2, 5), peer(3))
    for number, client in ((1, first), (2, first), (1, second)):
        watchers.admit(client, number)
        watchers.wait(1, number, Wait(client, lambda: None, None))
    assert error_of(lambda: watchers.admit(second, 2)) == "quota_exceeded"
    watchers.admit(admin, 1)
    watchers.admit(peer(4, 6), 1)
    watchers.forget_peer(first)
    watchers.admit(second, 2)
    watchers.publish([END])
    watchers.release(second, 2)
    watchers.release(second, 2)
    for number in (3, 4, 5):
        watchers.admit(second, number)
    assert error_of(lambda: watchers.admit(second, 6)) == "quota_exceeded"


def test_many_who_leave_at_once_cost_what_they_had_and_no_more() -> None:
    # Looking through everybody's waits for each who leaves would take minutes here.
    watchers, peers = some_watchers(), [peer(number) for number in range(6000)]
    for client in peers:
        for number in range(10):
            watchers.wait(number, number, Wait(client, lambda: None, None))
        watchers.hold(client.id, client)
    for client in peers:
        assert watchers.forget_peer(client) == [client.id]
    watchers.publish([END])
