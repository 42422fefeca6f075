"""The model helper as the daemon meets it: a process at the other end of a socketpair."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest

from tests import models
from tests.support import wait_until
from whisperd import __version__
from whisperd.model.helper import speech_threads
from whisperd.protocol.channel import Channel
from whisperd.protocol.frames import MAX_REPLY_BYTES
from whisperd.protocol.helper_messages import (
    Cancel,
    Configure,
    Failed,
    Finished,
    Heartbeat,
    HelperHello,
    HelperMessage,
    ModelStatus,
    Prioritise,
    Progress,
    Segments,
    Transcribe,
    from_wire,
    to_wire,
)
from whisperd.protocol.options import parse_options


class Helper:
    """A running model helper; what it says is read in order, heartbeats passed over."""

    def __init__(self, settings: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "whisperd.model.main", "--fd", str(theirs.fileno()), "--nice", "1"]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self.channel = Channel(ours, max_bytes=MAX_REPLY_BYTES)
        hello = self.next()
        assert hello == HelperHello(role="model", version=__version__, pid=self.process.pid)
        self.send(Configure(settings=settings))

    def send(self, message: HelperMessage) -> None:
        self.channel.send(to_wire(message))

    def next(self, timeout_s: float = 60) -> HelperMessage:
        """Return the next message that is no heartbeat."""
        while True:
            message = from_wire(self.channel.receive(timeout_s)[0])
            if not isinstance(message, Heartbeat):
                return message

    def until(self, wanted: Callable[[HelperMessage], bool]) -> list[HelperMessage]:
        """Return what it says, up to and with the first message that is `wanted`."""
        heard = [self.next()]
        while not wanted(heard[-1]):
            heard.append(self.next())
        return heard

    def end_of(self, run: int) -> list[HelperMessage]:
        """Return what it says up to the answer of a run."""
        return self.until(lambda message: isinstance(message, Finished | Failed) and message.run == run)

    def transcribe(self, run: int, folder: str, *, interactive: bool = False, **options: Any) -> None:
        self.send(
            Transcribe(
                run=run,
                generation=1,
                folder=folder,
                options=parse_options(options),
                interactive=interactive,
                truncated=folder == "short",
                journal=0,
                told=0,
            )
        )

    @property
    def threads(self) -> int:
        """How many threads the system knows of."""
        return psutil.Process(self.process.pid).num_threads()

    def close(self) -> None:
        """Go away, as a daemon does; the helper must not outlive it."""
        self.channel.close()
        try:
            assert self.process.wait(20) == 0
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the micro model, and a spool: `short` is 8 s, `long` is 40 min (80 windows)."""
    place = tmp_path_factory.mktemp("place")
    models.micro_checkpoint(place)
    (place / "cache").mkdir()
    noise = np.random.default_rng(0).standard_normal(8 * 16_000)
    pcm = (2000 * noise).astype("<i2")
    for folder, repeats in (("short", 1), ("long", 300)):
        (place / "spool" / folder).mkdir(parents=True)
        np.tile(pcm, repeats).tofile(place / "spool" / folder / "audio.pcm")
    return place


def settings(place: Path, model: str = "") -> dict[str, Any]:
    return {
        "spool": str(place / "spool"),
        "cache_dir": str(place / "cache"),
        "model": model or str(place / "micro.pt"),
        "device": "auto",
        "threads": 1,
        "dtype": "auto",
        "open_runs": 3,
        "fast_windows": 3,
        "batch_windows": 2,
        "device_memory_mb": 0,
        "interactive_windows_in_a_row": 8,
    }


@pytest.fixture(scope="module")
def helper(place: Path) -> Iterator[Helper]:
    helper = Helper(settings(place))
    loading, ready = helper.next(), helper.next()
    assert isinstance(loading, ModelStatus)
    assert (loading.state, loading.error, loading.capacity, loading.traits) == ("loading", None, 0, {})
    assert isinstance(ready, ModelStatus)
    assert (ready.state, ready.name, ready.capacity) == ("ready", "micro", 3)
    assert (ready.device, ready.dtype) in [("cpu", "float32"), ("cuda:0", "float16")]
    assert ready.traits == {"multilingual": True, "languages": 99, "translates": True, "vocabulary": 51865}
    yield helper
    helper.close()


def transcript_of(message: HelperMessage) -> dict[str, Any]:
    assert isinstance(message, Finished), message
    transcript: dict[str, Any] = msgpack.unpackb(message.transcript)
    return transcript


def live_segments(heard: list[HelperMessage], run: int) -> list[dict[str, Any]]:
    return [
        part for message in heard if isinstance(message, Segments) and message.run == run for part in message.segments
    ]


def test_a_run_from_order_to_transcript(helper: Helper) -> None:
    helper.transcribe(1, "short")
    heard = helper.end_of(1)
    transcript = transcript_of(heard[-1])
    assert transcript.keys() == {
        "text",
        "language",
        "duration_s",
        "segments",
        "model",
        "versions",
        "truncated",
        "mode",
        "coverage",
        "timing",
    }
    assert (transcript["language"], transcript["duration_s"], transcript["truncated"]) == ("en", 8.0, True)
    assert (transcript["model"], transcript["versions"]["whisperd"]) == ("micro", __version__)
    assert transcript["segments"]
    assert live_segments(heard, 1) == transcript["segments"]
    assert transcript["text"] == "".join(segment["text"] for segment in transcript["segments"])
    progress = [message for message in heard if isinstance(message, Progress)]
    assert (progress[-1].done, progress[-1].total) == (8.0, 8.0)


