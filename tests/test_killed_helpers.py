"""kill -9 of the receiver, the fetcher and the model's process at each of their steps.

The copier, the decoder and the daemon itself: `test_durability.py`. Each step is a system call that the process does
not live to make, so the one before it is done. Heartbeats have a thread of their own and are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.media_server import serving
from tests.support import (
    NO_MODEL,
    PLAIN_OPTIONS,
    Daemon,
    RawClient,
    error_of,
    requires_program,
    running_daemon,
    wait_until,
    write_noise,
)
from tests.test_durability import check_spool, end_all, folders, rows
from tests.test_fetch_system import fetch
from tests.test_resume_system import MODEL, Follower, check_whole, words_of
from tests.test_upload import begin, pieces, taken, upload
from tests.tracing import killed_at, traced, traced_new_threads, wait_for_end

RECEIVER = "whisperd.audio.receiver"
FETCHER = "whisperd.fetch.fetcher"

pytestmark = requires_program("strace")


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """A daemon with one helper of each kind, which is killed again and again."""
    settings: dict[str, Any] = {"fetch_allow_private": True, "fetch_extractors": ["generic"], "fetch_backoff_s": 0.05}
    with running_daemon(model=NO_MODEL, receivers=1, fetchers=1, **settings) as daemon:
        yield daemon


def only(daemon: Daemon, module: str) -> psutil.Process:
    """Return the one helper that runs a module, once it is there."""
    found: list[psutil.Process] = wait_until(lambda: daemon.helpers(module))
    assert len(found) == 1, "a dead one was replaced by one"
    return found[0]


def kill_at(call: str, nth: int) -> list[str]:
    """Return strace's options that end a process when it is about to make its nth call of a name."""
    return ["-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={nth}"]


def decoded(client: RawClient, count: int) -> list[dict[str, Any]]:
    """Return all jobs once there are `count`, each of them decoded: it has all that it will get without a model."""
    return wait_until(
        lambda: len(jobs := client.call("jobs")["jobs"]) == count and all(j["audio_s"] for j in jobs) and jobs
    )


# --- the receiver ---


