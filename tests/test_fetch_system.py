"""Downloads through the whole house: real daemons, real yt-dlp, a web server on loopback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.media_server import MediaServer, serving
from tests.support import (
    NO_MODEL,
    PLAIN_OPTIONS,
    Daemon,
    RawClient,
    error_of,
    running_daemon,
    submit,
    wait_until,
    write_noise,
)
from whisperctl import Client

SETTINGS: dict[str, Any] = {
    "fetch_allow_private": True,
    "fetch_extractors": ["generic"],
    "fetch_backoff_s": 0.05,
    "helper_backoff_s": 0.01,
}


@pytest.fixture(scope="module")
def shared(micro: Path) -> Iterator[Daemon]:
    """One daemon for the tests that leave it as they found it."""
    with running_daemon(model=str(micro), ready=True, max_source_bytes=2_000_000, **SETTINGS) as daemon:
        yield daemon


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MediaServer]:
    """A server with a recording that nobody has had before."""
    with serving(write_noise(tmp_path / "talk.wav", 5)) as server:
        yield server


@pytest.fixture
def client(shared: Daemon) -> Iterator[RawClient]:
    with shared.client() as client:
        yield client


def fetch(client: RawClient, url: str, **params: Any) -> dict[str, Any]:
    """Submit an address and return its Job map."""
    params = {"options": PLAIN_OPTIONS} | params
    job: dict[str, Any] = client.call("submit", source={"kind": "url", "url": url}, **params)["job"]
    return job


def ended(client: RawClient, job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = client.result(job["id"])["job"]
    return found


def state(client: RawClient, job: dict[str, Any]) -> str:
    return str(client.call("result", job=job["id"])["job"]["state"])


def states(client: RawClient, job: dict[str, Any]) -> list[str]:
    """Return the states that an ended job has been through; fails if an event is missing."""
    number = client.send("subscribe", job=job["id"])
    events = []
    while not events or events[-1]["event"] != "end":
        events.append(client.receive_until(lambda message: message["id"] == number and "seq" in message))
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    return [event["state"] for event in events if event["event"] != "segment"]


def spool_is_empty(daemon: Daemon) -> None:
    wait_until(lambda: not any((daemon.state_dir / "spool").iterdir()), 10, "the spool is empty")


def downloading(client: RawClient, server: MediaServer, job: dict[str, Any]) -> None:
    """Wait until a slow download is under way: yt-dlp looks first, then asks for all."""
    wait_until(lambda: server.asked["/slow/talk.wav"] == 2, 20, "it is asked for")
    assert state(client, job) == "fetching"


# --- what works ---


def test_an_address_becomes_a_transcript(client: RawClient, shared: Daemon, server: MediaServer) -> None:
    job = fetch(client, server.url("talk.wav"))
    assert job["state"] == "pending"
    answer = client.result(job["id"])
    assert answer["job"]["state"] == "done"
    assert answer["job"]["source"]["title"] == "talk"
    assert answer["transcript"]["duration_s"] == pytest.approx(5, abs=0.01)
    assert states(client, job) == ["pending", "fetching", "queued", "running", "done"]
    assert fetch(client, server.url("talk.wav"))["state"] == "done", "asked again, answered from the store"
    assert ended(client, fetch(client, server.url("talk.wav"), fresh=True))["attempts"] == 1
    assert server.asked["/talk.wav"] == 2 * 2, "yt-dlp looks, then downloads; and all that again for `fresh`"
    # The helper's own numbers come with its heartbeat, once a second.
    wait_until(lambda: client.call("stats")["lanes"]["fetch"]["yt_dlp"], 10, "the fetcher tells its version")
    lane = client.call("stats")["lanes"]["fetch"]
    assert (lane["active"], lane["waiting"], lane["rests_until"]) == (0, 0, None)
    assert lane["yt_dlp"].count(".") >= 2
    spool_is_empty(shared)


def test_a_paused_queue_begins_no_download(client: RawClient, server: MediaServer) -> None:
    client.call("pause")
    try:
        job = fetch(client, server.url("talk.wav"))
        assert state(client, job) == "pending", "asked after the commit that would have begun it"
    finally:
        client.call("resume")
    assert ended(client, job)["state"] == "done"


def test_a_download_that_is_cut_off_goes_on_where_it_was(client: RawClient, server: MediaServer) -> None:
    assert ended(client, fetch(client, server.url("cut/talk.wav")))["state"] == "done"
    assert ended(client, fetch(client, server.url("once-500/talk.wav")))["state"] == "done"


def test_the_same_audio_under_two_addresses_is_transcribed_once(client: RawClient, server: MediaServer) -> None:
    first = fetch(client, server.url("one.wav"))
    assert ended(client, first)["state"] == "done"
    other = fetch(client, server.url("two.wav"))
    assert ended(client, other)["state"] == "done"
    assert states(client, other) == ["pending", "fetching", "queued", "done"]
    assert client.result(other["id"])["transcript"] == client.result(first["id"])["transcript"]
    assert fetch(client, server.url("two.wav"), options={"language": "de", "temperature": 0})["state"] == "pending"


def test_a_file_and_its_download_share_a_run_and_are_retried_apart(
    start_daemon: Callable[..., Daemon], server: MediaServer
) -> None:
    daemon = start_daemon(model=NO_MODEL, **SETTINGS)
    with daemon.client() as client:
        file = submit(client, server.recording)
        video = fetch(client, server.url("talk.wav"))
        wait_until(lambda: state(client, video) == "queued")
        for job in (file, video):
            client.call("cancel", job=job["id"])
        again = client.call("retry", job=file["id"])["job"]
        assert (again["state"], again["source"]["kind"]) == ("queued", "fd"), "its audio is kept"
        other = client.call("retry", job=video["id"])["job"]
        assert (other["state"], other["source"]["url"]) == ("pending", server.url("talk.wav"))
        wait_until(lambda: state(client, other) == "queued")
        wait_until(lambda: client.call("result", job=again["id"])["job"]["audio_s"])
        assert state(client, again) == "queued"
        jobs = [again, other, fetch(client, server.url("talk.wav")), submit(client, server.recording)]
        places = [client.call("result", job=job["id"])["job"]["position"] for job in jobs]
        assert places == [1] * 4, "they are one piece of work again"


def test_ten_programs_ask_for_one_address(client: RawClient, shared: Daemon, server: MediaServer) -> None:
    clients = [shared.client() for _ in range(10)]
    try:
        jobs = [fetch(each, server.url("slow/talk.wav")) for each in clients]
        downloading(client, server, jobs[0])
        late = fetch(client, server.url("slow/talk.wav"))
        assert late["state"] == "fetching"
        server.go_on.set()
        answers = [each.result(job["id"]) for each, job in zip(clients, jobs, strict=True)]
    finally:
        for each in clients:
            each.close()
    assert {answer["job"]["state"] for answer in answers} == {"done"}
    assert len({answer["job"]["id"] for answer in answers}) == 10
    assert len({answer["transcript"]["text"] for answer in answers}) == 1
    assert {answer["job"]["attempts"] for answer in answers} == {1}
    assert ended(client, late)["state"] == "done"
    assert server.asked["/slow/talk.wav"] == 2, "one look, one download"


def test_keys(client: RawClient, server: MediaServer) -> None:
    job = fetch(client, server.url("talk.wav"), key="of a fetch")
    assert fetch(client, server.url("talk.wav"), key="of a fetch")["id"] == job["id"]
    assert error_of(lambda: fetch(client, server.url("other.wav"), key="of a fetch")) == "key_conflict"
    assert ended(client, job)["state"] == "done"


def test_ids_through_the_command_line_and_the_client(shared: Daemon, client: RawClient) -> None:
    """YouTube is not among the extractors here, so nobody is asked; that is said, with the way to allow it."""
    done = shared.whisperctl("submit", "--", "-bcdefghijk")
    assert done.returncode == 0, done.stderr
    with Client(shared.socket) as whisper:
        by_id = whisper.submit_video("-bcdefghijk", fresh=True)
    for job_id in (int(done.stdout), by_id.id):
        job = client.result(job_id)["job"]
        assert job["source"] == {"kind": "video", "id": "-bcdefghijk"}
        assert job["error"]["code"] == "forbidden"
        assert "fetch_extractors" in job["error"]["message"]
    assert shared.whisperctl("transcribe", "--", "-bcdefghijk").returncode != 0


# --- what does not ---


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("status/403/talk.wav", "fetch_blocked"),
        ("status/404/talk.wav", "fetch_unavailable"),
        ("status/401/talk.wav", "fetch_private"),
        ("status/503/talk.wav", "fetch_failed"),
        ("always-cut/talk.wav", "fetch_failed"),
    ],
)
def test_what_a_site_refuses(client: RawClient, shared: Daemon, server: MediaServer, path: str, code: str) -> None:
    job = ended(client, fetch(client, server.url(path)))
    assert (job["state"], job["error"]["code"]) == ("failed", code)
    if code == "fetch_failed":
        assert states(client, job) == ["pending", "fetching"] * 4 + ["failed"], "tried again, three times"
    spool_is_empty(shared)


def test_too_large_is_refused_before_it_is_downloaded(client: RawClient, shared: Daemon, tmp_path: Path) -> None:
    with serving(write_noise(tmp_path / "long.wav", 100)) as server:
        job = ended(client, fetch(client, server.url("talk.wav")))
        assert (job["state"], job["error"]["code"]) == ("failed", "too_large")
        assert "max_source_bytes" in job["error"]["message"]
    spool_is_empty(shared)


def test_a_page_without_media(client: RawClient, shared: Daemon, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<html><title>Nothing to hear</title></html>")
    with serving(page) as server:
        job = ended(client, fetch(client, server.url("page.html")))
        assert job["state"] == "failed"
        assert job["error"]["code"] == "fetch_unavailable"


def test_addresses_of_the_house_are_forbidden_unless_allowed(
    start_daemon: Callable[..., Daemon], server: MediaServer
) -> None:
    daemon = start_daemon(model=NO_MODEL, **SETTINGS | {"fetch_allow_private": False})
    with daemon.client() as client:
        job = ended(client, fetch(client, server.url("talk.wav")))
        assert (job["state"], job["error"]["code"]) == ("failed", "forbidden")
        assert "fetch_allow_private" in job["error"]["message"]
        assert not server.asked
        spool_is_empty(daemon)


def test_cancel_ends_a_download(client: RawClient, shared: Daemon, server: MediaServer) -> None:
    job = fetch(client, server.url("slow/talk.wav"))
    downloading(client, server, job)
    assert client.call("cancel", job=job["id"])["job"]["state"] == "cancelled"
    wait_until(lambda: client.call("stats")["lanes"]["fetch"]["active"] == 0, 10)
    spool_is_empty(shared)


def test_too_many_requests_rest_the_lane_and_say_until_when(
    start_daemon: Callable[..., Daemon], micro: Path, server: MediaServer
) -> None:
    daemon = start_daemon(model=str(micro), ready=True, **SETTINGS)
    with daemon.client() as client:
        limited = fetch(client, server.url("limited/2/talk.wav"))
        until = wait_until(lambda: client.call("stats")["lanes"]["fetch"]["rests_until"], 20)
        assert 0 < until - time.time() < 3
        other = fetch(client, server.url("other.wav"))
        health = client.call("health")
        assert health["status"] == "degraded"
        assert "downloads rest until" in health["problems"][0]
        assert state(client, other) == "pending"
        assert server.asked["/other.wav"] == 0
        server.limited = False
        assert ended(client, other)["state"] == "done"
        assert ended(client, limited)["state"] == "done"
        assert client.call("health")["status"] == "ready"


def test_too_many_requests_rest_also_what_is_urgent_in_an_outage(
    start_daemon: Callable[..., Daemon], server: MediaServer, tmp_path: Path
) -> None:
    """The rest that the site asks for ends before the outage's: without it all four tries would be over at once."""
    with serving(tmp_path / "talk.wav") as gone:
        port = gone.port  # nobody listens there
    daemon = start_daemon(model=NO_MODEL, fetchers=1, **SETTINGS | {"fetch_backoff_s": 600})
    with daemon.client() as client:
        for number in range(2):
            fetch(client, f"http://127.0.0.1:{port}/{number}.wav")
        wait_until(lambda: "several in a row have failed" in str(client.call("health")["problems"]))
        urgent = fetch(client, server.url("limited/2/talk.wav"), priority="interactive")
        wait_until(lambda: "too many requests" in str(client.call("health")["problems"]))
        server.limited = False
        wait_until(lambda: state(client, urgent) not in ("pending", "fetching"))
        assert state(client, urgent) == "queued"


