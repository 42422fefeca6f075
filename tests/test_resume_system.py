"""Runs that are cut off go on where they were: the same words, no window twice, no event repeated or taken back."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.model_bench import check_same, open_bench, plain, write_folders
from tests.models import micro_checkpoint
from tests.support import PLAIN_OPTIONS, Daemon, requires_program, speak_apart, stop_process, wait_until
from whisperd.model.loading import demo_folder

MODEL = "whisperd.model.main"
# No sentence twice: what repeats itself is tried again warmer, six times a window.
SPEECH = (
    "The harbour was quiet in the morning. Nobody spoke, because there was nothing to say. Then it was night. "
    "The notice above shall be included in all copies. On a good day there were more than thirty of them. "
    "The work is provided as it is"
)


class Follower:
    """Follows one job, across kills of the daemon, and keeps every numbered event."""

    def __init__(self, daemon: Daemon, job: int) -> None:
        self.daemon, self.job = daemon, job
        self.events: list[dict[str, Any]] = []
        self.reconnect()

    def reconnect(self) -> None:
        self.client = self.daemon.client()
        self._number = self.client.send("subscribe", job=self.job, after_seq=len(self.events))
        assert self.client.reply(self._number)["ok"]

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Take events up to and with the first that is `wanted`."""
        while True:
            event = self.client.receive_until(lambda m: m["id"] == self._number and "event" in m, 120)
            if "seq" in event:
                assert event["seq"] == len(self.events) + 1
                self.events.append(event)
                if wanted(event):
                    return

    def until_it_speaks(self) -> None:
        """Wait until it runs, and for the first words that it then adds."""
        self.until(lambda event: event.get("state") == "running")
        self.until(lambda event: event["event"] == "segment")

    @property
    def segments(self) -> list[dict[str, Any]]:
        """The segments that count: those after the last `discard`."""
        found: list[dict[str, Any]] = []
        for event in self.events:
            if event.get("discard"):
                found = []
            if event["event"] == "segment":
                found.append(event["segment"])
        return found

    @property
    def states(self) -> list[str]:
        """The states the job went through; `!` marks a `discard`."""
        return [
            event["state"] + ("!" if event.get("discard") else "")
            for event in self.events
            if event["event"] != "segment"
        ]


def settle(daemon: Daemon) -> None:
    """Stop the model process and wait until the daemon has recorded all it said: so a kill comes at a known point."""
    (model,) = daemon.helpers(MODEL)
    stop_process(model.pid)
    with daemon.client() as client:
        for _ in range(3):  # each goes through the loop and the store's thread
            client.call("stats")


def kill_helper(daemon: Daemon) -> None:
    (model,) = daemon.helpers(MODEL)
    model.kill()


def kill_daemon(daemon: Daemon) -> None:
    daemon.kill()
    daemon.start()


def stop_daemon(daemon: Daemon) -> None:
    assert daemon.stop() == 0
    daemon.start()


def unload(daemon: Daemon) -> None:
    with daemon.client() as client:
        client.call("model", action="unload")
        wait_until(lambda: not daemon.helpers(MODEL))
        client.call("model", action="load")


def stand_still(daemon: Daemon) -> None:
    """The process is stopped already: wait until it is found silent and has been replaced."""
    (model,) = daemon.helpers(MODEL)
    wait_until(lambda: not model.is_running())


CUTS = (kill_helper, unload, kill_daemon, stop_daemon, stand_still)


def answered(daemon: Daemon, run: int) -> list[int]:
    """Return which calls of the model were answered for a run by computing, in all processes so far."""
    return [int(call) for call in re.findall(rf"answered run={run} call=(\d+)", daemon.log())]


def words_of(transcript: dict[str, Any]) -> dict[str, Any]:
    """Return what a transcript says, without how long its last start took."""
    return {name: value for name, value in transcript.items() if name != "timing"}


