"""The names of the former HTTP client against whole daemons, with real yt-dlp and videos on loopback."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.media_server import MediaServer, serving
from tests.support import PLAIN_OPTIONS, wait_until, write_noise
from tests.video_daemon import VideoDaemon
from whisperctl import BadRequest, Client, JobCancelled, JobFailed, JobTimeout
from whisperctl.compat import WhisperAPIClient, WhisperTranscriberCompat


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MediaServer]:
    with serving(write_noise(tmp_path_factory.mktemp("talk") / "talk.wav", 5)) as server:
        yield server


@pytest.fixture(scope="module")
def daemon(micro: Path, server: MediaServer) -> Iterator[VideoDaemon]:
    daemon = VideoDaemon(server, model=str(micro))
    try:
        daemon.start(ready=True, timeout_s=120)
        yield daemon
    finally:
        daemon.close()


@pytest.fixture
def api(daemon: VideoDaemon) -> Iterator[WhisperAPIClient]:
    with WhisperAPIClient(str(daemon.socket), **PLAIN_OPTIONS) as api:
        yield api


@pytest.fixture
def client(daemon: VideoDaemon) -> Iterator[Client]:
    with Client(daemon.socket) as client:
        yield client


@pytest.fixture
def video(server: MediaServer, tmp_path: Path) -> str:
    """The id of a video that nobody has had before."""
    video_id = "-" + os.urandom(5).hex()
    server.by_name[f"{video_id}.wav"] = write_noise(tmp_path / "video.wav", 5).read_bytes()
    server.go_on.clear()
    return video_id


def jobs_of(client: Client, video: str) -> list[Any]:
    return [job for job in client.jobs(limit=1000) if job.source.get("id") == video]


def until_text(api: WhisperAPIClient, video: str) -> str:
    text: str = wait_until(lambda: api.transcribe_video_async(video), 120, "the text is there")
    return text


def test_both_ways_come_to_the_same_text(
    api: WhisperAPIClient, client: Client, server: MediaServer, video: str
) -> None:
    server.slow.add(f"{video}.wav")
    assert api.transcribe_video_async(video) is None
    assert api.transcribe_video_async(video) is None, "still processing"
    server.go_on.set()
    text = until_text(api, video)
    assert text
    assert api.transcribe_video_async(video) == text, "and again"
    assert api.transcribe_video_sync(video) == text
    assert api.transcribe_video_sync(video, timeout=10) == text
    assert server.asked[f"/{video}.wav"] == 1
    jobs = jobs_of(client, video)
    assert sorted(str(job.priority) for job in jobs) == ["background", "interactive"], (
        "one of each, however often asked"
    )
    assert {job.source["title"] for job in jobs} == {f"Video {video}"}


def test_many_threads_and_clients_queue_a_video_once(
    api: WhisperAPIClient, daemon: VideoDaemon, client: Client, server: MediaServer, video: str
) -> None:
    server.slow.add(f"{video}.wav")
    others = [WhisperAPIClient(str(daemon.socket), **PLAIN_OPTIONS) for _ in range(3)]
    start = threading.Barrier(12)

    def ask(number: int) -> str | None:
        start.wait(30)
        mine = [api, *others][number % 4]
        return mine.transcribe_video_sync(video, 120) if number % 3 else mine.transcribe_video_async(video)

    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(ask, number) for number in range(12)]
        wait_until(lambda: len(jobs_of(client, video)) == 2)
        server.go_on.set()
        texts = {future.result(120) for future in asked}
    for each in others:
        each.close()
    assert texts - {None} == {until_text(api, video)}
    assert len(jobs_of(client, video)) == 2, "one in the background, one interactive, and both share one run"
    assert {job.attempts for job in jobs_of(client, video)} == {1}


@pytest.mark.parametrize("ask", ["transcribe_video_sync", "transcribe_video_async"])
def test_a_failed_video_raises_with_its_reason_and_is_tried_anew(
    api: WhisperAPIClient, client: Client, server: MediaServer, video: str, ask: str
) -> None:
    server.refused[f"{video}.wav"] = 404

    def fails() -> JobFailed | None:
        try:
            assert getattr(api, ask)(video) is None
        except JobFailed as error:
            return error
        return None

    error = wait_until(fails, 120, "it has failed")
    assert error.code == "fetch_unavailable"
    assert len(jobs_of(client, video)) == 1
    assert wait_until(fails, 120, "tried anew, it has failed again").job.id != error.job.id
    del server.refused[f"{video}.wav"]
    assert wait_until(lambda: getattr(api, ask)(video), 120)
    assert len(jobs_of(client, video)) == 3


def test_a_timeout_leaves_the_job_running(
    api: WhisperAPIClient, daemon: VideoDaemon, client: Client, server: MediaServer, video: str
) -> None:
    server.slow.add(f"{video}.wav")
    with pytest.raises(JobTimeout) as caught:
        api.transcribe_video_sync(video, timeout=0.2)
    with WhisperTranscriberCompat(str(daemon.socket), **PLAIN_OPTIONS) as transcriber:
        assert transcriber.transcribe_video(video, timeout=0.2) is None
        server.go_on.set()
        assert transcriber.transcribe_video(video) == api.transcribe_video_sync(video) != ""
    (job,) = jobs_of(client, video)
    assert job.id == caught.value.job_id


def test_a_cancelled_or_forgotten_video_is_tried_anew(
    api: WhisperAPIClient, daemon: VideoDaemon, client: Client, server: MediaServer, video: str
) -> None:
    server.slow.add(f"{video}.wav")
    for _ in range(2):
        assert api.transcribe_video_async(video) is None
        client.cancel(jobs_of(client, video)[0].id)
        with pytest.raises(JobCancelled):
            api.transcribe_video_async(video)
    with WhisperAPIClient(str(daemon.socket), **PLAIN_OPTIONS) as restarted:
        assert restarted.transcribe_video_async(video) is None, "a program that knows nothing of the cancelled ones"
        assert api.transcribe_video_async(video) is None
        assert len(jobs_of(client, video)) == 3
        server.go_on.set()
        until_text(api, video)
        assert restarted.transcribe_video_async(video)
    for job in jobs_of(client, video):
        client.forget(job.id)
    assert until_text(api, video)


def test_a_job_forgotten_while_it_is_asked_for(
    api: WhisperAPIClient, client: Client, server: MediaServer, video: str
) -> None:
    server.slow.add(f"{video}.wav")
    assert api.transcribe_video_async(video) is None
    (job,) = jobs_of(client, video)
    client.cancel(job.id)
    client.forget(job.id)
    assert api.transcribe_video_async(video) is None
    assert [each.id for each in jobs_of(client, video)] != [job.id]
    server.go_on.set()
    assert until_text(api, video)


def test_a_restart_of_the_daemon_is_survived(
    micro: Path, tmp_path: Path, server: MediaServer, video: str, request: pytest.FixtureRequest
) -> None:
    daemon = VideoDaemon(server, model=str(micro))
    request.addfinalizer(daemon.close)
    daemon.start()
    server.slow.add(f"{video}.wav")
    with WhisperAPIClient(str(daemon.socket), **PLAIN_OPTIONS) as api, ThreadPoolExecutor(1) as pool:
        assert api.transcribe_video_async(video) is None
        waiting = pool.submit(api.transcribe_video_sync, video)
        wait_until(lambda: server.asked[f"/{video}.wav"])
        with Client(daemon.socket) as client:
            wait_until(lambda: len(jobs_of(client, video)) == 2)
        daemon.kill()
        server.go_on.set()
        daemon.start()
        assert waiting.result(120) == until_text(api, video) != ""
        with Client(daemon.socket) as client:
            assert len(jobs_of(client, video)) == 2


def test_options_hold_for_every_video(daemon: VideoDaemon, client: Client, video: str) -> None:
    with WhisperAPIClient(str(daemon.socket), **PLAIN_OPTIONS | {"language": "de"}) as german:
        assert german.transcribe_video_sync(video)
        assert jobs_of(client, video)[0].options["language"] == "de"
    with WhisperAPIClient(str(daemon.socket), **PLAIN_OPTIONS) as other:
        assert other.transcribe_video_sync(video)
    assert len(jobs_of(client, video)) == 2, "other options are other work"
    with WhisperAPIClient(str(daemon.socket), colour="green") as odd, pytest.raises(BadRequest, match="colour"):
        odd.transcribe_video_async(video)


def test_what_is_no_id(api: WhisperAPIClient) -> None:
    with pytest.raises(BadRequest, match="YouTube id"):
        api.transcribe_video_sync("https://youtu.be/dQw4w9WgXcQ")


def test_health_and_stats(api: WhisperAPIClient) -> None:
    assert api.health()["status"] == "ready"
    assert api.stats()["queue"]["capacity"] == 1000


def test_a_client_is_kept_across_a_fork(api: WhisperAPIClient) -> None:
    """As web servers do: made once, used by every child."""
    assert api.health()
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if api.health()["status"] == "ready" else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert api.health()


@pytest.mark.parametrize(
    "base_url", ["http://localhost:8765", "http://127.0.0.1:5000/api", "https://[::1]:1/", None, ""]
)
def test_an_address_of_this_machine_is_the_daemon_here(
    daemon: VideoDaemon, monkeypatch: pytest.MonkeyPatch, base_url: str | None
) -> None:
    monkeypatch.setenv("WHISPERD_SOCKET", str(daemon.socket))
    with WhisperAPIClient(base_url=base_url, timeout=10) as api:
        assert api.health()


def test_a_socket_may_stand_in_place_of_the_address(daemon: VideoDaemon) -> None:
    with WhisperAPIClient(f"unix:{daemon.socket}") as api, WhisperAPIClient(f"unix://{daemon.socket}") as other:
        assert api.health()["pid"] == other.health()["pid"] == daemon.pid


def test_another_machine_is_refused_with_another_way() -> None:
    with pytest.raises(ValueError, match=re.escape("ssh -L")):
        WhisperAPIClient("http://gpu.example.org:8765")


def test_the_page_about_moving_is_true(daemon: VideoDaemon, video: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program runs, with the ids of the test, after the import is changed and nothing else."""
    page = (Path(__file__).parents[1] / "docs/moving.md").read_text()
    before, after, ladder = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert before.splitlines()[1:] == after.splitlines()[1:], "only the import differs"
    monkeypatch.setenv("WHISPERD_SOCKET", str(daemon.socket))
    names: dict[str, Any] = {}
    exec(after.replace("dQw4w9WgXcQ", video).replace("9bZkp7q19f0", video), names)
    assert names["text"] in (names["later"], until_text(names["client"], video))
    names["client"].close()
    exec(ladder, names)
    shared = names["transcriber"]()
    assert isinstance(shared, WhisperTranscriberCompat)
    assert shared.transcribe_video(video) == names["text"]
    shared.close()