def test_an_outage_fails_no_download(start_daemon: Callable[..., Daemon], micro: Path, tmp_path: Path) -> None:
    talk = write_noise(tmp_path / "talk.wav", 5)
    with serving(talk) as server:
        port = server.port  # nobody listens there for now
    daemon = start_daemon(model=str(micro), ready=True, fetchers=4, **SETTINGS)
    with daemon.client() as client:
        jobs = [fetch(client, f"http://127.0.0.1:{port}/{number}.wav") for number in range(3)]
        unwanted = fetch(client, f"http://127.0.0.1:{port}/unwanted.wav")
        wait_until(lambda: client.call("stats")["lanes"]["fetch"]["failed"] > 4 * 4, 60, "more than four tries of each")
        wait_until(lambda: "several in a row have failed" in str(client.call("health")["problems"]))
        assert client.call("cancel", job=unwanted["id"])["job"]["state"] == "cancelled"
        assert {state(client, job) for job in jobs} <= {"pending", "fetching"}
        with serving(talk, port) as server:
            # It is tried although the others rest, and so they need not any more.
            urgent = fetch(client, server.url("urgent.wav"), priority="interactive")
            for job in (urgent, *jobs):
                assert ended(client, job)["state"] == "done"
            assert max(states(client, job).count("fetching") for job in jobs) > 4
            assert client.call("health")["problems"] == []


