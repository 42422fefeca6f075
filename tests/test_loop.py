"""The loop: timers in order, calls from threads and signals, callbacks that fail, descriptors used again."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from whisperd.daemon.loop import READ, WRITE, Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def test_timers_run_in_order_of_time_then_of_making(loop: Loop) -> None:
    seen: list[str] = []
    loop.call_later(0.02, lambda: seen.append("late"))
    now = loop.time()
    loop.call_at(now, lambda: seen.append("first"))
    loop.call_at(now, lambda: seen.append("second"))
    loop.call_later(0.03, loop.stop)
    loop.run()
    assert seen == ["first", "second", "late"]


def test_a_cancelled_timer_does_not_run_and_may_be_cancelled_again(loop: Loop) -> None:
    seen: list[str] = []
    first = loop.call_later(0, lambda: seen.append("no"))
    first.cancel()
    first.cancel()
    done = loop.call_later(0, loop.stop)
    loop.run()
    done.cancel()
    assert seen == []


def test_cancelled_timers_do_not_pile_up(loop: Loop) -> None:
    kept = loop.call_later(3600, loop.stop)
    for _ in range(10_000):
        loop.call_later(3600, loop.stop).cancel()
    assert len(loop._timers) < 200
    kept.cancel()


def test_a_timer_that_is_decades_away_does_not_end_the_loop(loop: Loop) -> None:
    loop.call_later(1e9, loop.stop)  # epoll refuses such a wait
    threading.Timer(0.05, loop.call_soon_threadsafe, [loop.stop]).start()
    loop.run()


def test_a_clock_that_stands_still_does_not_hold_the_loop() -> None:
    loop = Loop(clock=lambda: 100.0)
    ours, theirs = socket.socketpair()

    def again() -> None:
        loop.call_later(0, again)

    again()
    loop.register(ours, READ, lambda events: loop.stop())
    theirs.send(b"x")
    loop.run()
    loop.close()
    ours.close()
    theirs.close()


def test_calls_that_call_again_leave_turns_to_descriptors(loop: Loop) -> None:
    ours, theirs = socket.socketpair()

    def again() -> None:
        loop.call_soon(again)

    again()
    loop.register(ours, READ, lambda events: loop.stop())
    theirs.send(b"x")
    loop.run()
    ours.close()
    theirs.close()


def test_calls_that_take_long_leave_turns_to_descriptors() -> None:
    """However many calls are in hand: a second client's `health` does not wait for all of them."""
    now = [0.0]
    loop = Loop(clock=lambda: now[0])
    ours, theirs = socket.socketpair()
    done: list[int] = []

    def take_a_millisecond(number: int) -> None:
        now[0] += 0.001
        done.append(number)

    for number in range(1000):
        loop.call_soon(lambda number=number: take_a_millisecond(number))  # type: ignore[misc]
    loop.register(ours, READ, lambda events: loop.stop())
    theirs.send(b"x")
    loop.run()
    assert 0 < len(done) < 20
    loop.unregister(ours)
    loop.call_soon(loop.stop)
    loop.run()
    assert done == list(range(1000)), "in order, and none is lost"
    loop.close()
    ours.close()
    theirs.close()


def test_threads_wake_the_loop_and_their_calls_keep_their_order(loop: Loop) -> None:
    seen: list[int] = []

    def work() -> None:
        for number in range(5000):
            loop.call_soon_threadsafe(lambda number=number: seen.append(number))  # type: ignore[misc]
        loop.call_soon_threadsafe(loop.stop)

    thread = threading.Thread(target=work)
    thread.start()
    loop.run()
    thread.join()
    assert seen == list(range(5000))


def test_an_idle_loop_waits(loop: Loop) -> None:
    loop.call_later(0.3, loop.stop)
    loop.run()
    assert loop.turns <= 5


def test_signals_are_calls(loop: Loop) -> None:
    old = signal.getsignal(signal.SIGUSR1)
    seen: list[str] = []
    loop.on_signal(signal.SIGUSR1, lambda: seen.append("usr1"))
    loop.on_signal(signal.SIGUSR2, loop.stop)
    loop.call_soon(lambda: os.kill(os.getpid(), signal.SIGUSR1))
    loop.call_later(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    loop.run()
    assert seen == ["usr1"]
    loop.close()
    assert signal.getsignal(signal.SIGUSR1) == old


def test_a_failing_callback_is_logged_and_the_loop_goes_on(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("on purpose")

    with caplog.at_level(logging.ERROR):
        loop.call_soon(fail)
        loop.call_later(0, fail)
        loop.call_later(0.01, loop.stop)
        loop.run()
    assert caplog.text.count("ValueError: on purpose") == 2


def test_no_stale_event_reaches_a_number_that_is_used_again(loop: Loop) -> None:
    first, first_far = socket.socketpair()
    second, second_far = socket.socketpair()
    third: list[socket.socket] = []
    seen: list[str] = []

    def end_the_other(sock: socket.socket, other: socket.socket) -> None:
        """Whichever runs first closes the other and registers a new, silent socket under its number."""
        seen.append("ran")
        sock.recv(1)
        number = other.fileno()
        loop.unregister(other)
        other.close()
        third.extend(socket.socketpair())
        assert third[0].fileno() == number
        loop.register(third[0], READ, lambda events: seen.append("stale"))
        loop.call_later(0.02, loop.stop)

    loop.register(first, READ, lambda events: end_the_other(first, second))
    loop.register(second, READ, lambda events: end_the_other(second, first))
    first_far.send(b"x")
    second_far.send(b"x")
    loop.run()
    assert seen == ["ran"]
    for sock in (first, first_far, second, second_far, *third):
        sock.close()


def test_a_hang_up_is_reported_even_where_nothing_is_waited_for(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    theirs.send(b"unread")
    seen: list[int] = []

    def on_event(events: int) -> None:
        seen.append(events)
        loop.unregister(ours)
        loop.stop()

    loop.register(ours, 0, on_event)
    loop.call_later(0.02, theirs.close)
    loop.run()
    assert seen == [READ | WRITE]
    assert loop.turns <= 4, "data of which nothing is wanted does not wake it"
    ours.close()


def test_registering_twice_is_an_error_and_unregistering_twice_is_not(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    loop.register(ours, READ, lambda events: None)
    with pytest.raises(KeyError):
        loop.register(ours, READ, lambda events: None)
    loop.unregister(ours)
    loop.unregister(ours)
    ours.close()
    theirs.close()


def test_run_can_be_called_again(loop: Loop) -> None:
    loop.call_soon(loop.stop)
    loop.run()
    seen: list[str] = []
    loop.call_soon(lambda: seen.append("again"))
    loop.call_soon(loop.stop)
    loop.run()
    assert seen == ["again"]
