"""The model's process dies: who is to blame is found out, and nobody else pays for it."""

from __future__ import annotations

import signal
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.deadly.sitecustomize import POISON
from tests.support import PLAIN_OPTIONS, Daemon, RawClient, submit, wait_until

DEADLY = Path(__file__).with_name("deadly")
MODEL = "whisperd.model.main"


def deadly_daemon(make_daemon: Callable[..., Daemon], micro: Path, **settings: object) -> tuple[Daemon, Path]:
    """Start a daemon whose model's process can die; return it with the file that makes the device sick."""
    daemon = make_daemon(model=str(micro), helper_backoff_s=0.01, suspect_windows=2, **settings)
    sick = daemon.folder / "sick"
    daemon.variables = {"PYTHONPATH": str(DEADLY), "DEADLY_SICK": str(sick)}
    daemon.start(ready=True)
    return daemon, sick


def write_poison(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        noise = np.random.default_rng(9).integers(-3000, 3000, 16_000, dtype=np.int16)
        file.writeframes(POISON + noise.tobytes())
    return path


def state_of(client: RawClient, job: int) -> str:
    return str(client.call("result", job=job)["job"]["state"])


def test_a_poison_recording_is_found_among_innocent_ones(
    make_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path], tmp_path: Path
) -> None:
    daemon, _ = deadly_daemon(make_daemon, micro)
    with daemon.client() as client:
        innocent = [submit(client, recording(300))["id"] for _ in range(2)]
        for job in innocent:
            wait_until(lambda job=job: state_of(client, job) == "running")
        poison = submit(client, write_poison(tmp_path / "poison.wav"))["id"]
        late = submit(client, recording(2), priority="interactive")["id"]
        end = client.result(poison)["job"]
        assert (end["state"], end["error"]["code"]) == ("failed", "worker_crashed")
        assert end["attempts"] == 4, "once in company, which did not count, and three times alone"
        assert client.result(late)["job"]["state"] == "done"
        # They are beside each other again long before one of them ends.
        wait_until(lambda: all(state_of(client, job) == "running" for job in innocent))
        for job in innocent:
            done = client.result(job)["job"]
            assert (done["state"], done["error"]) == ("done", None)
        assert client.call("stats")["model"]["crashes"] == 4
        assert client.call("health")["problems"] == []


def test_a_sick_device_fails_nobody(
    make_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path], tmp_path: Path
) -> None:
    daemon, sick = deadly_daemon(make_daemon, micro, sick_rest_s=3600)
    sick.touch()
    with daemon.client() as client:
        job = submit(client, write_poison(tmp_path / "poison.wav"))["id"]
        for crashes in (2, 3, 4, 5):  # of the recording once, and of the sample each time
            wait_until(lambda crashes=crashes: client.call("stats")["model"]["crashes"] == crashes)
            health = client.call("health")
            assert (health["status"], health["model"]["state"]) == ("degraded", "failed")
            assert "whisperd's own sample" in health["problems"][0]
            assert "model load" in health["problems"][0]
            assert state_of(client, job) == "queued"
            if crashes == 5:
                sick.unlink()
            client.call("model", action="load")
        end = client.result(job)["job"]
        assert (end["error"]["code"], end["attempts"]) == ("worker_crashed", 4), "now it alone is to blame"
        assert client.result(submit(client, recording(2))["id"])["job"]["state"] == "done"


def test_a_sick_device_is_tried_again_by_itself_and_its_deaths_count_against_nobody(
    make_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon, sick = deadly_daemon(make_daemon, micro, sick_rest_s=0.5)
    with daemon.client() as client:
        job = submit(client, recording(600))["id"]
        for _ in range(3):
            wait_until(lambda: state_of(client, job) == "running")
            sick.touch()
            daemon.helpers(MODEL)[0].kill()
            wait_until(lambda: client.call("health")["status"] == "degraded")
            sick.unlink()
        assert client.result(job)["job"]["state"] == "done"
        assert client.call("health")["status"] == "ready"


def test_deaths_that_count_are_remembered_across_restarts(
    make_daemon: Callable[..., Daemon], micro: Path, tmp_path: Path
) -> None:
    daemon, _ = deadly_daemon(make_daemon, micro, log_level="debug")
    # Nothing but the row knows of the first two deaths.
    with daemon.client() as client:
        job = submit(client, write_poison(tmp_path / "poison.wav"))["id"]
        wait_until(lambda: client.call("result", job=job)["job"]["attempts"] >= 2)
        daemon.kill()
    daemon.start()
    with daemon.client() as client:
        end = client.result(job)["job"]
        assert end["error"]["code"] == "worker_crashed"
        assert end["attempts"] <= 4


def test_a_helper_that_stands_still_is_a_death_like_any_other(
    make_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon, _ = deadly_daemon(make_daemon, micro, heartbeat_timeout_s=5)
    with daemon.client() as client:
        job = client.submit(recording(600), options=PLAIN_OPTIONS)["id"]
        wait_until(lambda: state_of(client, job) == "running")
        (model,) = daemon.helpers(MODEL)
        model.send_signal(signal.SIGSTOP)
        wait_until(lambda: client.call("stats")["model"]["crashes"] == 1)
        wait_until(lambda: "the sample is tried" in daemon.log())
        assert client.result(job)["job"]["state"] == "done"
