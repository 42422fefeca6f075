"""What `hello` and `stats` tell of who asks and of what does the work, for who looks into an installation."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable

import pytest

from tests.support import NO_MODEL, Daemon, wait_until


def test_hello_tells_who_one_is(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model=NO_MODEL)
    with daemon.client() as client:
        hello = client.call("hello")
    assert (hello["uid"], hello["admin"]) == (os.geteuid(), True)


def test_stats_tell_the_software_of_every_helper(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model=NO_MODEL)
    with daemon.client() as client:
        assert not daemon.helpers("whisperd.fetch.fetcher"), "without need there is no fetcher"
        stats = client.call("stats", inspect=True)
        again = client.call("stats", inspect=True)
    assert len(daemon.helpers("whisperd.fetch.fetcher")) == 1
    for told in (stats, again):
        assert told["lanes"]["fetch"]["yt_dlp"].startswith("20")
        assert told["software"]["av"] == importlib.metadata.version("av")
        assert told["software"]["ffmpeg"]
        assert told["software"]["python"] == platform.python_version()


def test_a_mean_of_nothing_is_null(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model=NO_MODEL)
    with daemon.client() as client:
        model = client.call("stats")["model"]
    assert [model[key] for key in ("windows_per_s", "tokens_per_s", "batch_occupancy")] == [None] * 3


def test_the_model_tells_what_it_runs_on_also_when_it_cannot_be_loaded(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model="/nowhere/model.pt")
    with daemon.client() as client:
        wait_until(lambda: client.call("stats")["software"]["torch"], 60, "the model's process has told")
        software = client.call("stats")["software"]
    assert software["torch"] == importlib.metadata.version("torch")
    assert software["whisper"] == importlib.metadata.version("openai-whisper")
    assert bool(software["cuda_devices"]) == (software["cuda_problem"] is None)


def test_a_helper_that_does_not_start_holds_up_no_answer(
    make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = make_daemon(model=NO_MODEL)
    broken = daemon.folder / "broken"
    broken.mkdir()
    (broken / "yt_dlp.py").write_text("raise ImportError('an upgrade went wrong')\n")
    clean = daemon.environment()
    monkeypatch.setattr(daemon, "environment", lambda: clean | {"PYTHONPATH": str(broken)})
    daemon.start()
    with daemon.client() as client:
        # The daemon itself gives up after 20 s.
        lane = client.call("stats", inspect=True, timeout_s=15)["lanes"]["fetch"]
        assert (lane["yt_dlp"], lane["js_runtime"]) == (None, None)
