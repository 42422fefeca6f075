"""Where a waiting job stands, as its followers are told by a whole daemon: over the socket, and on a terminal."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import NO_MODEL, Daemon, RawClient, stop_process, submit, wait_until
from tests.test_cli_terminal import Terminal

MINUTE_S = 60


def follow(client: RawClient, job: dict[str, Any]) -> int:
    """Follow a job; return under which number."""
    number = client.send("subscribe", job=job["id"])
    assert client.reply(number)["ok"]
    return number


def told(client: RawClient, number: int, **wanted: Any) -> dict[str, Any]:
    """Return the next progress that says so; what comes before it is dropped."""
    while True:
        event = client.receive_until(lambda message: message["id"] == number and "event" in message)
        if event["event"] == "progress" and wanted.items() <= event.items():
            return event


def test_who_follows_a_waiting_job_is_told_each_move_of_the_queue(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL)
    with daemon.client() as client, daemon.client() as follower:
        first, second, mine = [submit(client, recording(1)) for _ in range(3)]
        number = follow(follower, mine)
        event = told(follower, number, position=3)
        assert event.keys() == {"id", "event", "job", "progress", "phase", "position", "eta_s"}
        urgent = submit(client, recording(1), priority="interactive")
        told(follower, number, position=4)
        client.call("cancel", job=first["id"])
        told(follower, number, position=3)
        client.call("cancel", job=urgent["id"])
        told(follower, number, position=2)
        client.call("cancel", job=second["id"])
        told(follower, number, position=1)
        assert client.call("result", job=mine["id"])["job"]["position"] == 1


def test_each_of_many_jobs_followed_on_one_connection_is_told(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL)
    with daemon.client() as client, daemon.client() as follower:
        jobs = [submit(client, recording(0.2))["id"] for _ in range(12)]
        for job in jobs:
            follow(follower, {"id": job})
        places: dict[int, int] = {}

        def wait_for(wanted: dict[int, int]) -> None:
            while places != wanted:
                event = follower.receive_until(lambda message: message.get("event") in ("progress", "end"))
                if event["event"] == "end":
                    del places[event["job"]]
                else:
                    places[event["job"]] = event["position"]

        wait_for({job: place for place, job in enumerate(jobs, 1)})
        client.call("cancel", job=jobs[0])
        wait_for({job: place for place, job in enumerate(jobs[1:], 1)})


def test_a_start_moves_the_queue_and_what_runs_has_no_position(
    start_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=str(micro), open_runs=1, ready=True)
    with daemon.client() as client, daemon.client() as follower:
        client.call("pause")
        first, mine = submit(client, recording(10 * MINUTE_S)), submit(client, recording(60))
        number = follow(follower, mine)
        told(follower, number, position=2, phase="waiting for the model")
        client.call("resume")
        told(follower, number, position=1)
        client.call("cancel", job=first["id"])
        events: list[dict[str, Any]] = []
        while not events or events[-1]["event"] != "end":
            events.append(follower.receive_until(lambda message: message["id"] == number and "event" in message))
        states = [event.get("state") for event in events]
        running = [event for event in events[states.index("running") :] if event["event"] == "progress"]
        assert running
        assert {event["position"] for event in running} == {None}


def test_decoding_and_loading_are_told(
    start_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=str(micro), decoders=1, heartbeat_timeout_s=60)
    (model,) = wait_until(lambda: daemon.helpers("whisperd.model.main"))
    (decoder,) = wait_until(lambda: daemon.helpers("whisperd.audio.decoder"))
    stop_process(model.pid)
    stop_process(decoder.pid)
    with daemon.client() as client, daemon.client() as follower:
        assert client.call("health")["model"]["state"] == "loading", "it imports torch for seconds"
        number = follow(follower, submit(client, recording(2)))
        told(follower, number, position=1, phase="decoding")
        os.kill(decoder.pid, signal.SIGCONT)
        told(follower, number, position=1, phase=f"loading the model {micro.name}")
        os.kill(model.pid, signal.SIGCONT)
        assert follower.receive_until(lambda message: message.get("event") == "end")["state"] == "done"


def test_the_terminal_shows_the_position_of_a_job_that_waits(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL)
    with daemon.client() as client:
        others = [submit(client, recording(1), priority="interactive") for _ in range(2)]
        terminal = Terminal(daemon.socket, "transcribe", str(recording(1)))
        terminal.read_until("waiting for the model, position 3")
        for place, job in zip((2, 1), others, strict=True):
            client.call("cancel", job=job["id"])
            terminal.read_until(f"waiting for the model, position {place}")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
