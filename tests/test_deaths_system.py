"""The model's process dies: who is to blame is found out, and nobody else pays for it."""

from __future__ import annotations

import sqlite3
import wave
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from tests.deadly.sitecustomize import POISON
from tests.support import NO_MODEL, Daemon, RawClient, submit, wait_until

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


def row_of(daemon: Daemon, job: int) -> tuple[int, int]:
    """Return the deaths that count against a job's work, and those it was present at."""
    with closing(sqlite3.connect(daemon.state_dir / "whisperd.sqlite3")) as db:
        found: tuple[int, int] = db.execute(
            "SELECT deaths, suspicion FROM runs JOIN jobs ON jobs.run_id = runs.id WHERE jobs.id = ?", (job,)
        ).fetchone()
        return found


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
        wait_until(lambda: row_of(daemon, poison)[0] == 1, 120, "its first death alone is counted")
        assert [row_of(daemon, job) for job in innocent] == [(0, 1), (0, 1)]
    daemon.kill()  # the row remembers
    daemon.start()
    with daemon.client() as client:
        end = client.result(poison)["job"]
        assert (end["state"], end["error"]["code"]) == ("failed", "worker_crashed")
        assert row_of(daemon, poison)[0] == 3
        assert end["attempts"] <= 5, "in company, three times alone, and perhaps once when the daemon was killed"
        assert client.result(late)["job"]["state"] == "done"
        # They are beside each other again long before one of them ends.
        wait_until(lambda: all(state_of(client, job) == "running" for job in innocent), 120)
        for job in innocent:
            done = client.result(job)["job"]
            assert (done["state"], done["error"]) == ("done", None)
            assert row_of(daemon, job)[0] == 0
        assert client.call("health")["problems"] == []


def test_a_sick_device_fails_nobody(
    make_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon, sick = deadly_daemon(make_daemon, micro, sick_rest_s=1)
    sick.touch()
    with daemon.client() as client:
        job = submit(client, recording(120))["id"]
        wait_until(lambda: state_of(client, job) == "running")
        daemon.helpers(MODEL)[0].kill()
        for crashes in (2, 3):  # of the job once, and of the sample each time that it is tried again
            wait_until(lambda crashes=crashes: client.call("stats")["model"]["crashes"] == crashes, 120)
            health = client.call("health")
            assert (health["status"], health["model"]["state"]) == ("degraded", "failed")
            assert "whisperd's own sample" in health["problems"][0]
            assert "model load" in health["problems"][0]
        sick.unlink()
        assert client.result(job)["job"]["state"] == "done"
        assert row_of(daemon, job) == (0, 1)
        assert client.call("health")["status"] == "ready"


def test_a_decoders_death_counts_against_its_own_recording_alone(
    make_daemon: Callable[..., Daemon], recording: Callable[..., Path], tmp_path: Path
) -> None:
    daemon = make_daemon(model=NO_MODEL, decoders=1)
    daemon.variables = {"PYTHONPATH": str(DEADLY)}
    daemon.start()
    with daemon.client() as client:
        poison = submit(client, write_poison(tmp_path / "poison.wav"))["id"]
        others = [submit(client, recording(2))["id"] for _ in range(2)]
        assert client.result(poison)["job"]["error"]["code"] == "worker_crashed"
        for job in others:
            wait_until(lambda job=job: "model" in client.call("result", job=job)["job"]["phase"])
            assert row_of(daemon, job) == (0, 0)
