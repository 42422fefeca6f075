"""`retry`, `pause` and `resume`: a job's source once more, and a queue that waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import NO_MODEL, Daemon, RawClient, error_of, requires_root, submit, wait_until
from tests.test_admission import ANNA, client_as

MINUTE_S = 60


@pytest.fixture(scope="module")
def shared(start_module_daemon: Callable[..., Daemon], micro: Path) -> Daemon:
    """One daemon for the tests that leave it as they found it."""
    return start_module_daemon(model=str(micro), ready=True, socket_mode="0666", retention_days=30)


@pytest.fixture
def client(shared: Daemon) -> Iterator[RawClient]:
    with shared.client() as client:
        yield client


def cancelled(client: RawClient, path: Path, **params: Any) -> dict[str, Any]:
    """Return a job that was cancelled before it ended."""
    job = submit(client, path, **params)
    answer = client.call("cancel", job=job["id"])["job"]
    assert answer["state"] == "cancelled"
    return dict(answer)


def spool(daemon: Daemon) -> list[Path]:
    return list((daemon.state_dir / "spool").iterdir())


# --- retry ---


def test_a_cancelled_job_is_done_again_without_its_file(
    client: RawClient, shared: Daemon, recording: Callable[..., Path]
) -> None:
    path = recording(2)
    old = cancelled(client, path, priority="interactive", fresh=True)
    path.unlink()
    new = client.call("retry", job=old["id"])["job"]
    assert new["id"] != old["id"]
    for name in ("uid", "source", "options", "priority"):
        assert new[name] == old[name]
    assert client.result(new["id"])["job"]["state"] == "done"
    assert client.call("result", job=old["id"])["job"]["state"] == "cancelled", "an end is an end"
    wait_until(lambda: not spool(shared), 10, "the audio goes with the end of the new run")


def test_a_job_cancelled_at_work_is_done_again(client: RawClient, recording: Callable[..., Path]) -> None:
    job = submit(client, recording(10 * MINUTE_S))
    wait_until(lambda: client.call("result", job=job["id"])["job"]["state"] == "running")
    client.call("cancel", job=job["id"])
    again = client.call("retry", job=job["id"])["job"]
    wait_until(lambda: client.call("result", job=again["id"])["job"]["state"] == "running")
    assert client.call("cancel", job=again["id"])["job"]["audio_s"] == pytest.approx(600), "it was decoded once"


def test_retries_of_one_job_at_once_share_one_run(
    client: RawClient, shared: Daemon, recording: Callable[..., Path]
) -> None:
    old = cancelled(client, recording(20))
    ids = []

    def ask() -> None:
        with shared.client() as mine:
            ids.append(mine.call("retry", job=old["id"])["job"]["id"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 4
    texts = {client.result(job)["transcript"]["text"] for job in ids}
    assert len(texts) == 1
    later = client.call("retry", job=old["id"])["job"]
    assert later["state"] == "done", "the result is there"


def test_a_retry_that_fails_too_hands_the_audio_on(client: RawClient, tmp_path: Path) -> None:
    path = tmp_path / "noise.wav"
    path.write_bytes(b"no audio at all")
    old = submit(client, path)
    for _ in range(3):
        assert client.result(old["id"])["job"]["error"]["code"] == "bad_audio"
        new = client.call("retry", job=old["id"])["job"]
        assert client.result(new["id"])["job"]["error"]["code"] == "bad_audio"


def test_what_cannot_be_retried_says_why(client: RawClient, recording: Callable[..., Path]) -> None:
    assert error_of(lambda: client.call("retry", job=987_654)) == "not_found"
    job = submit(client, recording(2))
    assert error_of(lambda: client.call("retry", job=job["id"])) == "bad_request"
    client.result(job["id"])
    assert error_of(lambda: client.call("retry", job=job["id"])) == "bad_request"


@requires_root
def test_nobody_retries_the_job_of_another(client: RawClient, shared: Daemon, recording: Callable[..., Path]) -> None:
    old = cancelled(client, recording(2))
    with client_as(shared, ANNA) as anna:
        assert error_of(lambda: anna.call("retry", job=old["id"])) == "not_found"
        mine = cancelled(anna, recording(2))
        assert client.call("retry", job=mine["id"])["job"]["uid"] == ANNA, "an admin's retry is its owner's job"


def test_audio_that_is_not_kept_is_told_of(start_daemon: Callable[..., Daemon], recording: Callable[..., Path]) -> None:
    daemon = start_daemon(model=NO_MODEL, keep_failed_audio_hours=0)
    with daemon.client() as client:
        old = cancelled(client, recording(2))
        daemon.kill()
    daemon.start()  # housekeeping begins at once
    with daemon.client() as client:
        wait_until(lambda: not spool(daemon), 10)
        assert error_of(lambda: client.call("retry", job=old["id"])) == "not_found"


def test_a_retry_survives_kill_9(
    make_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon = make_daemon(model=str(micro))
    daemon.start(ready=True)
    with daemon.client() as client:
        client.call("pause")
        old = cancelled(client, recording(3))
        again = client.call("retry", job=old["id"])["job"]
        daemon.kill()
    daemon.start(ready=True)
    with daemon.client() as client:
        assert client.result(again["id"])["job"]["state"] == "done"
        assert client.call("retry", job=old["id"])["job"]["state"] == "done"


def test_a_retry_waits_for_a_place_like_any_other(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, capacity=2)
    with daemon.client() as client:
        old = cancelled(client, recording(1))
        submit(client, recording(1))
        assert error_of(lambda: client.call("retry", job=old["id"])) == "queue_full"


def test_the_command_line_retries(client: RawClient, shared: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "nothing.wav"
    path.write_bytes(b"nothing in it")
    old = submit(client, path)
    client.result(old["id"])
    by_name = shared.whisperctl("retry", str(old["id"]))
    assert by_name.returncode == 0, by_name.stderr
    client.result(int(by_name.stdout))
    assert client.call("result", job=old["id"])["job"]["retried"]
    failed = [job for job in client.call("jobs", state="failed")["jobs"] if not job["retried"]]
    all_failed = shared.whisperctl("retry", "--failed")
    again = [int(number) for number in all_failed.stdout.split()]
    assert len(again) == len(failed) >= 1
    for number in again:
        client.result(number)
    once_more = shared.whisperctl("retry", "--failed")
    assert len(once_more.stdout.split()) == len(again), "the last try of each, and none of those before it"


# --- pause and resume ---


@pytest.fixture
def to_pause(shared: Daemon, client: RawClient) -> Iterator[Daemon]:
    """The shared daemon, which goes on afterwards whatever the test did."""
    yield shared
    client.call("resume")


def test_a_paused_queue_accepts_and_waits(to_pause: Daemon, client: RawClient, recording: Callable[..., Path]) -> None:
    at_work = submit(client, recording(3 * MINUTE_S))
    wait_until(lambda: client.call("result", job=at_work["id"])["job"]["state"] == "running")
    assert client.call("pause") == {"status": "paused"}
    assert client.call("health")["status"] == "paused"
    waiting = submit(client, recording(2), priority="interactive")
    assert client.result(at_work["id"])["job"]["state"] == "done", "what was begun goes on"
    assert client.call("result", job=waiting["id"])["job"]["state"] == "queued"
    assert to_pause.helpers("whisperd.model.main"), "the model stays loaded"
    assert client.call("resume") == {"status": "ready"}
    assert client.result(waiting["id"])["job"]["state"] == "done"


def test_a_pause_may_free_the_device(to_pause: Daemon, client: RawClient, recording: Callable[..., Path]) -> None:
    job = submit(client, recording(10 * MINUTE_S))
    wait_until(lambda: client.call("result", job=job["id"])["job"]["state"] == "running")
    assert to_pause.whisperctl("pause", "--free-gpu").returncode == 0
    wait_until(lambda: not to_pause.helpers("whisperd.model.main"), 10)
    wait_until(lambda: client.call("result", job=job["id"])["job"]["state"] == "queued", 10)
    assert client.call("health")["model"]["state"] == "unloaded"
    assert to_pause.whisperctl("resume").returncode == 0
    wait_until(lambda: client.call("result", job=job["id"])["job"]["state"] == "running")
    client.call("cancel", job=job["id"])


def test_resume_leaves_a_model_that_was_unloaded_before_the_pause(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model=NO_MODEL)
    with daemon.client() as client:
        client.call("model", action="unload")
        client.call("pause", free_gpu=True)
        client.call("resume")
        assert client.call("health")["model"]["state"] == "unloaded"


def test_resume_leaves_a_model_that_was_unloaded_within_the_pause(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model=NO_MODEL)
    with daemon.client() as client:
        client.call("pause", free_gpu=True)
        client.call("model", action="unload")
        client.call("resume")
        assert client.call("health")["model"]["state"] == "unloaded"
        client.call("pause", free_gpu=True)
        client.call("resume")
        assert client.call("health")["model"]["state"] == "unloaded", "nor by a pause after it"
        client.call("model", action="load")
        client.call("pause", free_gpu=True)
        client.call("resume")
        assert client.call("health")["model"]["state"] != "unloaded", "what a pause has unloaded is loaded again"


@requires_root
def test_only_administrators_pause(shared: Daemon) -> None:
    with client_as(shared, ANNA) as anna:
        assert error_of(lambda: anna.call("pause")) == "forbidden"
        assert error_of(lambda: anna.call("resume")) == "forbidden"
