"""Whole daemons under bad luck and bad manners: what breaks hurts whom it must, and nobody else."""

from __future__ import annotations

import os
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models import micro_checkpoint
from tests.support import Daemon, RawClient, running_daemon
from whisperd.daemon.database import Database
from whisperd.daemon.rows import NewJob, about
from whisperd.daemon.store import Retention, Store
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.jobs import Priority

# No fallback through the temperatures, no end before its time: a window of the micro model takes 0.1 s.
OPTIONS = {"language": "en", "temperature": 0, "condition_on_previous_text": False}
NO_MODEL = "/nowhere/model.pt"  # jobs are accepted, decoded, and wait


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """One daemon without a model, for the tests that leave it as they found it."""
    with running_daemon(model=NO_MODEL) as daemon:
        yield daemon


@pytest.fixture
def client(shared: Daemon) -> Iterator[RawClient]:
    with shared.client() as client:
        yield client


@pytest.fixture
def recording(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a recording nobody has had before, of so many seconds."""
    rng = np.random.default_rng()

    def write(seconds: float = 1.0) -> Path:
        path = tmp_path / f"{rng.integers(1 << 62)}.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(rng.integers(-3000, 3000, int(seconds * 16_000), dtype=np.int16).tobytes())
        return path

    return write


def submit(client: RawClient, path: Path, **params: Any) -> dict[str, Any]:
    return client.submit(path, **{"options": OPTIONS} | params)


def error_of(call: Callable[[], Any]) -> str:
    with pytest.raises(WhisperdError) as caught:
        call()
    return caught.value.code


# --- clients ---


def test_a_long_past_does_not_cut_off_who_reads_it(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(model=NO_MODEL, max_output_bytes=65_536)
    segments = [{"id": n, "text": "word " * 200} for n in range(700)]
    job_id = job_of_the_past(daemon.state_dir, segments)
    daemon.start()
    with daemon.client() as client:
        number = client.send("subscribe", job=job_id)
        assert client.reply(number)["ok"]
        events = [client.receive() for _ in range(len(segments) + 3)]
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert [event["segment"] for event in events if event["event"] == "segment"] == segments
        assert events[-1]["event"] == "end"


def job_of_the_past(state_dir: Path, segments: list[dict[str, Any]]) -> int:
    """Write the state of a daemon that has transcribed one recording; return the job's id."""
    state_dir.mkdir(mode=0o700, parents=True)
    database = Database(state_dir / "whisperd.sqlite3", deliver=lambda fn: None, failed=lambda reason: None)
    store = Store(Retention(jobs_s=1e9, keys_s=1e9, failed_audio_s=1e9))
    new = NewJob(
        uid=os.geteuid(),
        priority=Priority.BACKGROUND,
        attached=False,
        key=None,
        source={"kind": "fd", "name": "talk"},
        options={},
        fresh=False,
        fingerprint=b"f",
        share_key=b"s",
        folder="folder",
        sha256="",
        size_bytes=1,
    )
    now = time.time()
    job, run = about(database.run(lambda db: store.accept(db, new, now)))
    database.run(lambda db: store.start(db, run.id, now))
    database.run(lambda db: store.add_segments(db, run.id, segments))
    database.run(lambda db: store.finish(db, run.id, b"\x80", now))
    database.connection.close()
    return job.id