@pytest.mark.parametrize(
    ("call", "nth", "step"),
    [
        ("mkdir", 1, r"RUN\.partial"),  # before anything
        ("write", 1, r"RUN\.partial/source"),  # an empty file
        ("sendto", 1, "Progress"),  # the first chunk is written, and not answered
        ("write", 2, r"RUN\.partial/source"),  # it is answered
        ("sendto", 3, "Progress"),  # all is written
        ("fsync", 1, r"RUN\.partial/source"),  # all is answered, and not on the disk
        ("fsync", 2, r"RUN\.partial>"),  # its folder is not
        ("rename", 1, r"RUN\.partial"),
        ("fsync", 3, "/spool>"),  # renamed
        ("sendto", 4, "Copied"),  # all done, and not told
    ],
)
def test_a_receiver_that_is_killed_at_a_step_ends_its_upload_alone(
    shared: Daemon, recording: Callable[..., Path], tmp_path: Path, call: str, nth: int, step: str
) -> None:
    content, key = recording().read_bytes(), f"receiver-{call}-{nth}"
    parts = pieces(content, len(content) // 3 + 1)
    with shared.client() as client:
        before = upload(client, recording().read_bytes(), key=f"before-{key}")["job"]
        victim = only(shared, RECEIVER)
        with shared.client() as uploader:
            with traced(victim.pid, tmp_path / "trace", *kill_at(call, nth), first_thread_only=True):
                number = begin(uploader, len(content), key=key)
                for place, part in enumerate(parts, 1):
                    uploader.send("chunk", upload=number, data=part, last=place == len(parts))
                wait_for_end(victim.pid)
            assert error_of(lambda: taken(uploader, number)) == "worker_crashed"
        check_step(tmp_path / "trace", call, step)
        assert [job["id"] for job in client.call("jobs")["jobs"]] == [before["id"]], "it was not acknowledged"
        check_spool(shared)
        again = upload(client, content, key=key)["job"]
        known = taken(client, begin(client, len(content), key=key))["job"]
        assert known["id"] == again["id"], "the key is one job"
        assert {job["id"] for job in decoded(client, 2)} == {before["id"], again["id"]}
        only(shared, RECEIVER)
        check_spool(shared)
        end_all(client)
        check_spool(shared)


def check_step(trace: Path, call: str, step: str) -> None:
    """The process was killed, and where this test says."""
    line = re.sub(r"[0-9a-f]{32}", "RUN", killed_at(trace))
    assert re.search(rf" {call}\(.*{step}", line), f"killed at {line!r}"


# --- the fetcher ---


@pytest.mark.parametrize(
    ("call", "nth", "step"),
    [
        ("mkdir", 1, r"RUN\.partial"),  # before anything
        ("sendto", 1, "GET"),  # an empty folder; before the site is asked
        ("write", 1, r"RUN\.partial/source\.part"),  # an empty file
        ("write", 2, r"RUN\.partial/source\.part"),  # some of it
        ("rename", 1, r"RUN\.partial/source\.part"),  # all of it, under yt-dlp's own name
        ("fsync", 1, r"RUN\.partial/source"),  # not on the disk
        ("fsync", 2, r"RUN\.partial>"),  # its folder is not
        ("rename", 2, r"RUN\.partial"),
        ("fsync", 3, "/downloads>"),  # renamed
        ("sendto", 3, "Fetched|Progress|GET"),  # all done, and not told; a busy machine has told its progress before
    ],
)
def test_a_fetcher_that_is_killed_at_a_step_costs_nothing(
    shared: Daemon, recording: Callable[..., Path], tmp_path: Path, call: str, nth: int, step: str
) -> None:
    with serving(recording()) as server, shared.client() as client:
        before = fetch(client, server.url("before.wav"), fresh=True)
        decoded(client, 1)
        victim = only(shared, FETCHER)
        with traced(victim.pid, tmp_path / "trace", *kill_at(call, nth), first_thread_only=True):
            job = fetch(client, server.url(f"{call}-{nth}.wav"), key=f"fetcher-{call}-{nth}", fresh=True)
            wait_for_end(victim.pid)
        check_step(tmp_path / "trace", call, step)
        assert {found["id"] for found in decoded(client, 2)} == {before["id"], job["id"]}
        assert (
            fetch(client, server.url(f"{call}-{nth}.wav"), key=f"fetcher-{call}-{nth}", fresh=True)["id"] == job["id"]
        )
        only(shared, FETCHER)
        check_spool(shared)
        wait_until(lambda: not any((shared.state_dir / "downloads").iterdir()), message="no download is left")
        end_all(client)
        check_spool(shared)


# --- the model's process ---


@pytest.fixture(scope="module")
def long_recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two windows of the model."""
    return write_noise(tmp_path_factory.mktemp("audio") / "long.wav", 55)


@pytest.fixture(scope="module")
def working(micro: Path) -> Iterator[Daemon]:
    """A daemon whose model works, and is killed again and again."""
    with running_daemon(model=str(micro), ready=True, helper_backoff_s=0.01, log_level="debug") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def undisturbed(working: Daemon, long_recording: Path) -> dict[str, Any]:
    """What the model says when nobody kills it."""
    with working.client() as client:
        job = client.submit(long_recording, options=PLAIN_OPTIONS)["id"]
        transcript: dict[str, Any] = client.result(job)["transcript"]
        client.call("forget", job=job)
    return transcript


@pytest.mark.parametrize(
    ("call", "nth", "step"),
    [
        ("sendto", 2, "Segments"),  # a window's answer is told, its words are not
        ("sendto", 4, "JournalEntry"),  # words and progress are told; the second window is computed, and not told
        ("sendto", 7, "Finished"),  # all is told but the end
        ("exit", 1, ""),  # the end is told
    ],
)
def test_a_model_process_that_is_killed_at_a_step_ends_its_job_once(
    working: Daemon,
    long_recording: Path,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    call: str,
    nth: int,
    step: str,
) -> None:
    working.wait_ready()
    victim = only(working, MODEL)
    with working.client() as client:
        with traced_new_threads(victim.pid, tmp_path / "trace", *kill_at(call, nth)):
            job = client.submit(long_recording, options=PLAIN_OPTIONS, fresh=True, key=f"{call}-{nth}")["id"]
            wait_for_end(victim.pid)
        check_step(tmp_path / "trace", call, step)
        ((run,),) = rows(working, f"SELECT run_id FROM jobs WHERE id = {job}")
        transcript = check_whole(working, Follower(working, job), run, cuts=0 if call == "exit" else 1)
        assert words_of(transcript) == words_of(undisturbed)
        assert [found["id"] for found in client.call("jobs")["jobs"]] == [job]
        check_spool(working)
        assert not folders(working), "its audio went with its end"
        end_all(client)
        only(working, MODEL)
