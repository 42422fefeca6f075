"""A model that has nothing to do is unloaded after a while, and the next job loads it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.media_server import serving
from tests.support import PLAIN_OPTIONS, Daemon, RawClient, submit, wait_until
from whisperd.daemon.lanes.idleness import keep_alive_s

MODEL = "whisperd.model.main"


@pytest.mark.parametrize(
    ("setting", "device", "wanted"),
    [(None, "cuda:0", 600), (None, "cpu", None), (30, "cuda:1", 30), (30, "cpu", 30), (0, "cuda:0", None)],
)
def test_the_default_is_for_gpus_and_a_setting_for_both(
    setting: float | None, device: str, wanted: float | None
) -> None:
    assert keep_alive_s(setting, device) == wanted


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Callable[..., Daemon], micro: Path) -> Daemon:
    """One for all tests here; each begins with waiting until its model is unloaded, or does not care."""
    settings = {"fetch_allow_private": True, "fetch_extractors": ["generic"]}
    return start_module_daemon(model=str(micro), keep_alive_s=0.3, **settings)


@pytest.fixture
def client(daemon: Daemon) -> Iterator[RawClient]:
    with daemon.client() as client:
        yield client


def unloaded(daemon: Daemon, client: RawClient) -> None:
    """Wait until the model is unloaded, and its process gone."""
    wait_until(lambda: client.call("health")["model"]["state"] == "unloaded", 20, "it is unloaded")
    wait_until(lambda: not daemon.helpers(MODEL), 10, "its process has ended")


def test_an_idle_model_is_unloaded_and_the_next_job_loads_it(
    daemon: Daemon, client: RawClient, recording: Callable[..., Path]
) -> None:
    # Longer than it may be idle: work is not.
    answer = client.result(submit(client, recording(150))["id"])["job"]
    assert (answer["state"], answer["attempts"]) == ("done", 1)
    unloaded(daemon, client)
    health = client.call("health")
    assert (health["status"], health["problems"]) == ("ready", [])
    assert daemon.whisperctl("health").returncode == 0
    before = client.call("stats")["model"]["starts"]
    assert client.result(submit(client, recording())["id"])["job"]["state"] == "done"
    model = client.call("stats")["model"]
    assert (model["starts"], model["crashes"]) == (before + 1, 0)


def test_a_paused_queue_wakes_no_model_and_what_an_admin_unloads_stays_unloaded(
    daemon: Daemon, client: RawClient, recording: Callable[..., Path]
) -> None:
    def waits(job: dict[str, Any]) -> None:
        wait_until(lambda: client.call("stats")["lanes"]["model"]["waiting"] == 1, 20, "it is decoded")
        assert not daemon.helpers(MODEL)
        assert client.call("result", job=job["id"])["job"]["state"] == "queued"

    client.call("pause")
    unloaded(daemon, client)
    job = submit(client, recording())
    waits(job)
    client.call("resume")
    assert client.result(job["id"])["job"]["state"] == "done"
    unloaded(daemon, client)
    client.call("model", action="unload")
    assert client.call("health")["status"] == "paused"
    job = submit(client, recording())
    waits(job)
    client.call("model", action="load")
    assert client.result(job["id"])["job"]["state"] == "done"


def test_an_interactive_download_wakes_the_model_and_a_background_one_does_not(
    daemon: Daemon, client: RawClient, recording: Callable[..., Path]
) -> None:
    with serving(recording(5)) as server:
        source = {"kind": "url", "url": server.url("slow/talk.wav")}

        def fetch(**params: Any) -> dict[str, Any]:
            job: dict[str, Any] = client.call("submit", source=source, options=PLAIN_OPTIONS, **params)["job"]
            return job

        unloaded(daemon, client)
        job = fetch()
        wait_until(lambda: server.asked["/slow/talk.wav"] == 2, 20, "it is being downloaded")
        assert client.call("health")["model"]["state"] == "unloaded"
        assert fetch(priority="interactive")["state"] == "fetching"
        wait_until(lambda: client.call("health")["model"]["state"] == "ready", 30, "loaded for somebody who waits")
        server.go_on.set()
        assert client.result(job["id"])["job"]["state"] == "done"
