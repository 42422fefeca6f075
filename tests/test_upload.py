"""Uploads by chunk: the bytes of clients that cannot pass a descriptor, by hand and against whole daemons."""

from __future__ import annotations

import hashlib
import os
import resource
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helper_process import HelperProcess
from tests.support import (
    NO_MODEL,
    PLAIN_OPTIONS,
    Daemon,
    RawClient,
    error_of,
    requires_root,
    running_daemon,
    submit,
    wait_until,
)
from tests.test_admission import client_as
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.frames import encode_frame
from whisperd.protocol.helper_messages import Cancel, Copied, Failed, Progress, UploadBegin, UploadData
from whisperd.protocol.messages import MAX_CHUNK_BYTES, MAX_UNANSWERED_CHUNKS

KIB = 1024


def begin(client: RawClient, size_bytes: int | None, *, name: str = "talk.wav", **params: Any) -> int:
    """Open an upload and return its id."""
    source = {"kind": "upload", "name": name, "size_bytes": size_bytes}
    return client.send("submit", **{"source": source, "options": PLAIN_OPTIONS} | params)


def pieces(data: bytes, size_bytes: int = MAX_CHUNK_BYTES) -> list[bytes]:
    return [data[start : start + size_bytes] for start in range(0, len(data), size_bytes)] or [b""]


def chunk(client: RawClient, upload: int, data: bytes, *, last: bool = False) -> dict[str, Any]:
    return client.call("chunk", upload=upload, data=data, last=last)


def upload(client: RawClient, data: bytes, *, sized: bool = True, **params: Any) -> dict[str, Any]:
    """Upload all of `data`, each chunk answered before the next; return the result of the submit."""
    number = begin(client, len(data) if sized else None, **params)
    parts = pieces(data)
    for place, part in enumerate(parts, 1):
        chunk(client, number, part, last=place == len(parts))
    return taken(client, number)


def taken(client: RawClient, number: int) -> dict[str, Any]:
    """Return the result of a submit that is under way. Raises `WhisperdError`."""
    reply = client.reply(number)
    if not reply["ok"]:
        raise WhisperdError(reply["error"]["code"], reply["error"]["message"])
    result: dict[str, Any] = reply["result"]
    return result


def spooled(daemon: Daemon) -> list[Path]:
    return list((daemon.state_dir / "spool").iterdir())


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """One daemon without a model, for the tests that leave it as they found it, but for jobs that wait for a model."""
    with running_daemon(model=NO_MODEL, decode_ahead=1000) as daemon:
        yield daemon


@pytest.fixture
def client(shared: Daemon) -> Iterator[RawClient]:
    with shared.client() as client:
        yield client


# --- the receiver ---


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


@pytest.fixture
def receiver(spool: Path) -> Iterator[HelperProcess]:
    with HelperProcess("whisperd.audio.receiver", {"spool": str(spool), "min_free_bytes": 0}) as helper:
        yield helper


def feed(receiver: HelperProcess, data: bytes, *, last: bool, run: int = 1) -> None:
    receiver.send(UploadData(run=run, generation=1, data=data, last=last))


def test_what_comes_in_pieces_is_whole_hashed_and_each_piece_answered(receiver: HelperProcess, spool: Path) -> None:
    content = os.urandom(200 * KIB)
    receiver.send(UploadBegin(run=1, generation=1, folder="run"))
    parts = pieces(content)
    for place, part in enumerate(parts, 1):
        feed(receiver, part, last=place == len(parts))
        assert receiver.answer(Progress).done == sum(map(len, parts[:place]))
    digest = hashlib.sha256(content).hexdigest()
    assert receiver.answer(Copied, Failed) == Copied(run=1, generation=1, sha256=digest, size_bytes=len(content))
    assert [entry.name for entry in spool.iterdir()] == ["run"]
    assert (spool / "run" / "source").read_bytes() == content


