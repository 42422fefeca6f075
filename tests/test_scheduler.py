"""Who is next: turns between users, reserved places, admission. Pure functions, so hypothesis may ask anything."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from whisperd.daemon.scheduler import Turns, Waiting, admits, in_order, pick, places
from whisperd.protocol.jobs import Priority

INTERACTIVE, BACKGROUND = Priority.INTERACTIVE, Priority.BACKGROUND

pieces = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(Priority)), max_size=40).map(
    lambda rows: [Waiting(id=i, uid=uid, priority=p, order=i) for i, (uid, p) in enumerate(rows, 1)]
)


def piece(number: int, uid: int, priority: Priority = BACKGROUND) -> Waiting:
    return Waiting(id=number, uid=uid, priority=priority, order=number)


def test_a_flood_of_one_user_does_not_hold_up_another() -> None:
    waiting = [piece(n, uid=1) for n in range(1, 6)] + [piece(6, uid=2), piece(7, uid=2)]
    assert [p.id for p in in_order(waiting, Turns(16))] == [1, 6, 2, 7, 3, 4, 5]


def test_who_was_served_last_is_served_last() -> None:
    turns = Turns(16)
    turns.serve(BACKGROUND, 1)
    assert [p.id for p in in_order([piece(1, uid=1), piece(2, uid=2)], turns)] == [2, 1]


@given(pieces)
def test_interactive_goes_first_and_nobody_is_left_out(waiting: list[Waiting]) -> None:
    ordered = in_order(waiting, Turns(16))
    assert sorted(p.id for p in ordered) == [p.id for p in waiting]
    kinds = [p.priority for p in ordered]
    assert kinds == sorted(kinds, key=[INTERACTIVE, BACKGROUND].index)


@given(pieces)
def test_each_users_work_keeps_its_order(waiting: list[Waiting]) -> None:
    ordered = in_order(waiting, Turns(16))
    for uid in {p.uid for p in waiting}:
        for priority in Priority:
            mine = [p.order for p in ordered if (p.uid, p.priority) == (uid, priority)]
            assert mine == sorted(mine)


@given(pieces)
def test_in_any_stretch_two_waiting_users_are_served_equally_often(waiting: list[Waiting]) -> None:
    ordered = [p for p in in_order(waiting, Turns(16)) if p.priority is BACKGROUND]
    left = Counter(p.uid for p in ordered)
    served: Counter[int] = Counter()
    for p in ordered:
        served[p.uid] += 1
        left[p.uid] -= 1
        still = [uid for uid in left if left[uid] > 0]
        assert all(served[a] - served[b] <= 1 for a in still for b in still)


@given(pieces, st.integers(1, 6))
def test_the_told_order_is_the_order_of_starting(waiting: list[Waiting], capacity: int) -> None:
    """`position` is told from `in_order`; picking one after the other must do what was told."""
    only = [p for p in waiting if p.priority is BACKGROUND]
    turns = Turns(16)
    told = [p.id for p in in_order(only, turns)]
    started = []
    while only:
        chosen = pick(only, turns, capacity=capacity, busy=dict.fromkeys(Priority, 0))
        assert chosen is not None
        turns.serve(chosen.priority, chosen.uid)
        only.remove(chosen)
        started.append(chosen.id)
    assert started == told


@given(pieces, st.integers(2, 8))
def test_a_place_is_kept_for_each_priority(waiting: list[Waiting], capacity: int) -> None:
    """However much of one kind waits, the other kind finds a place without waiting for an end."""
    busy = dict.fromkeys(Priority, 0)
    turns = Turns(16)
    while (chosen := pick(waiting, turns, capacity=capacity, busy=busy)) is not None:
        busy[chosen.priority] += 1
        waiting = [p for p in waiting if p.id != chosen.id]
        assert sum(busy.values()) <= capacity
    assert busy[BACKGROUND] <= capacity - 1
    if any(p.priority is BACKGROUND for p in waiting):
        assert busy[BACKGROUND] >= 1


def test_background_work_that_arrives_under_interactive_work_finds_the_place_left_to_it() -> None:
    room = places(capacity=2, busy={INTERACTIVE: 1, BACKGROUND: 0}, waiting={INTERACTIVE: 9, BACKGROUND: 1})
    assert room == {INTERACTIVE: 0, BACKGROUND: 1}


def test_a_lane_of_one_place_serves_interactive_first() -> None:
    busy = dict.fromkeys(Priority, 0)
    chosen = pick([piece(1, 1), piece(2, 1, INTERACTIVE)], Turns(16), capacity=1, busy=busy)
    assert chosen is not None
    assert chosen.id == 2


@given(st.integers(2, 50), st.integers(1, 50), st.integers(0, 60))
def test_admission_keeps_places_for_interactive_jobs(capacity: int, reserved: int, waiting: int) -> None:
    for priority in Priority:
        if admits(priority=priority, capacity=capacity, reserved=reserved, waiting=waiting):
            assert waiting < capacity
    if waiting >= capacity - reserved:
        assert not admits(priority=BACKGROUND, capacity=capacity, reserved=reserved, waiting=waiting)
    assert admits(priority=INTERACTIVE, capacity=capacity, reserved=reserved, waiting=waiting) == (waiting < capacity)
