"""A helper that systemd starts for our connection: as one of our own, but that only the connection tells of its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.media_server import serving
from tests.superserver import Superserver, superserver
from tests.support import NO_MODEL, requires_root, running_daemon, wait_until, write_noise
from tests.watched_helper import Watched
from whisperd.daemon.loop import Loop
from whisperd.daemon.state.spool import Spool
from whisperd.protocol.helper_messages import Failed


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def units(tmp_path: Path) -> Iterator[Superserver]:
    with superserver(tmp_path / "odd.sock", "tests.odd_helper") as server:
        yield server


@pytest.fixture
def watch(loop: Loop, units: Superserver) -> Callable[..., Watched]:
    return lambda **arguments: Watched(loop, address=arguments.pop("address", units.path), **arguments)


def test_it_is_connected_to_configured_and_told_apart_by_its_pid(watch: Callable[..., Watched]) -> None:
    odd = watch()
    assert odd.helper.pid == 0, "nobody knows yet"
    odd.order("settings")
    assert odd.answer() == Failed(run=1, generation=2, code="settings", message="green")
    odd.until(lambda: odd.heartbeats)
    assert odd.helper.pid not in (0, os.getpid())
    odd.helper.kill("the test is over")
    assert odd.ended().reason == "the test is over"


@pytest.mark.parametrize("order", ["exit 3", f"signal {signal.SIGKILL}"])
def test_its_death_is_noticed_after_its_last_words(watch: Callable[..., Watched], order: str) -> None:
    odd = watch()
    odd.order(order)
    reason = odd.ended()
    assert (reason.ready, reason.returncode, reason.signal) == (True, None, None)
    assert reason.reason == "its unit ended; the unit's own log says more"
    assert len(odd.messages) == order.startswith("exit")


@pytest.mark.parametrize("end", ["kill", "close"])
def test_hanging_up_ends_it(watch: Callable[..., Watched], units: Superserver, end: str) -> None:
    odd = watch()
    odd.order("settings")
    odd.answer()
    assert units.alive
    odd.helper.kill("enough") if end == "kill" else odd.helper.close()
    assert odd.ended().reason == {"kill": "enough", "close": "closed"}[end]
    wait_until(lambda: not units.alive, 10, "it ends")


def test_one_that_is_silent_is_given_up(watch: Callable[..., Watched], units: Superserver) -> None:
    odd = watch(heartbeat_timeout_s=1)
    odd.order("stop")
    odd.until(lambda: odd.exits)
    assert odd.exits[0].reason == "silent"
    units.alive[0].kill()  # that is the watchdog's part


def test_another_version_behind_the_socket_is_refused(loop: Loop, tmp_path: Path) -> None:
    with superserver(tmp_path / "old.sock", "tests.old_helper"):
        odd = Watched(loop, address=tmp_path / "old.sock")
        odd.order("settings")
        reason = odd.ended()
    assert not reason.ready
    assert "0.0.1" in reason.reason
    assert "restart whisperd" in reason.reason


def test_nobody_there_is_a_failed_start(watch: Callable[..., Watched], tmp_path: Path) -> None:
    odd = watch(address=tmp_path / "nobody.sock")
    assert not odd.helper.alive
    reason = odd.ended()
    assert not reason.ready
    assert reason.reason.startswith("could not be started")


@requires_root
def test_a_socket_of_another_user_is_not_trusted(loop: Loop, tmp_path: Path) -> None:
    path = tmp_path / "his.sock"
    listen = (
        f"import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); os.setuid(1234)\n"
        "s.listen(); print('listening', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", listen], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        odd = Watched(loop, address=path)
        assert "belongs to uid 1234" in odd.ended().reason
        process.communicate()


@requires_root
def test_an_instance_serves_its_daemon_alone() -> None:
    ours, theirs = socket.socketpair()  # of root, and another is named
    with ours, theirs:
        command = [sys.executable, "-m", "whisperd.fetch.fetcher", "--fd", str(theirs.fileno()), "--peer", "daemon"]
        done = subprocess.run(command, pass_fds=[theirs.fileno()], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "uid 0 has connected, and only daemon may" in done.stderr
        theirs.close()
        assert ours.recv(1) == b""


def test_each_download_has_a_process_of_its_own(tmp_path: Path) -> None:
    settings = {"fetch_allow_private": True, "fetch_extractors": ["generic"], "fetchers": 1, "log_level": "debug"}
    fetcher, path = "whisperd.fetch.fetcher", tmp_path / "fetch.sock"
    with (
        serving(write_noise(tmp_path / "talk.wav", 2)) as web,
        superserver(path, fetcher) as units,
        running_daemon(model=NO_MODEL, fetch_socket=str(path), **settings) as daemon,
        daemon.client() as client,
    ):
        assert client.call("stats", inspect=True)["lanes"]["fetch"]["yt_dlp"]
        wait_until(lambda: units.started and not units.alive, 10, "one that was only asked for its version goes")
        units.started.clear()
        jobs = [client.call("submit", source={"kind": "url", "url": web.url(f"{n}.wav")})["job"]["id"] for n in (1, 2)]
        for job in jobs:
            fetched = lambda job=job: client.call("result", job=job)["job"]["state"] == "queued"  # noqa: E731
            wait_until(fetched, 30, "it is downloaded, and waits for a model")
        assert len(units.started) == 2
        wait_until(lambda: not units.alive, 10, "they end with their work")
        assert not any((daemon.state_dir / "downloads").iterdir())


# --- what was downloaded, by somebody who may be somebody else by now ---


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "spool")
    spool.make()
    return spool


def test_a_download_is_taken_over_once_however_often(spool: Spool) -> None:
    (spool.downloads / "a").mkdir()
    (spool.downloads / "a/source").write_text("sound")
    for _ in range(2):
        spool.adopt("a")
    assert (spool.path / "a/source").read_text() == "sound"
    assert not (spool.downloads / "a").exists()


def test_a_link_is_not_followed(spool: Spool) -> None:
    """A fetcher that a site has taken over must not get at another's recording by it."""
    (spool.path / "other").mkdir()
    (spool.path / "other/source").write_text("secret")
    (spool.downloads / "folder").symlink_to(spool.path / "other")
    with pytest.raises(OSError, match="folder"):
        spool.adopt("folder")
    (spool.downloads / "file").mkdir()
    (spool.downloads / "file/source").symlink_to(spool.path / "other/source")
    with pytest.raises(OSError, match="no plain file"):
        spool.adopt("file")
    assert (spool.path / "other/source").read_text() == "secret"