def test_who_waits_is_told_after_the_usual_tries_also_in_an_outage(
    start_daemon: Callable[..., Daemon], micro: Path, tmp_path: Path
) -> None:
    with serving(write_noise(tmp_path / "talk.wav", 5)) as server:
        port = server.port  # nobody listens there
    daemon = start_daemon(model=str(micro), ready=True, fetchers=4, **SETTINGS)
    with daemon.client() as client:
        others = [fetch(client, f"http://127.0.0.1:{port}/{number}.wav") for number in range(2)]
        urgent = [fetch(client, f"http://127.0.0.1:{port}/urgent-{n}.wav", priority="interactive") for n in range(2)]
        for job in urgent:
            assert ended(client, job)["error"]["code"] == "fetch_failed"
            assert states(client, job).count("fetching") == 4
        assert {state(client, job) for job in others} <= {"pending", "fetching"}


def test_addresses_that_fail_while_others_succeed_are_given_up(client: RawClient, server: MediaServer) -> None:
    dead = [fetch(client, server.url(f"status/503/{number}.wav")) for number in range(2)]
    for number in range(100):  # each of them is tried four times, or a few more
        if all(state(client, job) == "failed" for job in dead):
            break
        good = fetch(client, server.url(f"good-{number}.wav"), priority="interactive")
        assert ended(client, good)["state"] == "done"
    for job in dead:
        assert client.call("result", job=job["id"])["job"]["error"]["code"] == "fetch_failed"


