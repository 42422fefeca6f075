"""The Python client and the command line against whole daemons: what a peer that plays along cannot prove."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import PLAIN_OPTIONS, Daemon, running_daemon, wait_until
from whisperctl import Client, Coverage, JobCancelled, JobFailed, JobTimeout, NotFound, Segment

AS_ARGUMENTS = ("--language", "en", "--temperature", "0", "--option", "condition_on_previous_text=false")
LONG_S = 600  # the micro model needs several seconds for it


@pytest.fixture(scope="module")
def shared(micro: Path) -> Iterator[Daemon]:
    """One daemon for the tests that leave it as they found it."""
    with running_daemon(model=str(micro), ready=True) as daemon:
        yield daemon


@pytest.fixture
def client(shared: Daemon) -> Iterator[Client]:
    with Client(shared.socket) as client:
        yield client


def test_many_threads_share_a_client(client: Client, recording: Callable[..., Path]) -> None:
    paths = [recording() for _ in range(12)]
    texts: dict[Path, str] = {}

    def work(path: Path) -> None:
        texts[path] = client.transcribe(path, **PLAIN_OPTIONS).text

    threads = [threading.Thread(target=work, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert set(texts) == set(paths)
    # Asked again, alone, each recording has the words that its own thread was given.
    for path in paths:
        assert client.transcribe(path, **PLAIN_OPTIONS).text == texts[path] != ""
    wait_until(lambda: client.stats()["model"]["batch_occupancy"], message="the model's process has told of its steps")


def test_segments_come_as_they_stand_in_the_transcript(client: Client, recording: Callable[..., Path]) -> None:
    heard: list[Segment] = []
    transcript = client.transcribe(recording(100), on_segment=heard.append, **PLAIN_OPTIONS)
    assert heard == list(transcript.segments)
    assert len(heard) > 3
    assert not any(segment.speech for segment in heard), "it is noise"
    assert transcript.coverage == Coverage(speech_s=0, transcribed_s=0, gaps=[])
    assert transcript.timing is not None
    assert (transcript.mode, transcript.timing.windows, transcript.timing.model_s > 0) == ("exact", 4, True)
    assert "torch" in transcript.versions


def test_a_timeout_a_cancel_and_what_is_left(client: Client, recording: Callable[..., Path]) -> None:
    client.pause()  # a recording so long that it outlasts the time takes some of it to be copied on a busy machine
    try:
        with pytest.raises(JobTimeout) as caught:
            client.transcribe(recording(), timeout_s=1, **PLAIN_OPTIONS)
    finally:
        client.resume()
    job_id = caught.value.job_id
    assert job_id is not None
    assert client.cancel(job_id).state == "cancelled"
    with pytest.raises(JobCancelled):
        client.result(job_id, wait=True).require()
    assert [event.kind for event in client.follow(job_id)][-1] == "end"
    assert client.forget(job_id).id == job_id
    with pytest.raises(NotFound):
        client.job(job_id)


def test_no_audio(client: Client, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear Sir or Madam,\n" * 100)
    with pytest.raises(JobFailed) as caught:
        client.transcribe(tmp_path / "letter.txt")
    assert caught.value.code == "bad_audio"


def test_an_attached_job_outlives_its_daemon_and_not_its_client(micro: Path, recording: Callable[..., Path]) -> None:
    with running_daemon(model=str(micro), ready=True) as daemon:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "whisperctl",
                "--socket",
                daemon.socket,
                "transcribe",
                recording(LONG_S),
                *AS_ARGUMENTS,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with Client(daemon.socket) as client:
            wait_until(lambda: client.jobs(state="running"), message="the job runs")
            daemon.kill()
            daemon.start(ready=True)
            wait_until(lambda: client.jobs(state="running"), message="the job runs again")
            [job] = client.jobs()
            assert process.poll() is None
            process.kill()
            process.communicate()
            assert client.result(job.id, wait=True, timeout_s=30).job.state == "cancelled"


def test_follow_across_a_restart(micro: Path, recording: Callable[..., Path]) -> None:
    with running_daemon(model=str(micro), ready=True) as daemon, Client(daemon.socket) as client:
        job = client.submit(recording(LONG_S / 2), **PLAIN_OPTIONS)
        events = []
        for event in client.follow(job.id):
            events.append(event)
            if event.seq == 5 and event.kind == "segment":
                daemon.kill()
                daemon.start(ready=True)
        numbers = [event.seq for event in events if event.seq is not None]
        assert numbers == list(range(1, len(numbers) + 1))
        assert not any(event.discard for event in events), "it goes on where it was"
        heard = [event.segment for event in events if event.segment is not None]
        assert heard == list(client.result(job.id).require().segments)


def test_the_command_line_from_hand_to_transcript(shared: Daemon, recording: Callable[..., Path]) -> None:
    one, two = recording(), recording(40)
    done = shared.whisperctl("transcribe", str(one), *AS_ARGUMENTS)
    assert (done.returncode, done.stderr) == (0, "")
    ids = shared.whisperctl("submit", str(one), str(two), *AS_ARGUMENTS).stdout.split()
    assert shared.whisperctl("wait", *ids).returncode == 0
    assert shared.whisperctl("result", ids[0]).stdout == done.stdout
    wrapped = json.loads(shared.whisperctl("result", ids[1], "--json").stdout)
    assert wrapped["job"]["state"] == "done"
    lines = [segment["text"].strip() for segment in wrapped["transcript"]["segments"]]
    assert shared.whisperctl("result", ids[1]).stdout.splitlines() == lines
    followed = shared.whisperctl("follow", ids[1]).stdout.splitlines()
    assert [line.partition("] ")[2] for line in followed] == lines
    piped = shared.whisperctl("transcribe", "-", *AS_ARGUMENTS, stdin=one.read_bytes())
    assert piped.stdout == done.stdout
    assert json.loads(shared.whisperctl("health", "--json").stdout)["status"] == "ready"
    assert shared.whisperctl("stats").returncode == 0
    assert set(ids) <= set(shared.whisperctl("list", "-q").stdout.split())
