"""Clients that mean no good against whole daemons: each finds a bound, and its neighbour notices nothing."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgpack
import psutil
import pytest

from tests.ledgers import ledger_on
from tests.support import NO_MODEL, Daemon, RawClient, error_of, requires_root, submit, wait_until
from tests.test_admission import client_as
from tests.test_daemon_faults import job_of_the_past
from whisperd.daemon.loop import Loop
from whisperd.daemon.state.inventory import Inventory
from whisperd.daemon.state.spool import Spool
from whisperd.daemon.store.database import Database

MIB = 2**20


def test_many_large_answers_to_who_does_not_read_cost_bounded_memory(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(model=NO_MODEL, output_bytes_per_user=128 * MIB, send_timeout_s=60)
    transcript = msgpack.packb({"text": "x" * 20 * MIB})
    job_id = job_of_the_past(daemon.state_dir, [], transcript)
    daemon.start()
    process = psutil.Process(daemon.pid)
    before = process.memory_info().rss
    with daemon.client() as neighbour:
        deaf = [daemon.client() for _ in range(2)]
        ids = [[client.send("result", job=job_id) for _ in range(10)] for client in deaf]  # 400 MiB of answers
        most = 0
        for _ in range(50):
            neighbour.call("health")
            neighbour.call("stats")
            most = max(most, process.memory_info().rss - before)
        assert most < 250 * MIB, "at most the user's budget, beside what SQLite and Python hold of one answer"
        # All of them are answered once they are read.
        for client, numbers in zip(deaf, ids, strict=True):
            for number in numbers:
                assert len(client.reply(number)["result"]["transcript"]["text"]) == 20 * MIB
            client.close()


def held_copier(daemon: Daemon) -> psutil.Process:
    """Stop the copier that was started ahead of the first copy."""
    copiers = wait_until(lambda: daemon.helpers("whisperd.audio.copier"))
    copiers[0].suspend()
    return copiers[0]


@requires_root
def test_a_file_that_grows_or_shrinks_while_it_is_copied(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model=NO_MODEL, socket_mode="0666", copiers=1, spool_bytes_per_user=MIB)
    source = {"kind": "fd", "name": "talk"}
    with client_as(daemon, 20_001) as client:
        for after_bytes, code in ((50 * MIB, "quota_exceeded"), (1000, None)):
            copier = held_copier(daemon)
            fd = os.memfd_create("talk")
            os.ftruncate(fd, 100_000)
            number = client.send("submit", source=source, descriptors=[fd])
            wait_until(lambda: client.call("stats")["lanes"]["copy"]["active"] == 1)
            os.ftruncate(fd, after_bytes)
            os.close(fd)
            copier.resume()
            reply = client.reply(number)
            assert (reply["ok"], reply.get("error", {}).get("code")) == (code is None, code)
        wait_until(lambda: client.call("stats")["spool_bytes"] <= 2 * 4096)


@requires_root
def test_submits_of_one_key_hold_a_bounded_number_of_descriptors(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, socket_mode="0666", copiers=1, capacity=6)
    with client_as(daemon, 20_001) as client, daemon.client() as root, recording().open("rb") as file:
        params = {"source": {"kind": "fd", "name": "talk"}, "key": "one", "descriptors": [file.fileno()]}
        job = client.call("submit", **params)["job"]
        root.call("pause")  # no download begins
        copier = held_copier(daemon)
        ids = [client.send("submit", **params) for _ in range(8)]
        refused = [client.reply(number)["error"]["code"] for number in ids[6:]]
        assert refused == ["quota_exceeded"] * 2, "three places in six are one user's, and each may be asked for again"
        client.call("jobs")  # asks the store, after it was asked for the key
        assert root.call("health")["queue"]["depth"] == 1, "what is only compared takes no place"
        with client_as(daemon, 20_002) as other:
            assert other.call("submit", source={"kind": "video", "id": "dQw4w9WgXcQ"})["job"]["state"] == "pending"
        copier.resume()
        assert [client.reply(number)["result"]["job"]["id"] for number in ids[:6]] == [job["id"]] * 6
        assert client.call("submit", **params)["job"]["id"] == job["id"]


def test_a_copy_has_its_time_whatever_its_reading_does(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, copiers=1, copy_limit_s=5, copy_timeout_s=600, cancel_grace_s=0.1)
    with daemon.client() as client:
        held_copier(daemon)
        assert error_of(lambda: submit(client, recording())) == "timed_out"
        assert submit(client, recording())["state"] == "queued", "by a new copier"


def test_a_flood_of_stats_is_one_count_at_a_time(tmp_path: Path) -> None:
    class CountedSpool(Spool):
        """Notes how often it is walked."""

        walks = 0

        def used_bytes(self) -> int:
            self.walks += 1
            return super().used_bytes()

    loop = Loop()
    database = Database(tmp_path / "db", deliver=loop.call_soon_threadsafe, failed=lambda reason: None)
    spool = CountedSpool(tmp_path / "spool")
    inventory = Inventory(loop, ledger_on(loop, database, spool), str(database.path))
    answers: list[object] = []

    def ask(left: int) -> None:
        for _ in range(left):
            inventory.ask(answers.append, answers.append)

    ask(500)
    loop.call_later(0, lambda: ask(500))
    database.start()
    deadline = loop.call_later(30, loop.stop)
    inventory.ask(lambda found: loop.call_later(0.05, loop.stop), answers.append)
    loop.run()
    deadline.cancel()
    loop.close()
    database.stop()
    assert len(answers) == 1000
    assert spool.walks <= 3, "those who ask while it counts share the next count"


def test_stats_are_never_older_than_the_question(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL)
    with daemon.client() as client, daemon.client() as flood:
        for count in range(1, 5):
            client.call("cancel", job=submit(client, recording())["id"])
            waiting = [flood.send("stats") for _ in range(20)]
            assert client.call("stats")["jobs"]["total"]["cancelled"] == count
            assert all(flood.reply(number)["result"]["jobs"]["total"]["cancelled"] == count for number in waiting)


def turns_pass(client: RawClient) -> None:
    """Return once the daemon has gone round its loop often enough to have seen what others sent before."""
    for _ in range(10):
        client.call("health")


def is_not_read_on(client: RawClient, other: RawClient) -> bool:
    """Return whether a request of `client` has no answer while `other` gets its own."""
    number = client.send("hello")
    turns_pass(other)
    try:
        client.reply(number, 0.3)
    except TimeoutError:
        return True
    return False


@requires_root
def test_a_flood_of_calls_to_the_store_stops_at_its_own_user(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, socket_mode="0666", store_calls_per_user=8)
    with closing(sqlite3.connect(daemon.state_dir / "whisperd.sqlite3")) as person:
        person.isolation_level = None
        with client_as(daemon, 20_001) as flood, client_as(daemon, 20_002) as other:
            person.execute("BEGIN IMMEDIATE")  # the store stands still
            ids = [flood.send("cancel", job=number) for number in range(1, 21)]
            behind = flood.send("hello")
            assert other.call("health")["queue"]["depth"] == 0
            with pytest.raises(TimeoutError):
                flood.receive(0.3)
            person.execute("ROLLBACK")
            assert {flood.reply(number)["error"]["code"] for number in ids} == {"not_found"}
            assert flood.reply(behind)["ok"]

            person.execute("BEGIN IMMEDIATE")
            for number in range(1, 21):
                flood.send("cancel", job=number)
            turns_pass(other)
            flood.close()
            turns_pass(other)
            with client_as(daemon, 20_001) as back:
                assert is_not_read_on(back, other), "a new connection brings no new bounds"
                person.execute("ROLLBACK")
                assert back.call("hello")

            with daemon.client() as administrator:  # of whom nothing is looked up: these wait with their jobs
                person.execute("BEGIN IMMEDIATE")
                for _ in range(8):
                    with recording().open("rb") as file:
                        source = {"kind": "fd", "name": file.name}
                        administrator.send("submit", descriptors=[file.fileno()], source=source)
                wait_until(lambda: is_not_read_on(administrator, other), message="all are copied and wait")
                person.execute("ROLLBACK")
                assert administrator.call("hello")
            assert submit(other, recording())["state"] == "queued"
