"""The model's process as the daemon watches it, where a real one cannot be had: one that not even SIGKILL ends."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.ledgers import ledger_on
from tests.watched_helper import run_until
from whisperd import __version__
from whisperd.daemon.config import Config
from whisperd.daemon.helpers.helper import Helper
from whisperd.daemon.lanes.model_process import ModelProcess
from whisperd.daemon.lanes.modelling import ModelLane
from whisperd.daemon.lanes.pool import Pool
from whisperd.daemon.lanes.weights import WeightsLane
from whisperd.daemon.loop import Loop
from whisperd.daemon.state.spool import Spool
from whisperd.daemon.store.database import Database
from whisperd.daemon.store.rows import NewJob
from whisperd.protocol.channel import Channel
from whisperd.protocol.frames import MAX_REPLY_BYTES
from whisperd.protocol.helper_messages import (
    Cancel,
    Failed,
    Finished,
    HelperHello,
    HelperMessage,
    ModelStatus,
    Transcribe,
    from_wire,
    to_wire,
)
from whisperd.protocol.jobs import Priority
from whisperd.protocol.options import parse_options

NEW = NewJob(
    uid=1,
    priority=Priority.BACKGROUND,
    attached=False,
    key=None,
    source={"kind": "fd", "name": "talk.m4a"},
    options=parse_options({}),
    fresh=False,
    fingerprint=b"f",
    share_key=b"s",
    folder="folder",
    sha256="00",
    size_bytes=3,
)


class Clock:
    """The loop's clock, which a test puts forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class Undying:
    """A body that says that a model is ready, and whose end comes when the test says `end`: its driver hangs."""

    def __init__(self) -> None:
        self.socket, far = socket.socketpair()
        self.channel = Channel(far, max_bytes=MAX_REPLY_BYTES)
        self.end_fd, self._end = os.pipe()
        self.pid = 4711
        self.kills = 0

    def start(self) -> None:
        self.channel.send(to_wire(HelperHello(role="model", version=__version__, pid=self.pid)))
        status = ModelStatus(
            state="ready", name="m", device="cuda:0", dtype="f", error=None, capacity=1, traits={}, fingerprint="f"
        )
        self.channel.send(to_wire(status))

    def hears(self, kind: type[HelperMessage]) -> bool:
        """Return whether a message of this kind has come, and take those before it."""
        try:
            while not isinstance(from_wire(self.channel.receive(0.001)[0]), kind):
                pass
        except TimeoutError:
            return False
        return True

    def kill(self) -> None:
        self.kills += 1

    def end(self) -> None:
        """The driver lets go."""
        self.channel.close()
        os.close(self._end)

    def reap(self) -> int | None:
        os.close(self.end_fd)
        return -9


def no_weights(loop: Loop, config: Config) -> WeightsLane:
    """Return a lane that fetches no weights."""
    pool = partial(Pool, loop, config, role="fetcher", module="", size=1, silent_s=1, settings={}, env={})
    return WeightsLane(lambda freed: pool(freed=freed), loop, config, {})