def test_a_cancelled_upload_leaves_nothing_and_its_late_pieces_go_nowhere(receiver: HelperProcess, spool: Path) -> None:
    receiver.send(UploadBegin(run=1, generation=1, folder="run"))
    feed(receiver, b"half", last=False)
    receiver.send(Cancel(run=1, generation=1))
    assert receiver.answer(Copied, Failed).code == "cancelled"  # type: ignore[union-attr]
    assert list(spool.iterdir()) == []
    feed(receiver, b"late", last=True)
    receiver.send(UploadBegin(run=2, generation=1, folder="next"))
    feed(receiver, b"late again", last=True)
    feed(receiver, b"whole", last=True, run=2)
    assert receiver.answer(Copied, Failed).run == 2
    assert (spool / "next" / "source").read_bytes() == b"whole"


def test_a_disk_that_fills_in_the_middle_leaves_nothing(receiver: HelperProcess, spool: Path) -> None:
    _, hard = resource.prlimit(receiver.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(receiver.process.pid, resource.RLIMIT_FSIZE, (100 * KIB, hard))
    receiver.send(UploadBegin(run=1, generation=1, folder="run"))
    for _ in range(4):
        feed(receiver, bytes(50 * KIB), last=False)
    answer = receiver.answer(Copied, Failed)
    assert isinstance(answer, Failed)
    assert answer.code == "storage_full"
    assert list(spool.iterdir()) == []


# --- one upload ---


@pytest.mark.parametrize("sized", [True, False])
def test_an_upload_is_a_job_like_any_other(
    client: RawClient, shared: Daemon, recording: Callable[..., Path], sized: bool
) -> None:
    data = recording(10).read_bytes()
    failed = client.call("stats")["lanes"]["upload"]["failed"]  # in the tests before
    answer = upload(client, data, sized=sized, name="talk.wav")
    job = answer["job"]
    assert (job["state"], job["uid"], answer["reused"]) == ("queued", os.geteuid(), False)
    assert job["source"] == {"kind": "upload", "name": "talk.wav", "size_bytes": len(data) if sized else None}
    wait_until(lambda: client.call("result", job=job["id"])["job"]["audio_s"] == pytest.approx(10, abs=0.01))
    assert client.call("stats")["lanes"]["upload"] == {"active": 0, "waiting": 0, "failed": failed}


def test_the_same_bytes_are_the_same_work_however_they_came(client: RawClient, recording: Callable[..., Path]) -> None:
    path = recording(1)
    by_descriptor = submit(client, path, key="either way")
    again = upload(client, path.read_bytes())
    assert again["reused"]
    assert again["job"]["id"] != by_descriptor["id"]
    # The key is known: the answer comes at once, without a byte, with and without the size.
    for size_bytes in (path.stat().st_size, None):
        known = taken(client, begin(client, size_bytes, key="either way"))
        assert (known["job"]["id"], known["reused"]) == (by_descriptor["id"], True)
    # In one write: the chunk is there before the key has been looked up.
    source = {"kind": "upload", "name": "talk.wav", "size_bytes": None}
    asked = {"id": 1001, "op": "submit", "params": {"source": source, "options": PLAIN_OPTIONS, "key": "either way"}}
    chunk_of_it = {"id": 1002, "op": "chunk", "params": {"upload": 1001, "data": b"on its way"}}
    client.send_bytes(encode_frame(asked) + encode_frame(chunk_of_it))
    assert taken(client, 1001)["job"]["id"] == by_descriptor["id"]
    with pytest.raises(WhisperdError, match=f"no bytes are wanted.* job {by_descriptor['id']}$") as caught:
        taken(client, 1002)
    assert caught.value.code == "bad_request"
    by_upload = upload(client, recording(1).read_bytes(), key="the other way")
    client.call("cancel", job=by_descriptor["id"])
    assert by_upload["job"]["id"] != by_descriptor["id"]
    other = recording(1)
    key = {"key": "other"}
    first = upload(client, other.read_bytes(), **key)
    assert submit(client, other, **key)["id"] == first["job"]["id"]


def test_a_key_of_another_recording_is_a_conflict(client: RawClient, recording: Callable[..., Path]) -> None:
    path = recording(1)
    submit(client, path, key="taken")
    size_bytes = path.stat().st_size
    assert error_of(lambda: taken(client, begin(client, size_bytes + 1, key="taken"))) == "key_conflict"
    options = PLAIN_OPTIONS | {"task": "translate"}
    assert error_of(lambda: taken(client, begin(client, size_bytes, key="taken", options=options))) == "key_conflict"
    assert error_of(lambda: taken(client, begin(client, None, key="taken", options=options))) == "key_conflict"
    # The same size with other bytes: of an upload nobody asks for them, a descriptor's are compared.
    assert error_of(lambda: submit(client, recording(1), key="taken")) == "key_conflict"


def test_sixteen_chunks_may_be_on_their_way_and_more_are_not_read(
    client: RawClient, shared: Daemon, recording: Callable[..., Path]
) -> None:
    data = recording(120).read_bytes()
    parts = pieces(data)
    assert len(parts) > 3 * MAX_UNANSWERED_CHUNKS
    number = begin(client, len(data))
    chunk(client, number, parts[0])
    receivers = shared.helpers("whisperd.audio.receiver")
    for receiver in receivers:
        receiver.suspend()
    ids = [client.send("chunk", upload=number, data=part) for part in parts[1 : MAX_UNANSWERED_CHUNKS + 1]]
    client.send("health")  # behind sixteen: not read
    with shared.client() as other:
        other.call("health")
        assert other.call("stats")["lanes"]["upload"]["active"] == 1
    with pytest.raises(TimeoutError):
        client.receive(0.2)
    for receiver in receivers:
        receiver.resume()
    for place, waiting in enumerate(ids, 2):
        assert client.reply(waiting)["result"]["received"] == sum(map(len, parts[:place]))
    rest = parts[MAX_UNANSWERED_CHUNKS + 1 :]
    for place, part in enumerate(rest, 1):
        chunk(client, number, part, last=place == len(rest))
    assert taken(client, number)["job"]["state"] == "queued"


# --- what is refused ---


def refused(client: RawClient, number: int, *chunks: tuple[bytes, bool]) -> tuple[str, str]:
    """Send chunks, of which the last ends the upload; return its code and the submit's."""
    *before, (data, last) = chunks
    for part, _ in before:
        chunk(client, number, part)
    code = error_of(lambda: chunk(client, number, data, last=last))
    return code, error_of(lambda: taken(client, number))


def test_sizes_that_do_not_agree_are_refused_and_leave_nothing(client: RawClient, shared: Daemon) -> None:
    before = spooled(shared)
    assert refused(client, begin(client, 5), (b"123", False), (b"456", False)) == ("bad_request", "bad_request")
    assert refused(client, begin(client, 5), (b"123", False), (b"4", True)) == ("bad_request", "bad_request")
    assert refused(client, begin(client, 0), (b"1", True)) == ("bad_request", "bad_request")
    wait_until(lambda: spooled(shared) == before)


def test_chunks_that_are_out_of_place_are_refused_alone(client: RawClient, recording: Callable[..., Path]) -> None:
    assert error_of(lambda: chunk(client, 99, b"x")) == "bad_request"
    data = recording(1).read_bytes()
    number = begin(client, len(data))
    assert error_of(lambda: chunk(client, number + 1, b"x")) == "bad_request"
    assert error_of(lambda: chunk(client, number, b"")) == "bad_request"
    assert error_of(lambda: taken(client, begin(client, 5))) == "bad_request", "one upload a connection"
    chunk(client, number, data, last=True)
    assert taken(client, number)["job"]["state"] == "queued"
    assert error_of(lambda: chunk(client, number, b"more")) == "bad_request"


def test_a_second_upload_of_a_connection_is_refused_and_the_first_goes_on(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model=NO_MODEL, upload_timeout_s=2)
    with daemon.client() as client, daemon.client() as silent:
        number = begin(client, None)
        chunk(client, number, b"first")
        (receiver,) = daemon.helpers("whisperd.audio.receiver")
        receiver.suspend()
        waiting = [client.send("chunk", upload=number, data=data, last=not data) for data in (b"second", b"")]
        assert error_of(lambda: taken(client, begin(client, None))) == "bad_request"
        # When an upload that was begun later has timed out, whatever is left of the refused one has done so too.
        assert error_of(lambda: taken(silent, begin(silent, None))) == "timed_out"
        receiver.resume()
        assert [client.reply(one)["result"]["received"] for one in waiting] == [11, 11]
        assert taken(client, number)["job"]["state"] == "queued"


def test_an_upload_of_nothing_fails_as_an_empty_file_does(client: RawClient) -> None:
    number = begin(client, None)
    assert chunk(client, number, b"", last=True) == {"received": 0}
    job = taken(client, number)["job"]
    assert client.result(job["id"])["job"]["error"]["code"] == "bad_audio"


def test_what_is_too_large_is_refused_at_once_or_when_it_is_seen(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model=NO_MODEL, max_source_bytes=100 * KIB)
    with daemon.client() as client:
        assert error_of(lambda: taken(client, begin(client, 101 * KIB))) == "too_large"
        part = bytes(50 * KIB)
        assert refused(client, begin(client, None), (part, False), (part, False), (b"x", False)) == (
            "too_large",
            "too_large",
        )
        wait_until(lambda: not spooled(daemon))


@requires_root
def test_bytes_that_were_not_announced_are_counted_as_they_come(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model=NO_MODEL, socket_mode="0666", spool_bytes_per_user=100 * KIB)
    part = bytes(50 * KIB)
    with client_as(daemon, 20_001) as client:
        assert error_of(lambda: taken(client, begin(client, 101 * KIB))) == "quota_exceeded"
        assert refused(client, begin(client, None), (part, False), (part, False), (b"x", False)) == (
            "quota_exceeded",
            "quota_exceeded",
        )
        wait_until(lambda: not spooled(daemon))


def test_a_client_that_falls_silent_or_leaves_leaves_nothing(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model=NO_MODEL, upload_timeout_s=0.3)
    with daemon.client() as client:
        number = begin(client, 100)
        chunk(client, number, b"the beginning")
        assert error_of(lambda: taken(client, number)) == "timed_out"
        assert error_of(lambda: chunk(client, number, b"too late")) == "bad_request"
        assert error_of(lambda: taken(client, begin(client, 100))) == "timed_out", "not even a first chunk"
    with daemon.client() as leaver:
        chunk(leaver, begin(leaver, 100, key="never"), b"the beginning")
    with daemon.client() as client:
        wait_until(lambda: client.call("health")["queue"]["depth"] == 0)
        wait_until(lambda: not spooled(daemon))
        assert client.call("jobs")["jobs"] == []


def test_an_upload_has_its_time_whatever_it_sends(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model=NO_MODEL, copy_limit_s=1)
    with daemon.client() as client:
        number = begin(client, None)
        # Not waited for: on a busy machine the receiver may need that second to start.
        client.send("chunk", upload=number, data=b"a byte now and then", last=False)
        assert error_of(lambda: taken(client, number)) == "timed_out"
        wait_until(lambda: not spooled(daemon))


def test_a_receiver_that_dies_is_told_and_the_next_upload_works(
    client: RawClient, shared: Daemon, recording: Callable[..., Path]
) -> None:
    data = recording(5).read_bytes()
    number = begin(client, len(data))
    chunk(client, number, data[:1000])
    for receiver in shared.helpers("whisperd.audio.receiver"):
        receiver.kill()
    assert error_of(lambda: taken(client, number)) == "worker_crashed"
    assert upload(client, data)["job"]["state"] == "queued"


def test_uploads_beyond_the_receivers_wait_their_turn(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, receivers=1)
    first, second = recording(5).read_bytes(), recording(5).read_bytes()
    with daemon.client() as one, daemon.client() as two:
        number = begin(one, len(first))
        chunk(one, number, first[:1000])
        waiting = begin(two, len(second))
        held = [two.send("chunk", upload=waiting, data=part) for part in (second[:1000], second[1000:2000])]
        wait_until(lambda: one.call("stats")["lanes"]["upload"] == {"active": 1, "waiting": 1, "failed": 0})
        assert one.call("health")["queue"]["depth"] == 2, "an upload is a job to be"
        with pytest.raises(TimeoutError):
            two.receive(0.2)
        for part in pieces(first[1000:])[:-1]:
            chunk(one, number, part)
        chunk(one, number, pieces(first[1000:])[-1], last=True)
        assert taken(one, number)["job"]["state"] == "queued"
        assert [two.reply(number)["result"]["received"] for number in held] == [1000, 2000]
        for part in pieces(second[2000:]):
            chunk(two, waiting, part)
        chunk(two, waiting, b"", last=True)
        assert taken(two, waiting)["job"]["state"] == "queued"


def test_an_upload_that_trickles_keeps_its_receiver_only_while_nobody_waits(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, receivers=1, upload_timeout_s=1, upload_bytes_per_s=1000)
    data = recording(1).read_bytes()
    with daemon.client() as slow, daemon.client() as other:
        number = begin(slow, None)

        def trickle() -> str | None:
            """Send a byte; return why it was not taken."""
            answer = slow.reply(slow.send("chunk", upload=number, data=b"x", last=False))
            return None if answer["ok"] else answer["error"]["message"]

        until = time.monotonic() + 2.5
        wait_until(lambda: trickle() or time.monotonic() > until)
        assert trickle() is None, "a slow line is no fault"
        waiting, (first, *rest) = begin(other, len(data)), pieces(data)
        held = other.send("chunk", upload=waiting, data=first, last=False)  # else it is silent
        wait_until(trickle)
        with pytest.raises(WhisperdError, match="upload_bytes_per_s") as caught:
            taken(slow, number)
        assert caught.value.code == "timed_out"
        assert other.reply(held)["ok"]
        for part in rest:
            chunk(other, waiting, part)
        chunk(other, waiting, b"", last=True)
        assert taken(other, waiting)["job"]["state"] == "queued"


def test_all_bytes_there_and_a_key_outlive_their_client(
    client: RawClient, shared: Daemon, recording: Callable[..., Path]
) -> None:
    data = recording(1).read_bytes()
    with shared.client() as leaver:
        number = begin(leaver, len(data), key="came whole", name="came whole")
        leaver.send("chunk", upload=number, data=data, last=True)
    named = lambda: [job for job in client.call("jobs")["jobs"] if job["source"]["name"] == "came whole"]  # noqa: E731
    (job,) = wait_until(named)
    known = taken(client, begin(client, len(data), key="came whole"))
    assert (known["job"]["id"], known["job"]["source"]["kind"]) == (job["id"], "upload")


def test_an_upload_that_came_whole_before_its_look_up_and_whose_client_left_is_no_job(
    client: RawClient, shared: Daemon
) -> None:
    daemon = psutil.Process(shared.pid)
    with closing(sqlite3.connect(shared.state_dir / "whisperd.sqlite3")) as person:
        person.isolation_level = None
        person.execute("BEGIN IMMEDIATE")  # the store stands still
        descriptors = daemon.num_fds()
        with shared.client() as leaver:
            number = begin(leaver, 100, name="nobody's")
            leaver.send("chunk", upload=number, data=bytes(100), last=True)
            leaver.call("hello")
        wait_until(lambda: daemon.num_fds() == descriptors, message="its connection is closed")
        person.execute("ROLLBACK")
    idle = {"active": 0, "waiting": 0}
    wait_until(lambda: client.call("stats")["lanes"]["upload"].items() >= idle.items())
    assert "nobody's" not in {job["source"]["name"] for job in client.call("jobs")["jobs"]}


def test_an_attached_upload_ends_with_its_connection(
    client: RawClient, shared: Daemon, recording: Callable[..., Path]
) -> None:
    with shared.client() as holder:
        job = upload(holder, recording(1).read_bytes(), attached=True, key="held")["job"]
        assert client.call("result", job=job["id"])["job"]["state"] == "queued"
    assert client.result(job["id"])["job"]["state"] == "cancelled"


def test_a_stop_refuses_what_has_not_come_whole(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(model=NO_MODEL)
    with daemon.client() as client:
        number = begin(client, 100)
        chunk(client, number, b"the beginning")
        assert daemon.stop() == 0
        assert error_of(lambda: taken(client, number)) == "stopping"
    assert not spooled(daemon)