def test_a_full_queue_refuses_downloads_too(start_daemon: Callable[..., Daemon], server: MediaServer) -> None:
    daemon = start_daemon(model=NO_MODEL, capacity=4, **SETTINGS)
    with daemon.client() as client:
        numbers = [
            client.send("submit", source={"kind": "url", "url": server.url(f"slow/{n}.wav")}, options=PLAIN_OPTIONS)
            for n in range(5)
        ]
        replies = [client.reply(number) for number in numbers]
        assert [reply["ok"] for reply in replies] == [True] * 3 + [False] * 2
        assert {reply["error"]["code"] for reply in replies[3:]} == {"queue_full"}


# --- deaths ---


def test_a_fetcher_that_is_killed_is_replaced(
    start_daemon: Callable[..., Daemon], micro: Path, server: MediaServer
) -> None:
    daemon = start_daemon(model=str(micro), ready=True, **SETTINGS)
    with daemon.client() as client:
        job = fetch(client, server.url("slow/talk.wav"))
        downloading(client, server, job)
        (fetcher,) = daemon.helpers("whisperd.fetch.fetcher")
        fetcher.kill()
        wait_until(lambda: client.call("stats")["lanes"]["fetch"]["failed"] == 1, 10)
        server.go_on.set()
        assert ended(client, job)["state"] == "done"
        assert states(client, job) == ["pending", "fetching", "pending", "fetching", "queued", "running", "done"]
        spool_is_empty(daemon)


def test_a_daemon_that_is_killed_downloads_anew(
    make_daemon: Callable[..., Daemon], micro: Path, server: MediaServer
) -> None:
    daemon = make_daemon(model=str(micro), **SETTINGS)
    daemon.start(ready=True)
    with daemon.client() as client:
        job = fetch(client, server.url("slow/talk.wav"))
        waits = fetch(client, server.url("other.wav"))
        downloading(client, server, job)
    daemon.kill()
    server.go_on.set()
    daemon.start(ready=True)
    with daemon.client() as client:
        for each in (job, waits):
            assert ended(client, each)["state"] == "done"
        spool_is_empty(daemon)
