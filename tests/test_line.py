"""A run's place in the queue: found at once, and the same as by sorting all that waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from whisperd.daemon.scheduler import Turns, Waiting, in_order
from whisperd.daemon.state.line import Line
from whisperd.protocol.jobs import Priority

runs, users, priorities = st.integers(1, 12), st.integers(1, 4), st.sampled_from(Priority)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), runs, users, priorities),
        st.tuples(st.just("remove"), runs, users, priorities),
        st.tuples(st.just("serve"), runs, users, priorities),
    ),
    max_size=60,
)


@given(steps)
def test_places_are_those_of_the_scheduler(walk: list[tuple[str, int, int, Priority]]) -> None:
    turns = Turns(16)
    line = Line(turns)
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
        assert {run: line.place(run) for run in ordered} == {run: place for place, run in enumerate(ordered, 1)}
    assert all(line.place(run) is None for run in range(1, 13) if run not in waiting)
