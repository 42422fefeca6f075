"""A named model that is not there is downloaded by the daemon, whoever is killed meanwhile, or pulled ahead of time."""

from __future__ import annotations

import hashlib
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.media_server import MediaServer, serving
from tests.support import Daemon, RawClient, submit, wait_until
from tests.test_cli_terminal import Terminal

FETCHER, MODEL = "whisperd.fetch.fetcher", "whisperd.model.main"


@pytest.fixture
def server(micro: Path) -> Iterator[MediaServer]:
    with serving(micro) as server:
        server.slow_from = 6 * 2**20
        yield server


@pytest.fixture
def settings(server: MediaServer) -> dict[str, Any]:
    """A daemon whose model `ours` the server has, and sends as `go_on` allows."""
    return {
        "model": "ours",
        "extra_models": [f"ours={hashlib.sha256(server.content).hexdigest()}"],
        "models_url": server.url("trickle"),
        "fetch_allow_private": True,
        "fetch_backoff_s": 0.05,
        "helper_backoff_s": 0.01,
    }


def folder(daemon: Daemon) -> dict[str, int]:
    """Return what lies in the folder of models, with its size."""
    return {path.name: path.stat().st_size for path in (daemon.cache_dir / "models").glob("*")}


def downloading(client: RawClient) -> bool:
    model = client.call("health")["model"]
    return model["state"] == "downloading" and model["progress"] > 0.3


def test_a_download_goes_on_after_kill_9_of_helper_and_daemon(
    make_daemon: Callable[..., Daemon],
    server: MediaServer,
    settings: dict[str, Any],
    recording: Callable[..., Path],
) -> None:
    daemon = make_daemon(**settings)
    daemon.start()
    with daemon.client() as client:
        job = submit(client, recording())
        wait_until(lambda: downloading(client), 30, "it is being downloaded")
        health = client.call("health")
        assert health["status"] == "starting"
        assert re.fullmatch(r"downloading the model ours \(\d+%\)", health["problems"][0])
        assert not daemon.helpers(MODEL)
        waiting = client.call("result", job=job["id"])["job"]
        assert (waiting["state"], waiting["phase"]) == ("queued", health["problems"][0])
        first, second = daemon.whisperctl("health").stdout.splitlines()
        assert first.startswith("starting · model ours is being downloaded (")
        assert second.startswith("downloading the model ours (")
        terminal = Terminal(daemon.socket, "transcribe", str(recording()))
        terminal.read_until("downloading the model ours (")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
        daemon.helpers(FETCHER)[0].kill()
        wait_until(lambda: len(server.parts) == 2, 20, "another helper asks for the rest")
        assert server.parts[1] > 2**20
    daemon.kill()
    assert set(folder(daemon)) == {"ours.pt.partial"}
    server.go_on.set()
    daemon.start(ready=True)
    with daemon.client() as client:
        assert client.result(job["id"])["job"]["state"] == "done"
        assert client.call("health")["model"] | {"dtype": ""} == {
            **{"name": "ours", "state": "ready", "device": "cpu", "dtype": ""},
            **{"error": None, "progress": None},
        }
    assert server.parts[2] >= server.parts[1]
    assert folder(daemon) == {"ours.pt": len(server.content)}
    assert not daemon.helpers(FETCHER), "nothing is left to do for it"