class Watched:
    """A model process of such bodies, and what it told."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.loop = loop = Loop(self.clock)
        self.bodies: list[Undying] = []
        self.gone: list[bool] = []
        places = {"socket": folder / "s", "state_dir": folder, "cache_dir": folder}
        config = Config(**places, model=str(folder / "m.pt"), helper_backoff_s=0.01)  # type: ignore[arg-type]
        self.process = ModelProcess(
            loop,
            config,
            spool=folder,
            env={},
            weights=no_weights(loop, config),
            on_status=lambda: None,
            on_message=lambda message: None,
            on_gone=self.gone.append,
            on_sample=lambda well: None,
            is_busy=lambda: True,
            make_helper=self._make_helper,
        )
        self.process.load()

    def _make_helper(self, loop: Loop, **arguments: object) -> Helper:
        self.bodies.append(Undying())
        return Helper(loop, body=self.bodies[-1], **arguments)  # type: ignore[arg-type]

    @property
    def state(self) -> str:
        return self.process.status.state

    def until_state(self, state: str) -> None:
        run_until(self.loop, lambda: self.state == state)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tmp_path)
    watched.until_state("ready")
    yield watched
    watched.process.stop()
    watched.bodies[-1].end()
    run_until(watched.loop, lambda: watched.process.helper is None)
    watched.loop.close()


def test_a_process_that_cannot_be_ended_takes_no_work_and_is_told(watched: Watched) -> None:
    helper = watched.process.ready
    assert helper is not None
    helper.kill("no progress for 600 s")
    assert watched.process.ready is None
    assert watched.state == "ready", "it may end in a moment"
    watched.clock.ahead_s += 20
    watched.until_state("failed")
    assert "process 4711 cannot be ended" in str(watched.process.status.error)
    assert watched.gone == [True], "what it had is in the queue again"
    watched.bodies[0].end()
    run_until(watched.loop, lambda: len(watched.bodies) == 2)
    watched.until_state("ready")
    assert watched.gone == [True], "which it is once"


def test_a_load_does_not_hide_a_process_that_cannot_be_ended(watched: Watched) -> None:
    watched.process.unload()
    assert watched.state == "unloaded"
    for _ in range(2):
        watched.clock.ahead_s += 20
        watched.until_state("failed")
        watched.process.load()
        assert watched.state == "loading"
    assert watched.bodies[0].kills == 3
    assert watched.gone == [False]
    watched.bodies[0].end()
    run_until(watched.loop, lambda: len(watched.bodies) == 2)
    watched.until_state("ready")


@pytest.mark.parametrize(
    "last_word",
    [Finished(run=1, generation=1, transcript=b"t"), Failed(run=1, generation=1, code="internal", message="no")],
)
def test_a_process_that_obeyed_is_not_killed_while_its_last_word_is_committed(
    tmp_path: Path, last_word: HelperMessage
) -> None:
    clock, body = Clock(), Undying()
    loop = Loop(clock)
    places = {"socket": tmp_path / "s", "state_dir": tmp_path, "cache_dir": tmp_path}
    config = Config(**places, model=str(tmp_path / "m.pt"), cancel_grace_s=5)  # type: ignore[arg-type]
    database = Database(tmp_path / "db", deliver=loop.call_soon_threadsafe, failed=pytest.fail)
    ledger = ledger_on(loop, database, Spool(tmp_path / "spool"))
    lane = ModelLane(
        loop,
        config,
        ledger,
        {},
        no_weights(loop, config),
        make_helper=lambda loop, **arguments: Helper(loop, body=body, **arguments),
    )
    ledger.when_changed.append(lane.changed)
    store = ledger.store
    ledger.board.apply(database.run(lambda db: store.accept(db, NEW, 0.0)))
    ledger.board.apply(database.run(lambda db: store.decoded(db, 1, audio_s=2.0, truncated=False)))
    database.start()
    lane.load()
    run_until(loop, lambda: body.hears(Transcribe))
    ledger.commit(lambda db, now: store.cancel(db, 1, now, uid=None))
    run_until(loop, lambda: body.hears(Cancel))

    disk_answers, overdue = threading.Event(), list[bool]()
    ledger.read(lambda db, now: disk_answers.wait(60), lambda answered: None)
    body.channel.send(to_wire(last_word))
    turns = loop.turns
    run_until(loop, lambda: loop.turns > turns + 2)  # it is read in the next one
    loop.call_later(6, lambda: overdue.append(True))
    clock.ahead_s += 6
    run_until(loop, lambda: overdue)
    assert (lane.active, body.kills) == (1, 0), "it has obeyed, and waits for the disk"
    disk_answers.set()
    run_until(loop, lambda: not lane.active)

    lane.stop()
    body.end()
    run_until(loop, lambda: lane.process.helper is None)
    database.stop()
    loop.close()
