"""A helper seen from the daemon, with real processes: start, messages, every way to end, and no orphans."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import stop_process, wait_until
from tests.watched_helper import Watched
from whisperd.daemon.helpers.helper import ExitReason, Helper
from whisperd.daemon.helpers.spawning import spawner
from whisperd.daemon.loop import Loop
from whisperd.protocol.helper_messages import Copied, Failed, Finished

ROOT = Path(__file__).parents[1]


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def watch(loop: Loop) -> Iterator[Callable[..., Watched]]:
    """A function that starts a helper; it ends with the test, and leaves no descriptor behind."""
    spawner()  # it stays, once it is there
    before = len(os.listdir("/proc/self/fd"))
    watched: list[Watched] = []

    def start(**arguments: Any) -> Watched:
        watched.append(Watched(loop, **arguments))
        return watched[-1]

    yield start
    for one in watched:
        one.helper.kill("the test is over")
        one.ended()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_it_starts_is_configured_and_sends_heartbeats(watch: Callable[..., Watched]) -> None:
    odd = watch()
    assert odd.helper.alive
    assert not odd.helper.ready
    odd.order("settings")  # before the hello: it waits for its turn
    assert odd.answer() == Failed(run=1, generation=2, code="settings", message="green")
    assert odd.helper.ready
    odd.order("nice")
    assert odd.answer() == Failed(run=1, generation=2, code="nice", message=str(min(19, os.nice(0) + 3)))
    odd.until(lambda: odd.heartbeats)
    assert odd.helper.rss_bytes() > 1_000_000


def test_it_inherits_its_environment_and_nothing_else(watch: Callable[..., Watched]) -> None:
    extra, other = socket.socketpair()
    os.set_inheritable(extra.fileno(), True)
    first = watch()
    second = watch()
    for odd in (first, second):
        odd.order("environment")
        answer = odd.answer()
        assert isinstance(answer, Failed)
        # The last two it has from the package that it lies in itself, the tests'.
        known = {"PATH", "PYTHONPATH", "LC_CTYPE", "GOMP_SPINCOUNT", "NUMBA_CACHE_DIR"}
        assert set(answer.message.split(",")) <= known
        odd.order("descriptors")
        answer = odd.answer()
        assert isinstance(answer, Failed)
        assert len(answer.message.split(",")) == 4, "standard input, output and error, and its end of the socket"
    extra.close()
    other.close()


def test_descriptors_travel_and_the_caller_keeps_its_own(watch: Callable[..., Watched], tmp_path: Path) -> None:
    odd = watch()
    (tmp_path / "file").write_text("the bytes")
    with (tmp_path / "file").open() as file:
        odd.order("read", [file.fileno()])
        odd.order("read", [file.fileno(), file.fileno()])
    assert odd.answer() == Copied(run=1, generation=2, sha256="the bytes", size_bytes=1)
    assert odd.answer() == Copied(run=1, generation=2, sha256="the bytes", size_bytes=2)


def test_a_large_result_arrives_whole_and_in_slices(watch: Callable[..., Watched], loop: Loop) -> None:
    odd = watch()
    odd.until(lambda: odd.helper.ready)
    turns = loop.turns
    odd.order(f"finish {10_000_000}")
    answer = odd.answer()
    assert isinstance(answer, Finished)
    assert len(answer.transcript) == 10_000_000
    assert loop.turns - turns > 10_000_000 / (256 * 1024), "the loop had turns for others meanwhile"


def test_much_that_is_sent_to_a_helper_that_does_not_read_does_not_wait(watch: Callable[..., Watched]) -> None:
    odd = watch()
    odd.order("stop")
    odd.until(lambda: odd.helper.ready)
    wait_until(lambda: psutil.Process(odd.helper.pid).status() == psutil.STATUS_STOPPED)
    with open("/dev/null") as file:
        for _ in range(2000):
            odd.order("nothing " + "x" * 4000, [file.fileno()] if _ % 100 == 0 else [])
    odd.order("settings")
    os.kill(odd.helper.pid, signal.SIGCONT)
    assert odd.answer() == Failed(run=1, generation=2, code="settings", message="green")


@pytest.mark.parametrize("code", [0, 3])
def test_an_exit_is_noticed_after_its_last_words(watch: Callable[..., Watched], code: int) -> None:
    odd = watch()
    odd.order(f"exit {code}")
    reason = odd.ended()
    assert reason == ExitReason(returncode=code, signal=None, reason=f"ended with exit code {code}", ready=True)
    assert odd.messages == [Failed(run=1, generation=2, code="last", message="words")]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_is_noticed_and_named(watch: Callable[..., Watched], number: signal.Signals) -> None:
    odd = watch()
    odd.order(f"signal {number.value}")
    reason = odd.ended()
    assert reason == ExitReason(returncode=None, signal=number, reason=f"killed by {number.name}", ready=True)


def test_silence_ends_it(watch: Callable[..., Watched]) -> None:
    odd = watch(heartbeat_timeout_s=3)
    odd.order("stop")
    reason = odd.ended()
    assert (reason.reason, reason.signal, reason.ready) == ("silent", signal.SIGKILL, True)


def test_heartbeats_keep_it_alive(watch: Callable[..., Watched], loop: Loop) -> None:
    odd = watch(heartbeat_timeout_s=3)
    odd.until(lambda: len(odd.heartbeats) >= 5)
    assert not odd.exits


def test_a_daemon_that_stood_still_does_not_take_its_helpers_for_silent(watch: Callable[..., Watched]) -> None:
    now = [0.0]
    late = Loop(clock=lambda: now[0])
    odd = Watched(late, heartbeat_timeout_s=3)
    # Its hello lies in the socket while the clock jumps: that is how it looks after a long stop.
    wait_until(lambda: _readable(odd.helper))
    now[0] = 100.0
    late.call_soon(late.stop)
    late.run()
    assert odd.helper.ready
    assert odd.helper.alive
    odd.helper.kill("over")
    wait_until(lambda: not psutil.pid_exists(odd.helper.pid) or _is_zombie(odd.helper.pid))
    late.call_soon(lambda: late.call_soon(late.stop))
    late.run()
    assert odd.exits
    late.close()


def _readable(helper: Helper) -> bool:
    try:
        return bool(helper._socket.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def _is_zombie(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("command", ["garbage", "unknown"])
def test_what_is_no_message_ends_it(watch: Callable[..., Watched], command: str) -> None:
    odd = watch()
    odd.order(command)
    assert odd.ended().reason.startswith("sent what is no message")


def test_one_that_closes_its_socket_and_lives_on_is_ended(watch: Callable[..., Watched]) -> None:
    assert watch(start="hang-up").ended().reason == "closed its socket"


def test_another_version_on_disk_is_refused(watch: Callable[..., Watched], caplog: pytest.LogCaptureFixture) -> None:
    reason = watch(start="version").ended()
    assert not reason.ready
    assert "0.0.1" in reason.reason
    assert "restart whisperd" in caplog.text


def test_a_message_before_the_hello_ends_it(watch: Callable[..., Watched]) -> None:
    odd = watch(start="no hello")
    assert odd.ended().reason == "sent Failed out of turn"
    assert odd.messages == []


def test_an_exit_before_the_hello_says_so(watch: Callable[..., Watched]) -> None:
    assert watch(start="exit").ended() == ExitReason(
        returncode=7, signal=None, reason="ended with exit code 7", ready=False
    )


def test_a_module_that_is_not_there(watch: Callable[..., Watched]) -> None:
    reason = watch(module="tests.no_such_helper").ended()
    assert (reason.returncode, reason.ready) == (1, False)


def test_a_process_that_cannot_be_started_is_an_exit_too(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    odd = Watched(loop)
    assert not odd.helper.alive
    assert odd.exits == [], "told by the loop, not from inside the call"
    odd.order("settings")
    odd.helper.kill("anyway")
    odd.helper.close()
    odd.until(lambda: odd.exits)
    assert odd.exits[0].reason.startswith("could not be started")


def test_kill_tells_its_first_reason_and_nothing_is_heard_after_it(watch: Callable[..., Watched]) -> None:
    odd = watch()
    odd.until(lambda: odd.helper.ready)
    odd.order("settings")
    wait_until(lambda: _readable(odd.helper))
    odd.helper.kill("did not cancel")
    odd.helper.kill("again")
    odd.helper.close()
    odd.order("settings")
    assert odd.ended().reason == "did not cancel"
    assert odd.messages == []


def test_close_lets_it_end_by_itself(watch: Callable[..., Watched]) -> None:
    odd = watch()
    odd.until(lambda: odd.helper.ready)
    odd.helper.close()
    assert odd.ended() == ExitReason(returncode=0, signal=None, reason="closed", ready=True)


def test_close_kills_one_that_does_not_end(watch: Callable[..., Watched]) -> None:
    odd = watch()
    odd.until(lambda: odd.helper.ready)
    stop_process(odd.helper.pid)
    odd.helper.close(grace_s=0.2)
    assert odd.ended() == ExitReason(returncode=None, signal=signal.SIGKILL, reason="closed", ready=True)


def test_a_handler_that_fails_does_not_end_it(watch: Callable[..., Watched], caplog: pytest.LogCaptureFixture) -> None:
    odd = watch()
    odd.helper._on_message = lambda helper, message: [][1]
    odd.order("settings")
    odd.until(lambda: "message failed" in caplog.text)
    assert odd.helper.alive


_DAEMON = textwrap.dedent("""
    import os, signal
    from tests.test_helper_supervision import Loop, Watched
    loop = Loop()
    odd = [Watched(loop), Watched(loop)]
    odd[1].until(lambda: all(one.helper.ready for one in odd))
    odd[0].order("stop")
    print(*(one.helper.pid for one in odd), flush=True)
    loop.run()
""")


def test_no_helper_outlives_a_daemon_that_is_killed(tmp_path: Path) -> None:
    daemon = subprocess.Popen([sys.executable, "-c", _DAEMON], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    pids = [int(pid) for pid in daemon.stdout.readline().split()]
    assert len(pids) == 2
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()
    wait_until(lambda: not any(psutil.pid_exists(pid) and not _is_zombie(pid) for pid in pids))


def test_a_module_of_the_working_directory_is_not_imported(
    watch: Callable[..., Watched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    (tmp_path / "socket.py").write_text("raise SystemExit('the wrong socket')")
    monkeypatch.chdir(tmp_path)
    odd = watch()
    odd.until(lambda: odd.helper.ready or odd.exits)
    assert odd.helper.ready