def test_without_a_network_it_says_so_and_a_pull_mends_it(
    start_daemon: Callable[..., Daemon], server: MediaServer, settings: dict[str, Any], recording: Callable[..., Path]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    daemon = start_daemon(**settings | {"models_url": f"http://127.0.0.1:{port}"})
    with daemon.client() as client:
        wait_until(lambda: client.call("health")["status"] == "degraded", 20)
        (problem,) = client.call("health")["problems"]
        assert problem.startswith("the model is not loaded: ")
        assert "check the network; then run `whisperctl model load`" in problem
        job = submit(client, recording())
        tried = daemon.log().count("again_in_s=")
        assert tried == 3, "four tries, and then an administrator is waited for"
        refused = daemon.whisperctl("model", "pull", "ours")
        assert refused.returncode == 1
        assert refused.stderr.count("trying again in ") == 3
        assert "check the network" in refused.stderr.splitlines()[-1]
        assert client.call("result", job=job["id"])["job"]["state"] == "queued"
        # There it is, and nobody has to say `load`.
        server.go_on.set()
        with serving(Path(server.recording), port=port):
            pulled = daemon.whisperctl("model", "pull", "ours")
            assert (pulled.returncode, pulled.stdout) == (0, f"{daemon.cache_dir}/models/ours.pt\n")
        assert client.result(job["id"])["job"]["state"] == "done"


def test_a_model_is_pulled_ahead_of_time_beside_the_one_that_works(
    start_daemon: Callable[..., Daemon], micro: Path, server: MediaServer, settings: dict[str, Any]
) -> None:
    daemon = start_daemon(**settings | {"model": str(micro)})
    with daemon.client() as client, daemon.client() as leaving:
        events = []
        number = leaving.send("pull", model="ours")
        assert leaving.reply(number)["result"] == {"model": "ours"}
        event = leaving.receive_until(lambda message: message.get("event") == "progress")
        assert event.keys() == {"id", "event", "done_bytes", "total_bytes"}
        assert event["total_bytes"] == len(server.content)
        assert client.call("stats")["lanes"]["weights"] == {"active": 1, "waiting": 0, "failed": 0}
        terminal = Terminal(daemon.socket, "model", "pull", "ours")
        terminal.read_until("ours [######")
        leaving.close()
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
        wait_until(lambda: not daemon.helpers(FETCHER), 10, "nobody waits for it any more")
        assert folder(daemon)["ours.pt.partial"] > 0
        server.go_on.set()
        number = client.send("pull", model="ours")
        while not events or events[-1]["event"] != "end":
            events.append(client.receive_until(lambda message: message["id"] == number and "event" in message))
        assert events[-1] == {"id": number, "event": "end", "path": f"{daemon.cache_dir}/models/ours.pt", "error": None}
        assert len(server.parts) == 2
        assert server.parts[1] > 0, "what had arrived was gone on with"
        assert daemon.whisperctl("model", "pull", "ours").returncode == 0
        assert len(server.parts) == 2, "it is there"
        unknown = daemon.whisperctl("model", "pull", "smal")
        assert unknown.returncode == 2
        assert "tiny.en" in unknown.stderr
        assert daemon.whisperctl("model", "pull").returncode == 2


def test_nothing_is_downloaded_where_that_is_not_wanted(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model="tiny", models_url="")
    with daemon.client() as client:
        wait_until(lambda: client.call("health")["status"] == "degraded", 20)
        problem = client.call("health")["problems"][0]
        assert f"{daemon.cache_dir}/models/tiny.pt" in problem
        assert "models_url" in problem
        assert daemon.whisperctl("model", "pull", "base").returncode == 8
        assert not daemon.helpers(FETCHER)


def test_a_model_that_was_put_where_it_said_needs_no_download(
    start_daemon: Callable[..., Daemon], settings: dict[str, Any], micro: Path
) -> None:
    daemon = start_daemon(**settings | {"models_url": ""})
    refused = daemon.whisperctl("model", "pull", "ours")
    assert refused.returncode == 8
    path = Path(refused.stderr.split()[-1])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(micro.read_bytes()[:-1])
    damaged = daemon.whisperctl("model", "pull", "ours")
    assert (damaged.returncode, damaged.stderr) == (8, refused.stderr), "a damaged one is none"
    path.write_bytes(micro.read_bytes())
    pulled = daemon.whisperctl("model", "pull", "ours")
    assert (pulled.returncode, pulled.stdout) == (0, f"{path}\n")
    daemon.wait_ready()
