"""How often who follows a waiting job is told, and who is left out: on a clock that the test moves."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.moved_time import MovedLoop, link_on
from tests.support import RawClient
from tests.test_server import settings
from whisperd.daemon.scheduler import Turns
from whisperd.daemon.state.board import Board
from whisperd.daemon.state.telling import Teller
from whisperd.daemon.store.rows import Change, Event, JobRow, RunRow
from whisperd.daemon.watchers import Subscription, Watchers
from whisperd.daemon.wire.server import Peer
from whisperd.protocol.jobs import JobState, Priority


def rows(
    number: int, state: JobState = JobState.QUEUED, priority: Priority = Priority.BACKGROUND, *, decoded: bool = True
) -> Change:
    """Return a job with a run of its own, both of this number, as a commit tells of them."""
    nothing: dict[str, Any] = {"started_at": None, "ended_at": None, "error_code": None, "error_message": None}
    job = JobRow(
        id=number, run_id=number, uid=1, state=state, priority=priority, attached=False, key=None,
        source={"kind": "fd", "name": "talk.m4a"}, options={}, submitted_at=0.0, last_seq=1, **nothing,
    )  # fmt: skip
    run = RunRow(
        id=number, uid=1, state=state, share_key=b"", folder=f"f{number}", sha256="00", size_bytes=1, options={},
        decoded=decoded, audio_s=1.0, truncated=False, starts=0, segments=0, deaths=0,
        source=None, source_key=None, fresh=False, fetch_failures=0, title=None, made_by=None, edition=0,
        suspicion=0, created_at=0.0, ended_at=None, audio_expires_at=None, retried=False,
    )  # fmt: skip
    return Change(jobs=[job], runs=[run])


class Queue:
    """A board that the test moves, and connections that follow its jobs."""

    def __init__(self, folder: Path) -> None:
        self.loop = MovedLoop()
        self.board = Board(Turns(16))
        self.watchers = Watchers(most_per_user=1000, unlimited=lambda uid: True)
        self.teller = Teller(self.loop, self.board, self.watchers)
        self._config = settings(folder, max_output_bytes=1 << 22)
        self._clients: list[RawClient] = []

    def commit(self, number: int, state: JobState = JobState.QUEUED, priority: Priority = Priority.BACKGROUND) -> None:
        """Let a job come, or move."""
        self.board.apply(rows(number, state, priority))
        self.teller.look()

    def follow(self, *jobs: int) -> tuple[RawClient, Peer]:
        """Return a new connection that follows these jobs, and the peer that it is to the daemon."""
        theirs, ours = socket.socketpair()
        client = RawClient(theirs)
        self._clients.append(client)
        peer = link_on(self.loop, self._config, ours, number=len(self._clients)).peer
        for job in jobs:
            number = client.send("subscribe", job=job)
            self.loop.at(self.loop.now_s)
            self.watchers.subscribe(Subscription(peer=peer, request_id=number, uid=1, job_id=job))
            self.teller.came()
        return client, peer

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.loop.close()


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = Queue(tmp_path)
    for number in range(1, 6):
        queue.commit(number)
    yield queue
    queue.close()


def heard(client: RawClient) -> list[tuple[int, int | None]]:
    """Return the jobs and positions that have come by now."""
    found = []
    client.socket.setblocking(False)
    try:
        while True:
            event = client.receive(0.001)
            found.append((event["job"], event["position"]))
    except (TimeoutError, BlockingIOError):
        return found


def test_many_moves_are_told_as_one_and_no_move_is_not_told(queue: Queue) -> None:
    client, _ = queue.follow(5)
    queue.loop.at(0)
    assert heard(client) == [(5, 5)]
    for number in (1, 2):
        queue.commit(number, JobState.RUNNING)
        queue.loop.at(0.1)
    assert heard(client) == [], "not yet"
    queue.loop.at(1)
    assert heard(client) == [(5, 3)]
    queue.commit(6)
    queue.loop.at(2)
    assert heard(client) == [], "who came behind him is no news"
    queue.commit(7, priority=Priority.INTERACTIVE)
    queue.loop.at(3)
    assert heard(client) == [(5, 4)]


def test_all_jobs_that_one_connection_follows_are_told(queue: Queue) -> None:
    client, _ = queue.follow(2, 3, 4, 5)
    queue.loop.at(1)
    queue.loop.at(1)
    assert sorted(heard(client)) == [(2, 2), (3, 3), (4, 4), (5, 5)]
    queue.commit(1, JobState.CANCELLED)
    queue.loop.at(2)
    queue.loop.at(2)
    assert sorted(heard(client)) == [(2, 1), (3, 2), (4, 3), (5, 4)]


def test_who_does_not_keep_up_holds_up_nobody_and_is_told_in_the_end(queue: Queue) -> None:
    slow, peer = queue.follow(5)
    quick, _ = queue.follow(4)
    queue.loop.at(0)
    for seq in range(2, 1000):
        segment = {"segment": {"text": "word " * 200}}
        queue.watchers.publish([Event(job_id=5, uid=1, seq=seq, kind="segment", payload=segment)])
    queue.loop.at(0.1)
    assert peer.pending_output > 0
    heard(quick)
    queue.commit(1, JobState.RUNNING)
    queue.loop.at(1)
    assert heard(quick) == [(4, 3)]
    events = []
    while not events or events[-1].get("seq") != 999:
        queue.loop.at(1)
        events.append(slow.receive())
    assert [event["position"] for event in events if event["event"] == "progress"] == [5]
    queue.loop.at(2)
    assert heard(slow) == [(5, 4)]


def test_who_comes_back_to_the_queue_is_told_anew(queue: Queue) -> None:
    client, _ = queue.follow(1)
    queue.loop.at(0)
    for state in (JobState.RUNNING, JobState.QUEUED):
        queue.commit(1, state)
        queue.watchers.publish([Event(job_id=1, uid=1, seq=2, kind="state", payload={"state": state})])
    queue.loop.at(1)
    events = [client.receive() for _ in range(4)]
    assert [event.get("state", event.get("position")) for event in events] == [1, "running", "queued", 1]


def test_what_the_model_does_is_told_to_who_waits_for_it(queue: Queue) -> None:
    client, _ = queue.follow(1)
    queue.loop.at(0)
    queue.board.note_model("loading the model small")
    queue.teller.look()
    queue.loop.at(1)
    queue.board.note_model("")
    queue.teller.look()
    queue.loop.at(2)
    phases = [client.receive()["phase"] for _ in range(3)]
    assert phases == ["waiting for the model", "loading the model small", "waiting for the model"]