def test_the_micro_model_says_the_same_whatever_was_said_before(helper: Helper) -> None:
    helper.transcribe(2, "short")
    helper.transcribe(3, "short", initial_prompt="quite a long prompt " * 20)
    heard = helper.until(lambda message: isinstance(message, Finished))
    heard += helper.until(lambda message: isinstance(message, Finished))
    first, second = (transcript_of(message) for message in heard if isinstance(message, Finished))
    said = [[(part["start"], part["tokens"]) for part in each["segments"]] for each in (first, second)]
    assert said[0] == said[1]
    assert {part["temperature"] for part in (*first["segments"], *second["segments"])} == {0.0}


def test_an_interactive_run_overtakes_and_a_long_one_is_cancelled_midway(helper: Helper) -> None:
    helper.transcribe(4, "long")
    helper.until(lambda message: isinstance(message, Segments))
    helper.transcribe(5, "short", interactive=True)
    heard = helper.end_of(5)
    assert transcript_of(heard[-1])["duration_s"] == 8.0
    assert not any(isinstance(message, Finished) and message.run == 4 for message in heard)
    helper.send(Cancel(run=4, generation=1))
    last = helper.end_of(4)[-1]
    assert last == Failed(run=4, generation=1, code="cancelled", message="cancelled")
    helper.transcribe(6, "short")
    assert transcript_of(helper.end_of(6)[-1])["segments"], "it works on after a cancel"


def test_a_run_that_waits_for_its_turn_is_cancelled_too(helper: Helper) -> None:
    helper.transcribe(7, "long", interactive=True)
    helper.until(lambda message: isinstance(message, Segments))
    helper.transcribe(8, "long")
    helper.send(Cancel(run=8, generation=1))
    last = helper.end_of(8)[-1]
    assert isinstance(last, Failed)
    assert last.code == "cancelled"
    helper.send(Prioritise(run=7, generation=1, interactive=False))
    helper.send(Cancel(run=7, generation=1))
    assert isinstance(helper.end_of(7)[-1], Failed)


def test_what_is_not_for_this_model_or_not_there_fails_alone(helper: Helper) -> None:
    helper.send(Cancel(run=99, generation=1))  # nobody's: it ended a moment ago
    for run, folder, options, code in (
        (10, "short", {"language": "yue"}, "bad_request"),
        (11, "short", {"suppress_tokens": [60_000]}, "bad_request"),
        (12, "no such folder", {}, "internal"),
    ):
        helper.transcribe(run, folder, **options)
        last = helper.end_of(run)[-1]
        assert isinstance(last, Failed)
        assert (last.code, bool(last.message)) == (code, True)


def test_its_heart_beats_and_shows_the_work(helper: Helper) -> None:
    helper.transcribe(13, "short")
    helper.end_of(13)
    last = from_wire(helper.channel.receive(10)[0])
    assert isinstance(last, Heartbeat)
    assert last.beat > 0
    assert {"windows", "tokens", "audio_s", "busy_s"} <= last.gauges.keys()
    assert last.gauges["windows"] >= 1
    assert last.gauges["tokens"] > last.gauges["windows"]
    assert last.gauges["audio_s"] >= 8.0
    assert last.gauges["steps"] > last.gauges["windows"], "three together at most, of more than three steps each"
    assert (last.gauges["batch_windows"], 0 < last.gauges["batch_occupancy"] <= 1) == (2, True)


def test_a_model_that_does_not_load_is_said_and_waited_with(place: Path) -> None:
    helper = Helper(settings(place, model="small"))
    try:
        failed = helper.until(lambda message: isinstance(message, ModelStatus) and message.state != "loading")[-1]
        assert isinstance(failed, ModelStatus)
        assert (failed.state, failed.name, failed.traits) == ("failed", "small", {})
        assert str(place / "cache" / "models" / "small.pt") in str(failed.error)
        helper.transcribe(1, "short")
        answer = helper.next()
        assert isinstance(answer, Failed)
        assert (answer.code, answer.message) == ("model_unavailable", failed.error)
    finally:
        helper.close()


def test_its_threads_are_as_many_as_it_was_given_and_one_a_run(place: Path) -> None:
    """Whoever computes on more than one core gets a team of his own; with a second one all go to sleep all the time."""
    helper = Helper(settings(place) | {"threads": 3, "open_runs": 16})
    try:
        helper.until(lambda message: isinstance(message, ModelStatus) and message.state == "ready")
        # Main, what it hears and says, batcher, mels, word times, listening, numpy's; the loader and its team are gone.
        wait_until(lambda: helper.threads <= 7 + speech_threads() + (os.cpu_count() or 1))
        idle = helper.threads
        for run in range(16):
            helper.transcribe(run, "short", word_timestamps=True)
        busy, done = [], 0
        while done < 16:
            done += isinstance(helper.next(), Finished)
            busy.append(helper.threads)
        settled = idle + 2  # the batcher's team, and no other
        assert max(busy) <= settled + 16, (idle, max(busy))
        wait_until(lambda: helper.threads <= settled)
    finally:
        helper.close()