def check_whole(daemon: Daemon, follower: Follower, run: int, *, cuts: int) -> dict[str, Any]:
    """Wait for the end; nothing was computed or told twice. Return the transcript."""
    follower.until(lambda event: event["event"] == "end")
    transcript: dict[str, Any] = follower.client.call("result", job=follower.job)["transcript"]
    assert follower.states == ["queued", *["running", "queued"] * cuts, "running", "done"]
    assert follower.segments == transcript["segments"]
    calls = answered(daemon, run)
    assert calls == list(range(len(calls))), "each call once, in order"
    with closing(sqlite3.connect(daemon.state_dir / "whisperd.sqlite3")) as db:
        assert db.execute("SELECT count(*) FROM journal WHERE run_id = ?", (run,)).fetchone() == (0,)
    return transcript


def test_a_run_goes_on_where_it_was_cut_off(
    start_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=str(micro), ready=True, log_level="debug", helper_backoff_s=0.01, heartbeat_timeout_s=5)
    path = recording(300)
    # Drawn above temperature 0: words that come out the same are no accident.
    options = PLAIN_OPTIONS | {"temperature": 1.0}
    with daemon.client() as client:
        follower = Follower(daemon, client.submit(path, options=options)["id"])
    for cut in CUTS:
        follower.until_it_speaks()
        settle(daemon)
        cut(daemon)
        follower.reconnect()
    whole = check_whole(daemon, follower, 1, cuts=len(CUTS))
    with daemon.client() as client:
        undisturbed = client.result(client.submit(path, options=options, fresh=True)["id"])["transcript"]
    assert words_of(undisturbed) == words_of(whole)
    assert len(answered(daemon, 1)) == len(answered(daemon, 2)) >= 10


@requires_program("flite")
def test_real_speech_goes_on_with_the_same_tokens_and_word_times(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """Those of openai-whisper, which nobody disturbed."""
    daemon = start_daemon(model=str(demo_folder()), ready=True, log_level="debug", helper_backoff_s=0.01)
    path = speak_apart(SPEECH, tmp_path / "harbour.wav", every_s=12)
    options = {"word_timestamps": True, "temperature": 0}
    with daemon.client() as client:
        follower = Follower(daemon, client.submit(path, options=options)["id"])
    for cut in (kill_helper, kill_daemon):
        follower.until_it_speaks()
        settle(daemon)
        cut(daemon)
        follower.reconnect()
    whole = check_whole(daemon, follower, 1, cuts=2)
    assert whole["duration_s"] > 60, "longer than two windows"
    write_folders(tmp_path, speech=path.read_bytes()[44:])
    upstream = open_bench("demo", tmp_path).upstream(**options)
    check_same(whole["segments"], plain(upstream, words=True))
    assert whole["text"] == upstream["text"]


# --- when it may not go on ---


def test_another_model_and_an_unusable_journal_begin_anew_and_say_so(
    make_daemon: Callable[..., Daemon], micro: Path, tmp_path: Path, recording: Callable[..., Path]
) -> None:
    daemon = make_daemon(model=str(micro))
    daemon.start(ready=True)
    path = recording(120)
    for unusable in (True, False):
        with daemon.client() as client:
            follower = Follower(daemon, client.submit(path, options=PLAIN_OPTIONS, fresh=True)["id"])
        follower.until_it_speaks()
        settle(daemon)
        daemon.kill()
        if unusable:
            with closing(sqlite3.connect(daemon.state_dir / "whisperd.sqlite3")) as db, db:
                db.execute("UPDATE journal SET entry = x'93a3616c6c0705'")  # ["all", 7, 5]: another question
        else:
            daemon.settings["model"] = str(micro_checkpoint(tmp_path, seed=5))
        daemon.start()
        follower.reconnect()
        follower.until(lambda event: event["event"] == "end")
        noticed = ["running", "queued"] if unusable else []  # by the helper; another model is by the daemon
        assert follower.states == ["queued", "running", "queued", *noticed, "running!", "done"]
        with daemon.client() as client:
            assert client.call("result", job=follower.job)["transcript"]["segments"] == follower.segments
            undisturbed = client.result(client.submit(path, options=PLAIN_OPTIONS, fresh=True)["id"])["transcript"]
        assert undisturbed["segments"] == follower.segments
