"""A submit sent again under its key while the first is still on its way: never refused for what the first one takes.

Each daemon has two places, of which one is for interactive jobs only: no second background job finds room.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import NO_MODEL, PLAIN_OPTIONS, Daemon, RawClient, error_of, requires_root, submit, wait_until
from tests.test_admission import client_as
from tests.test_hostile_clients import held_copier
from tests.test_upload import begin, chunk, taken
from whisperd.daemon.underway import UnderWay
from whisperd.protocol.frames import encode_frame

KEY = "sent twice"


def test_who_waits_looks_again_at_each_end_and_not_once_it_is_over() -> None:
    under_way = UnderWay()
    looks: list[str] = []

    def wait(name: str, key: str | None = KEY, uid: int = 1) -> Callable[[], None] | None:
        look_again = partial(looks.append, name)
        return look_again if under_way.maybe_wait(uid, key, look_again) else None

    assert wait("nothing is under way") is None
    for key in (KEY, KEY, None):
        under_way.began(1, key)
    assert wait("another's", uid=2) is wait("another key", "k") is wait("no key", None) is None
    assert wait("first")
    gone = wait("gone")
    assert gone
    assert wait("last")
    under_way.stop_waiting(1, KEY, gone)
    under_way.ended(1, KEY)
    assert looks == ["first", "last"]
    assert wait("again")
    under_way.ended(1, None)
    under_way.ended(1, KEY)
    assert looks == ["first", "last", "again"]
    assert wait("all have ended") is None


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon]) -> Daemon:
    # A copier that stands still is not replaced when its copy is given up.
    return start_daemon(model=NO_MODEL, capacity=2, copiers=1, cancel_grace_s=60, socket_mode="0666")


def send(client: RawClient, path: Path, **params: Any) -> int:
    """Send a submit and return its id."""
    with path.open("rb") as file:
        source = {"kind": "fd", "name": path.name}
        params = {"source": source, "options": PLAIN_OPTIONS, "key": KEY} | params
        return client.send("submit", descriptors=[file.fileno()], **params)


def sent_twice(client: RawClient, path: Path, **params: Any) -> list[int]:
    """Send a submit twice; return the ids once the daemon has looked at both."""
    numbers = [send(client, path, **params) for _ in range(2)]
    client.call("jobs")  # asks the store, after it was asked for the keys
    return numbers


def first_is_copied(client: RawClient, path: Path, **params: Any) -> int:
    number = send(client, path, **params)
    wait_until(lambda: client.call("stats")["lanes"]["copy"]["active"] == 1)
    return number


def test_a_file_is_one_job_and_takes_one_place(daemon: Daemon, recording: Callable[..., Path]) -> None:
    with daemon.client() as client:
        copier = held_copier(daemon)
        numbers = sent_twice(client, recording())
        assert client.call("health")["queue"]["depth"] == 1
        assert error_of(lambda: submit(client, recording(), key="another")) == "queue_full"
        copier.resume()
        first, second = (taken(client, number) for number in numbers)
        assert first["job"]["id"] == second["job"]["id"]
        assert (first["reused"], second["reused"]) == (False, True)
        assert len(client.call("jobs")["jobs"]) == client.call("health")["queue"]["depth"] == 1


@requires_root
def test_a_user_with_one_place_may_send_twice(daemon: Daemon, recording: Callable[..., Path]) -> None:
    with client_as(daemon, 20_001) as client:
        copier = held_copier(daemon)
        numbers = sent_twice(client, recording())
        copier.resume()
        first, second = (taken(client, number)["job"]["id"] for number in numbers)
        assert first == second


def test_another_file_under_the_key_is_a_conflict(daemon: Daemon, recording: Callable[..., Path]) -> None:
    with daemon.client() as client:
        copier = held_copier(daemon)
        first = first_is_copied(client, recording())
        others = [send(client, recording(2)), send(client, recording(3))]  # of equal size, and of another
        client.call("jobs")
        copier.resume()
        assert taken(client, first)["job"]["state"] == "queued"
        assert [error_of(lambda other=other: taken(client, other)) for other in others] == ["key_conflict"] * 2


def test_who_has_another_file_under_the_key_does_not_keep_its_job(
    daemon: Daemon, recording: Callable[..., Path]
) -> None:
    path, other = recording(), recording()
    with daemon.client() as client, daemon.client() as stranger:
        with daemon.client() as holder:
            job = submit(holder, path, key=KEY, attached=True)
            assert error_of(lambda: submit(stranger, other, key=KEY, attached=True)) == "key_conflict"
            assert client.call("result", job=job["id"])["job"]["state"] == "queued"
        assert client.result(job["id"], timeout_s=30)["job"]["state"] == "cancelled"


def test_who_has_the_file_keeps_its_job_whatever_else_he_sent_under_the_key(
    daemon: Daemon, recording: Callable[..., Path]
) -> None:
    path, other = recording(), recording()
    with daemon.client() as client, daemon.client() as again:
        with daemon.client() as holder:
            job = submit(holder, path, key=KEY, attached=True)
            copier = held_copier(daemon)
            wrong, right = (send(again, file, attached=True) for file in (other, path))
            again.call("jobs")  # asks the store, after it was asked for the keys
        wait_until(lambda: client.call("stats")["connections"] == 2)
        copier.resume()
        assert error_of(lambda: taken(again, wrong)) == "key_conflict"
        assert taken(again, right)["job"]["id"] == job["id"]
        assert client.call("result", job=job["id"])["job"]["state"] == "queued"


def test_where_the_first_comes_to_nothing_the_second_has_its_place(
    daemon: Daemon, recording: Callable[..., Path]
) -> None:
    with daemon.client() as client:
        copier = held_copier(daemon)
        with daemon.client() as leaver:
            first_is_copied(leaver, recording(), attached=True)
            second = send(client, recording())
            client.call("jobs")
        wait_until(lambda: client.call("stats")["connections"] == 1)
        copier.resume()
        assert taken(client, second)["reused"] is False
        assert client.call("stats")["lanes"]["copy"] == {"active": 0, "waiting": 0, "failed": 0}


def test_a_stop_answers_both(daemon: Daemon, recording: Callable[..., Path]) -> None:
    with daemon.client() as client:
        copier = held_copier(daemon)
        numbers = sent_twice(client, recording())
        daemon.signal(signal.SIGTERM)
        assert [error_of(lambda number=number: taken(client, number)) for number in numbers] == ["stopping"] * 2
        copier.resume()
        assert daemon.stop() == 0


def test_an_upload_waits_for_the_copy_of_its_key(daemon: Daemon, recording: Callable[..., Path]) -> None:
    path = recording()
    size_bytes = path.stat().st_size
    with daemon.client() as client, daemon.client() as uploader:
        copier = held_copier(daemon)
        first = first_is_copied(client, path)
        number = begin(uploader, size_bytes, key=KEY)
        on_its_way = uploader.send("chunk", upload=number, data=b"RIFF", last=False)
        with pytest.raises(TimeoutError):
            uploader.receive(0.2)
        copier.resume()
        job = taken(client, first)["job"]
        known = taken(uploader, number)
        assert (known["job"]["id"], known["reused"]) == (job["id"], True)
        assert error_of(lambda: taken(uploader, on_its_way)) == "bad_request", "no byte is needed"


def test_an_upload_that_is_sent_again_goes_on_when_the_first_connection_is_gone(
    daemon: Daemon, recording: Callable[..., Path]
) -> None:
    data = recording(0.5).read_bytes()
    with daemon.client() as uploader, daemon.client() as broken:
        chunk(broken, begin(broken, len(data), key=KEY), data[:100])
        number = begin(uploader, len(data), key=KEY)
        all_of_it = uploader.send("chunk", upload=number, data=data, last=True)
        with pytest.raises(TimeoutError):
            uploader.receive(0.2)
        broken.close()
        assert uploader.reply(all_of_it)["result"]["received"] == len(data)
        assert taken(uploader, number)["reused"] is False


def test_an_address_that_is_sent_twice_at_once_is_one_job(daemon: Daemon) -> None:
    with daemon.client() as client:
        client.call("pause")
        params = {"source": {"kind": "video", "id": "dQw4w9WgXcQ"}, "key": KEY}
        # In one write: the second is looked at before the first is committed.
        client.send_bytes(b"".join(encode_frame({"id": n, "op": "submit", "params": params}) for n in (1001, 1002)))
        first, second = (taken(client, number)["job"]["id"] for number in (1001, 1002))
        assert first == second
        assert client.call("health")["queue"]["depth"] == 1
