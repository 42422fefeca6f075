"""How much interactive work goes first in a row, in every lane of a real daemon: as much as its setting says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.media_server import serving
from tests.support import PLAIN_OPTIONS, Daemon, RawClient, submit, wait_until

# One at a time in every lane, so that somebody always waits; and few in a row.
SETTINGS: dict[str, Any] = {
    "interactive_in_a_row": 2,
    "copiers": 1,
    "receivers": 1,
    "decoders": 1,
    "fetchers": 1,
    "open_runs": 1,
    "fetch_allow_private": True,
    "fetch_extractors": ["generic"],
}
WAITING = ["background", "interactive", "interactive", "interactive"]  # in the order in which they come
WANTED = ["interactive", "interactive", "background", "interactive"]


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Callable[..., Daemon], micro: Path) -> Daemon:
    return start_module_daemon(model=str(micro), ready=True, **SETTINGS)


@pytest.fixture
def client(daemon: Daemon) -> Iterator[RawClient]:
    """A client of a daemon that has nothing left to do of the test before."""
    with daemon.client() as client:
        wait_until(lambda: not any(lane["active"] + lane["waiting"] for lane in lanes(client).values()))
        yield client


class Events:
    """What the jobs of the caller go through from now on."""

    def __init__(self, client: RawClient) -> None:
        self._client = client
        self._number = client.send("subscribe")
        client.reply(self._number)

    def order(self, state: str, jobs: dict[int, str]) -> Iterator[str]:
        """Yield the priorities of `jobs` in the order in which they reach a state."""
        missing = set(jobs)
        while missing:
            event = self._client.receive_until(lambda message: message["id"] == self._number and "event" in message)
            if event["job"] in missing and event["state"] == state:
                missing.remove(event["job"])
                yield jobs[event["job"]]


@pytest.fixture
def not_audio(tmp_path: Path) -> Callable[[int], Path]:
    """A function that writes a file, another for each number, whose job ends once a decoder has looked at it."""

    def write(number: int) -> Path:
        path = tmp_path / f"{number}.txt"
        path.write_text(f"{tmp_path} {number}")
        return path

    return write


def held(daemon: Daemon, module: str) -> Any:
    """Stop the one helper of a lane, which was started ahead of its first task."""
    (helper,) = wait_until(lambda: daemon.helpers(module))
    helper.suspend()
    return helper


def lanes(client: RawClient) -> dict[str, dict[str, Any]]:
    lanes: dict[str, dict[str, Any]] = client.call("stats")["lanes"]
    return lanes


def wait_for_lane(client: RawClient, lane: str, *, active: int, waiting: int) -> None:
    def as_wanted() -> bool:
        now = lanes(client)[lane]
        return (now["active"], now["waiting"]) == (active, waiting)

    wait_until(as_wanted, message=f"{lane}: {active} active, {waiting} waiting")


def test_copies(daemon: Daemon, client: RawClient, not_audio: Callable[[int], Path]) -> None:
    copier = held(daemon, "whisperd.audio.copier")
    numbers: dict[int, str] = {}
    for number, priority in enumerate(["background", *WAITING]):
        with not_audio(number).open("rb") as file:
            source = {"kind": "fd", "name": "talk"}
            request = client.send("submit", descriptors=[file.fileno()], source=source, priority=priority)
        numbers[request] = priority
        wait_for_lane(client, "copy", active=1, waiting=number)
    copier.resume()
    ids = {client.reply(request)["result"]["job"]["id"]: priority for request, priority in numbers.items()}
    assert [ids[job] for job in sorted(ids)][1:] == WANTED


def test_uploads(daemon: Daemon, client: RawClient) -> None:
    clients = [daemon.client() for _ in ["first", *WAITING]]

    def begin(number: int, priority: str) -> int:
        source = {"kind": "upload", "name": "talk", "size_bytes": None}
        return clients[number].send("submit", source=source, priority=priority)

    def chunk(number: int, upload: int, *, last: bool) -> None:
        clients[number].send("chunk", upload=upload, data=b"%d" % number, last=last)

    first = begin(0, "background")
    chunk(0, first, last=False)
    uploads = []
    for number, priority in enumerate(WAITING, 1):
        uploads.append(begin(number, priority))
        chunk(number, uploads[-1], last=True)
        wait_for_lane(client, "upload", active=1, waiting=number)
    chunk(0, first, last=True)
    replies = [clients[number].reply(upload) for number, upload in enumerate(uploads, 1)]
    ids = {reply["result"]["job"]["id"]: priority for reply, priority in zip(replies, WAITING, strict=True)}
    assert [ids[job] for job in sorted(ids)] == WANTED
    for each in clients:
        each.close()


def test_decoding(daemon: Daemon, client: RawClient, not_audio: Callable[[int], Path]) -> None:
    events = Events(client)
    decoder = held(daemon, "whisperd.audio.decoder")
    jobs: dict[int, str] = {}
    for number, priority in enumerate(["background", *WAITING]):
        jobs[submit(client, not_audio(number), priority=priority)["id"]] = priority
        wait_for_lane(client, "decode", active=1, waiting=number)
    decoder.resume()
    assert list(events.order("failed", jobs))[1:] == WANTED


def test_downloads(client: RawClient, recording: Callable[..., Path]) -> None:
    events = Events(client)
    client.call("pause")
    with serving(recording(1)) as server:
        jobs: dict[int, str] = {}
        for number, priority in enumerate(WAITING):
            source = {"kind": "url", "url": server.url(f"status/404/{number}.wav")}
            jobs[client.call("submit", source=source, priority=priority)["job"]["id"]] = priority
        client.call("resume")
        assert list(events.order("failed", jobs)) == WANTED


def test_the_model(client: RawClient, recording: Callable[..., Path]) -> None:
    events = Events(client)
    client.call("pause")
    jobs = {submit(client, recording(), priority=priority)["id"]: priority for priority in WAITING}
    wait_for_lane(client, "model", active=0, waiting=len(jobs))
    client.call("resume")
    assert list(events.order("running", jobs)) == WANTED


def test_windows_of_the_model(start_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]) -> None:
    """Three windows in the background are done early beside thrice six urgent ones; after eight for each, last."""
    daemon = start_daemon(model=str(micro), ready=True, open_runs=4, batch_windows=1, interactive_windows_in_a_row=1)
    with daemon.client() as client:
        events = Events(client)
        client.call("pause")
        jobs = {
            submit(client, recording(seconds), priority=priority, options=PLAIN_OPTIONS)["id"]: priority
            for seconds, priority in [(90, "background"), *[(180, "interactive")] * 3]
        }
        wait_for_lane(client, "model", active=0, waiting=len(jobs))
        client.call("resume")
        assert next(events.order("done", jobs)) == "background"
