"""The order of what waits: found at once, the same as by sorting all of it, and no lane walks a long queue for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_server import settings
from tests.test_telling import rows
from whisperd.daemon.house import House
from whisperd.daemon.loop import Loop
from whisperd.daemon.scheduler import Turns, Waiting, in_order, pick
from whisperd.daemon.state.board import LiveRun
from whisperd.daemon.state.line import Line
from whisperd.daemon.store.ballast import Ballast
from whisperd.daemon.store.database import Database
from whisperd.protocol.jobs import JobState, Priority

runs, users, priorities = st.integers(1, 12), st.integers(1, 4), st.sampled_from(Priority)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), runs, users, priorities),
        st.tuples(st.just("remove"), runs, users, priorities),
        st.tuples(st.just("serve"), runs, users, priorities),
    ),
    max_size=60,
)


@given(steps, st.sets(runs), st.integers(1, 4))
def test_places_and_who_is_next_are_those_of_the_scheduler(
    walk: list[tuple[str, int, int, Priority]], barred: set[int], capacity: int
) -> None:
    turns = Turns(16)
    line = Line()
    waiting: dict[int, Waiting] = {}
    for step, run, user, priority in walk:
        uid = waiting[run].uid if run in waiting else user  # a run stays its user's
        if step == "put":
            moved = line.put(run, uid, priority)
            assert moved == (run not in waiting or waiting[run].priority is not priority)
            waiting[run] = Waiting(id=run, uid=uid, priority=priority, order=run)
        elif step == "remove":
            assert line.remove(run) == (waiting.pop(run, None) is not None)
        else:
            turns.serve(priority, user)
        ordered = [piece.id for piece in in_order(waiting.values(), turns)]
        assert {run: line.place(run, turns) for run in ordered} == {run: place for place, run in enumerate(ordered, 1)}
        assert set(line) == set(waiting)
        assert len(line) == len(waiting)
        counts = Counter(piece.priority for piece in waiting.values())
        assert {priority: line.count(priority) for priority in Priority} == {each: counts[each] for each in Priority}
        open_ = [piece for piece in waiting.values() if piece.id not in barred]
        for background in (0, 1):
            busy = {Priority.INTERACTIVE: 0, Priority.BACKGROUND: background}
            heads = line.heads(Priority, lambda run: run not in barred)
            assert pick(heads, turns, capacity=capacity, busy=busy) == pick(open_, turns, capacity=capacity, busy=busy)
    assert all(line.place(run, turns) is None for run in range(1, 13) if run not in waiting)


# --- in a whole house with a long queue ---

MANY = 10_000


class CountedRun(LiveRun):
    """A live run that counts how often any of its kind is looked at."""

    looks = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "row":
            CountedRun.looks += 1
        return super().__getattribute__(name)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """All the parts of a daemon. Its loop stands still, so who is given work has it for ever."""
    config = settings(tmp_path, ballast_bytes=0)
    loop = Loop()
    database = Database(
        tmp_path / "db", ballast=Ballast(tmp_path / "ballast", 0), deliver=loop.call_soon, failed=pytest.fail
    )
    house = House(loop, config, database)
    yield house
    house.stop()
    house.when_helpers_left(lambda: loop.call_soon(loop.stop))
    loop.run()
    loop.close()
    database.connection.close()


def fill(house: House, state: JobState, *, decoded: bool) -> None:
    """Let so many jobs of one user wait."""
    for number in range(1, MANY + 1):
        house.board.apply(rows(number, state, decoded=decoded))
    house.board.runs.update({run_id: CountedRun(live.row, live.phase) for run_id, live in house.board.runs.items()})
    CountedRun.looks = 0


def looks_at(house: House, lane: Any) -> int:
    """Return how many of those who wait a pump looks at."""
    CountedRun.looks = 0
    lane.pump()
    return CountedRun.looks


@pytest.mark.parametrize("name", ["fetching", "decoding"])
def test_a_pump_does_not_walk_the_queue(house: House, name: str) -> None:
    lane = getattr(house, name)
    fill(house, JobState.PENDING if name == "fetching" else JobState.QUEUED, decoded=False)
    assert looks_at(house, lane) < 10
    assert lane.waiting >= MANY - 1, "one was begun: of two places one is kept for who is urgent"
    assert looks_at(house, lane) < 10, "that place is free"
    house.board.apply(rows(MANY + 1, house.board.runs[1].row.state, Priority.INTERACTIVE, decoded=False))
    assert looks_at(house, lane) < 10
    assert looks_at(house, lane) == 0, "no place is free"


def test_a_model_with_nothing_to_do_does_not_walk_the_queue(house: House) -> None:
    fill(house, JobState.PENDING, decoded=False)
    house.board.apply(rows(MANY + 1))
    CountedRun.looks = 0
    assert [run.row.id for run in house.modelling.candidates()] == [MANY + 1]
    assert CountedRun.looks == 0
