"""A store call may run several times, each but the last undone: a daemon that runs each of them twice, at work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.media_server import serving
from tests.support import Daemon, error_of, submit, wait_until
from tests.test_fetch_system import SETTINGS, ended, fetch, state
from tests.test_resume_system import Follower, check_whole, kill_helper, settle

REHEARSED = Path(__file__).with_name("rehearsed")


def test_a_run_that_is_cut_off_goes_on_though_its_start_was_made_twice(
    make_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon = make_daemon(model=str(micro), log_level="debug", helper_backoff_s=0.01)
    daemon.variables["PYTHONPATH"] = str(REHEARSED)
    daemon.start(ready=True)
    with daemon.client() as client:
        follower = Follower(daemon, submit(client, recording(300))["id"])
    follower.until_it_speaks()
    settle(daemon)
    kill_helper(daemon)
    follower.reconnect()
    check_whole(daemon, follower, run=1, cuts=1)


def test_files_downloads_keys_and_retries_are_made_once(
    make_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon = make_daemon(model=str(micro), **SETTINGS)
    daemon.variables["PYTHONPATH"] = str(REHEARSED)
    daemon.start(ready=True)
    path = recording(5)
    with serving(path) as server, daemon.client() as client:
        first = submit(client, path, key="k")
        assert submit(client, path, key="k")["id"] == first["id"]
        assert error_of(lambda: submit(client, recording(1), key="k")) == "key_conflict"
        assert ended(client, first)["state"] == "done"
        video = fetch(client, server.url("talk.wav"))
        assert ended(client, video)["state"] == "done"
        other = fetch(client, server.url("slow/talk.wav"))
        wait_until(lambda: state(client, other) == "fetching")
        client.call("cancel", job=other["id"])
        server.go_on.set()
        assert client.result(client.call("retry", job=other["id"])["job"]["id"])["job"]["state"] == "done"
        ids = [job["id"] for job in client.call("jobs")["jobs"]]
        assert len(ids) == 4, "two submits under one key, two downloads and a retry"
        for number in ids:
            client.call("forget", job=number)
        assert client.call("jobs")["jobs"] == []
        wait_until(lambda: not list((daemon.state_dir / "spool").iterdir()))
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log()
