"""Whole daemons, real helpers, the micro model: a job from hand to transcript, and all that may happen to it."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support import (
    NO_MODEL,
    PLAIN_OPTIONS,
    Daemon,
    RawClient,
    client_as,
    error_of,
    has_ended,
    requires_root,
    running_daemon,
    stop_process,
    submit,
    wait_until,
)
from tests.test_upload import begin, chunk, taken
from whisperd.daemon.keys import digest, fingerprints
from whisperd.daemon.store.rows import unpack
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.options import parse_options

MINUTE_S = 60


@pytest.fixture(scope="module")
def shared(micro: Path) -> Iterator[Daemon]:
    """One daemon for the tests that leave it as they found it."""
    with running_daemon(model=str(micro), open_runs=4, ready=True) as daemon:
        yield daemon


@pytest.fixture
def client(shared: Daemon) -> Iterator[RawClient]:
    with shared.client() as client:
        yield client


def events_until_end(client: RawClient, number: int) -> list[dict[str, Any]]:
    events = []
    while not events or events[-1]["event"] != "end":
        events.append(client.receive_until(lambda message: message["id"] == number and "event" in message, 60))
    return events


# --- one job ---


def test_a_recording_becomes_a_transcript(client: RawClient, recording: Callable[..., Path]) -> None:
    job = submit(client, recording(2), priority="interactive")
    assert (job["state"], job["priority"], job["uid"]) == ("queued", "interactive", os.geteuid())
    answer = client.result(job["id"])
    done, transcript = answer["job"], answer["transcript"]
    assert done["state"] == "done"
    assert done["progress"] == 1
    assert done["error"] is None
    assert done["submitted_at"] <= done["started_at"] <= done["ended_at"]
    assert transcript["text"] == "".join(segment["text"] for segment in transcript["segments"])
    assert transcript["duration_s"] == pytest.approx(2, abs=0.01)
    assert transcript["language"] == "en"
    assert {"id", "start", "end", "text", "tokens", "temperature", "avg_logprob"} <= set(transcript["segments"][0])
    timing = transcript["timing"]
    assert timing["model_s"] > 0
    assert timing["windows"] == 1
    assert timing["tokens"] >= sum(len(segment["tokens"]) for segment in transcript["segments"]) > 10
    model = wait_until(lambda: (now := client.call("stats")["model"])["windows"] and now, message="its next heartbeat")
    assert model["tokens"] > timing["tokens"], "the end of a text is a token too"
    assert model["windows"] <= model["steps"] < model["tokens"]
    assert model["windows_per_s"] == pytest.approx(model["windows"] / model["busy_s"])
    assert model["tokens_per_s"] == pytest.approx(model["tokens"] / model["busy_s"])
    assert 0 < model["batch_occupancy"] <= 1 <= model["batch_windows"]


def test_events_are_numbered_without_a_gap_and_tell_the_transcript(
    client: RawClient, recording: Callable[..., Path]
) -> None:
    job = submit(client, recording(70))
    number = client.send("subscribe", job=job["id"])
    assert client.reply(number)["result"]["job"]["id"] == job["id"]
    events = events_until_end(client, number)
    numbered = [event for event in events if "seq" in event]
    assert [event["seq"] for event in numbered] == list(range(1, len(numbered) + 1))
    assert [event["state"] for event in numbered if event["event"] != "segment"] == ["queued", "running", "done"]
    transcript = client.result(job["id"])["transcript"]
    assert [event["segment"] for event in numbered if event["event"] == "segment"] == transcript["segments"]
    middle = len(numbered) // 2
    again = client.send("subscribe", job=job["id"], after_seq=middle)
    assert client.reply(again)["ok"]
    assert events_until_end(client, again) == [{**event, "id": again} for event in numbered[middle:]]


def test_events_that_a_follower_says_he_knows_are_not_pushed_when_they_come(
    shared: Daemon, client: RawClient, recording: Callable[..., Path]
) -> None:
    with shared.client() as ahead:
        client.call("pause")
        job = submit(client, recording(70))
        number = ahead.send("subscribe", job=job["id"], after_seq=3)
        reply = ahead.reply(number)
        client.call("resume")
        assert reply["result"]["last_seq"] == 1
        seqs = [event["seq"] for event in events_until_end(ahead, number) if "seq" in event]
        assert seqs == list(range(4, seqs[-1] + 1))
        assert seqs[-1] > 4
        # The end is told even so: by it a follower knows that nothing more comes.
        client.call("pause")
        for _ in range(20):  # it may come while the past is still being read
            waiting = submit(client, recording(1))
            number = ahead.send("subscribe", job=waiting["id"], after_seq=1000)
            assert ahead.reply(number)["ok"]
            client.call("cancel", job=waiting["id"])
            assert [event["event"] for event in events_until_end(ahead, number) if "seq" in event] == ["end"]
        client.call("resume")


def test_a_users_subscription_tells_of_all_his_jobs(client: RawClient, recording: Callable[..., Path]) -> None:
    number = client.send("subscribe")
    assert client.reply(number)["ok"]
    job = submit(client, recording(2))
    states = []
    while not states or states[-1] != "done":
        event = client.receive_until(lambda message: message["id"] == number and "event" in message)
        assert event["job"] == job["id"]
        states.append(event["state"])
    assert states == ["queued", "running", "done"]


def test_result_waits_as_long_as_it_is_told(client: RawClient, shared: Daemon, recording: Callable[..., Path]) -> None:
    job = submit(client, recording(5 * MINUTE_S))
    assert client.call("result", job=job["id"])["transcript"] is None
    waited = client.call("result", job=job["id"], wait_s=0.05)
    assert waited["transcript"] is None
    assert waited["job"]["state"] in ("queued", "running")
    # A request that waits holds up none that comes after it.
    waiting = client.send("result", job=job["id"], wait_s=None)
    assert client.call("health")["status"] == "ready"
    client.call("cancel", job=job["id"])
    assert client.reply(waiting)["result"]["job"]["state"] == "cancelled"


def test_forget_leaves_nothing(client: RawClient, shared: Daemon, recording: Callable[..., Path]) -> None:
    job = submit(client, recording(2), key="to forget")
    client.result(job["id"])
    assert client.call("forget", job=job["id"])["job"]["id"] == job["id"]
    assert error_of(lambda: client.call("result", job=job["id"])) == "not_found"
    assert job["id"] not in [row["id"] for row in client.call("jobs")["jobs"]]


def test_jobs_in_pages(client: RawClient, recording: Callable[..., Path]) -> None:
    path = recording(1)
    ids = [submit(client, path, fresh=n == 0)["id"] for n in range(3)]
    page = client.call("jobs", limit=2)
    assert [job["id"] for job in page["jobs"]] == ids[:0:-1]
    assert page["more"]
    assert client.call("jobs", limit=1, before=ids[1])["jobs"][0]["id"] == ids[0]
    client.result(ids[0])


# --- the same work once ---


def test_the_same_recording_is_transcribed_once(client: RawClient, recording: Callable[..., Path]) -> None:
    path = recording(40)
    before = client.call("stats")["cache_hits"]
    jobs = [submit(client, path) for _ in range(5)]
    texts = {client.result(job["id"])["transcript"]["text"] for job in jobs}
    assert len(texts) == 1
    with open(path, "rb") as file:
        later = client.call(
            "submit", descriptors=[file.fileno()], source={"kind": "fd", "name": "another name"}, options=PLAIN_OPTIONS
        )
    assert later["reused"]
    assert later["job"]["state"] == "done"
    assert client.call("stats")["cache_hits"] == before + 5, "six jobs, one run"
    fresh = submit(client, path, fresh=True)
    assert client.result(fresh["id"])["job"]["attempts"] == 1
    assert fresh["state"] == "queued"


def test_a_key_is_one_job_also_while_it_is_copied(shared: Daemon, recording: Callable[..., Path]) -> None:
    path, other = recording(3), recording(3)
    ids, errors = [], []

    def hand_over(source: Path) -> None:
        with shared.client() as mine:
            try:
                ids.append(submit(mine, source, key=f"key of {path}")["id"])
            except WhisperdError as error:
                errors.append(error.code)

    threads = [threading.Thread(target=hand_over, args=(path,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(ids) == 6
    assert len(set(ids)) == 1
    hand_over(other)
    assert errors == ["key_conflict"], "equal size, other bytes"
    with shared.client() as mine:
        assert error_of(lambda: mine.submit(path, key=f"key of {path}", options={"language": "de"})) == "key_conflict"


@pytest.mark.parametrize(
    ("options", "words"),
    [({"language": "yue"}, "'micro' does not know Cantonese"), ({"suppress_tokens": [51865]}, "beyond the vocabulary")],
)
def test_what_the_loaded_model_cannot_do_is_refused_at_the_submit(
    client: RawClient, recording: Callable[..., Path], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(WhisperdError, match=words) as caught:
        submit(client, recording(), options=options)
    assert caught.value.code == "bad_request"


# --- cancelling, holding, stopping ---


def test_cancel_stops_the_work(client: RawClient, shared: Daemon, recording: Callable[..., Path]) -> None:
    job = submit(client, recording(10 * MINUTE_S))
    wait_until(lambda: client.call("result", job=job["id"])["job"]["state"] == "running")
    (model,) = shared.helpers("whisperd.model.main")
    assert client.call("cancel", job=job["id"])["job"]["state"] == "cancelled"
    wait_until(lambda: client.call("stats")["lanes"]["model"]["active"] == 0, 5)
    assert shared.helpers("whisperd.model.main") == [model], "it obeyed, so it need not be replaced"
    assert client.call("cancel", job=job["id"])["job"]["state"] == "cancelled"


def test_a_helper_that_does_not_obey_a_cancel_is_replaced(
    start_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=str(micro), ready=True)
    with daemon.client() as client:
        job, bystander = submit(client, recording(10 * MINUTE_S)), submit(client, recording(MINUTE_S))
        wait_until(lambda: client.call("stats")["lanes"]["model"]["active"] == 2)
        (model,) = daemon.helpers("whisperd.model.main")
        stop_process(model.pid)
        client.call("cancel", job=job["id"])
        wait_until(lambda: has_ended(model), 10)
        done = client.result(bystander["id"])["job"]
        assert (done["state"], done["attempts"]) == ("done", 2)
        number = client.send("subscribe", job=bystander["id"])
        assert client.reply(number)["ok"]
        numbered = [event for event in events_until_end(client, number) if "seq" in event]
        assert [event["seq"] for event in numbered] == list(range(1, len(numbered) + 1))


def test_an_attached_job_ends_with_its_last_holder(
    client: RawClient, shared: Daemon, recording: Callable[..., Path]
) -> None:
    path = recording(10 * MINUTE_S)
    first, second = shared.client(), shared.client()
    job = submit(first, path, attached=True, key=f"held {path}")
    assert submit(second, path, attached=True, key=f"held {path}")["id"] == job["id"]
    free = submit(client, recording(2))
    first.close()
    assert client.result(free["id"])["job"]["state"] == "done"
    assert client.call("result", job=job["id"])["job"]["state"] in ("queued", "running")
    second.close()
    assert client.result(job["id"])["job"]["state"] == "cancelled"


def test_interactive_work_goes_before_background_work(
    client: RawClient, shared: Daemon, recording: Callable[..., Path]
) -> None:
    background = [submit(client, recording(5 * MINUTE_S)) for _ in range(5)]
    wait_until(lambda: client.call("stats")["lanes"]["model"]["active"] == 3)
    urgent = submit(client, recording(2), priority="interactive")
    assert client.result(urgent["id"])["job"]["state"] == "done"
    states = [client.call("result", job=job["id"])["job"]["state"] for job in background]
    assert "done" not in states
    waiting = [client.call("result", job=job["id"])["job"] for job in background[3:]]
    assert [job["position"] for job in waiting] == [1, 2]
    for job in background:
        client.call("cancel", job=job["id"])


def test_a_full_queue_keeps_places_for_interactive_jobs(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, capacity=4)
    with daemon.client() as client:
        for _ in range(3):
            submit(client, recording(1))
        assert error_of(lambda: submit(client, recording(1))) == "queue_full"
        submit(client, recording(1), priority="interactive")
        assert error_of(lambda: submit(client, recording(1), priority="interactive")) == "queue_full"
        assert client.call("health")["queue"] == {"depth": 4, "capacity": 4}


# --- restarts ---


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_restart_loses_nothing(
    make_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path], how: int
) -> None:
    daemon = make_daemon(model=str(micro))
    daemon.start(ready=True)
    with daemon.client() as client:
        done = submit(client, recording(2))
        text = client.result(done["id"])["transcript"]["text"]
        jobs = [submit(client, recording(20)) for _ in range(8)]
        wait_until(lambda: client.call("stats")["lanes"]["model"]["active"] > 0)
    assert daemon.kill() is None if how == signal.SIGKILL else daemon.stop() == 0
    daemon.start(ready=True)
    with daemon.client() as client:
        assert client.call("result", job=done["id"])["transcript"]["text"] == text
        for job in jobs:
            assert client.result(job["id"])["job"]["state"] == "done"
        assert [job["id"] for job in client.call("jobs")["jobs"]] == [job["id"] for job in [*reversed(jobs), done]]
        wait_until(lambda: not any((daemon.state_dir / "spool").iterdir()), 10, "the spool is empty")


def test_an_attached_job_waits_for_its_holder_after_a_restart(
    make_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon = make_daemon(model=str(micro), attach_grace_s=3, open_runs=1)
    path, other = recording(10 * MINUTE_S), recording(10 * MINUTE_S)
    daemon.start(ready=True)
    with daemon.client() as client:
        held = submit(client, path, attached=True, key="held")
        left = submit(client, other, attached=True, key="left")
        daemon.kill()
    daemon.start()
    with daemon.client() as client:
        assert submit(client, path, attached=True, key="held")["id"] == held["id"]
        assert client.result(left["id"])["job"]["state"] == "cancelled"
        assert client.call("result", job=held["id"])["job"]["state"] in ("queued", "running")


VIDEO = {"kind": "video", "id": "dQw4w9WgXcQ"}


@pytest.mark.parametrize("kept_by", ["this version", "an earlier version"])
def test_a_key_is_the_same_job_whatever_the_setting_mode_has_become(
    make_daemon: Callable[..., Daemon], recording: Callable[..., Path], kept_by: str
) -> None:
    """Sent again by descriptor, by upload and as an address. An attached job whose client stays is not cancelled."""
    daemon = make_daemon(model=NO_MODEL, mode="exact", attach_grace_s=2)
    path, other, copied = recording(), recording(), recording()
    daemon.start()
    with daemon.client() as client:
        held = submit(client, path, attached=True, key="held")
        left = submit(client, other, attached=True, key="left")
        plain = submit(client, copied, key="plain")
        video = client.call("submit", source=VIDEO, options=PLAIN_OPTIONS, key="video")["job"]
        daemon.kill()
    assert plain["options"]["mode"] == "exact"
    if kept_by == "an earlier version":
        keep_as_earlier_versions_did(daemon)
    daemon.settings["mode"] = "fast"
    daemon.start()
    with daemon.client() as client:
        again = submit(client, path, attached=True, key="held")
        assert (again["id"], again["options"]["mode"]) == (held["id"], "exact")
        known = taken(client, begin(client, copied.stat().st_size, key="plain"))
        assert (known["job"]["id"], known["reused"]) == (plain["id"], True)
        known = client.call("submit", source=VIDEO, options=PLAIN_OPTIONS, key="video")
        assert (known["job"]["id"], known["reused"]) == (video["id"], True)
        for options in ({**PLAIN_OPTIONS, "mode": "fast"}, {**PLAIN_OPTIONS, "language": "de"}):
            assert (
                error_of(lambda options=options: submit(client, copied, key="plain", options=options)) == "key_conflict"
            )
        new = submit(client, copied)
        assert (new["options"]["mode"], new["id"] != plain["id"]) == ("fast", True)
        assert client.result(left["id"])["job"]["state"] == "cancelled"
        assert client.call("result", job=held["id"])["job"]["state"] == "queued"


def keep_as_earlier_versions_did(daemon: Daemon) -> None:
    """Have the fingerprints of all keys be those of all options, with the mode as it was meant at that time."""
    with closing(sqlite3.connect(daemon.state_dir / "whisperd.sqlite3")) as db, db:
        rows = db.execute(
            """SELECT keys.key, fingerprint, jobs.source, jobs.options, size_bytes
               FROM keys JOIN jobs ON jobs.id = job_id JOIN runs ON runs.id = run_id"""
        ).fetchall()
        assert len(rows) == 4
        for key, fingerprint, source, options, size_bytes in rows:
            what = [unpack(source)] if key == "video" else ["fd", size_bytes]
            early = digest([*what, unpack(options)])
            db.execute("UPDATE keys SET fingerprint = ? WHERE key = ?", (early + fingerprint[len(early) :], key))


def test_options_that_are_as_by_default_are_not_part_of_a_keys_fingerprint() -> None:
    """So an option that comes with an upgrade changes none."""
    assert fingerprints(["fd", 3], parse_options({"task": "transcribe"}))[0] == digest(["fd", 3, {}])
    options = parse_options({"language": "german", "mode": "exact"})
    assert fingerprints(["fd", 3], options)[0] == digest(["fd", 3, {"language": "de", "mode": "exact"}])


@requires_root
def test_who_comes_back_with_many_files_loses_no_attached_job(
    make_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    # Two submits of a connection are read at a time, and compared by one process, which stands still.
    daemon = make_daemon(model=NO_MODEL, socket_mode="0666", attach_grace_s=3, copiers=1, open_requests=2)
    paths = [recording(1) for _ in range(6)]
    daemon.start()
    with (
        client_as(daemon, 20_001) as client,
        client_as(daemon, 20_002) as other,
        client_as(daemon, 20_003) as uploader,
    ):
        jobs = [submit(client, path, attached=True, key=path.name) for path in paths]
        left = submit(other, recording(1), attached=True, key="left")
        spared = submit(uploader, recording(1), attached=True, key="spared")
        daemon.kill()
    daemon.start()
    (copier,) = wait_until(lambda: daemon.helpers("whisperd.audio.copier"))
    stop_process(copier.pid)
    with (
        client_as(daemon, 20_001) as client,
        client_as(daemon, 20_002) as other,
        client_as(daemon, 20_003) as uploader,
    ):
        chunk(uploader, begin(uploader, 100), b"the first of his recordings takes long")
        numbers = []
        for path in paths:
            with path.open("rb") as file:
                source = {"kind": "fd", "name": path.name}
                params: dict[str, Any] = {"source": source, "options": PLAIN_OPTIONS, "key": path.name}
                numbers.append(client.send("submit", descriptors=[file.fileno()], attached=True, **params))
        assert other.result(left["id"])["job"]["state"] == "cancelled", "his holder did not come back in time"
        assert uploader.call("result", job=spared["id"])["job"]["state"] == "queued", "he still submits"
        os.kill(copier.pid, signal.SIGCONT)
        for number, job in zip(numbers, jobs, strict=True):
            again = client.reply(number)["result"]["job"]
            assert (again["id"], again["state"]) == (job["id"], "queued")


def test_stopping_refuses_new_work_and_tells_who_waits(
    make_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon = make_daemon(model=str(micro))
    daemon.start(ready=True)
    with daemon.client() as client:
        job = submit(client, recording(10 * MINUTE_S))
        number = client.send("subscribe", job=job["id"])
        assert client.reply(number)["ok"]
        client.receive_until(lambda message: message.get("state") == "running")
        assert daemon.stop() == 0
        event = client.receive_until(lambda message: message.get("event") == "state")
        assert event["state"] == "queued"
        with pytest.raises(EOFError):
            client.receive_until(lambda message: message.get("event") == "end", 5)


def test_a_run_whose_process_dies_three_times_is_given_up_and_the_queue_goes_on(
    start_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=str(micro), ready=True, helper_backoff_s=0.01)
    with daemon.client() as client:
        job = submit(client, recording(10 * MINUTE_S))
        for deaths in range(3):
            wait_until(
                lambda deaths=deaths: client.call("result", job=job["id"])["job"]["attempts"] == deaths + 1,
                60,
            )
            (model,) = daemon.helpers("whisperd.model.main")
            model.kill()
            wait_until(lambda deaths=deaths: client.call("stats")["model"]["crashes"] == deaths + 1, 10)
        assert client.result(job["id"])["job"]["error"]["code"] == "worker_crashed"
        assert client.result(submit(client, recording(2))["id"])["job"]["state"] == "done"


# --- one daemon ---


def test_a_second_daemon_on_the_same_state_or_socket_is_refused(
    shared: Daemon, make_daemon: Callable[..., Daemon]
) -> None:
    for state_dir, socket_path in ((shared.state_dir, None), (None, shared.socket)):
        second = make_daemon(model="demo")
        second.state_dir = state_dir or second.state_dir
        second.socket = socket_path or second.socket
        second.start(wait=False)
        assert second.process is not None
        assert second.process.wait(20) == 3
        second.process = None
    assert shared.answers()


def test_a_stale_socket_is_replaced(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(model=NO_MODEL)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(daemon.socket))
    daemon.start()
    assert daemon.stop() == 0
    assert not daemon.socket.exists()


def test_a_model_that_does_not_load_leaves_the_daemon_up_and_jobs_wait(
    start_daemon: Callable[..., Daemon], micro: Path, tmp_path: Path, recording: Callable[..., Path]
) -> None:
    place = tmp_path / "model.pt"
    daemon = start_daemon(model=str(place))
    with daemon.client() as client:
        wait_until(lambda: client.call("health")["status"] == "degraded")
        health = client.call("health")
        assert health["model"]["state"] == "failed"
        assert str(place) in health["problems"][0]
        assert "model load" in health["problems"][0]
        job = submit(client, recording(2))
        wait_until(lambda: "model" in client.call("result", job=job["id"])["job"]["phase"])
        place.write_bytes(micro.read_bytes())
        assert client.call("model", action="load")["model"]["state"] == "loading"
        assert client.result(job["id"])["job"]["state"] == "done"
        assert client.call("model", action="unload")["model"]["state"] == "unloaded"
        wait_until(lambda: not daemon.helpers("whisperd.model.main"), 10)
        assert client.call("health")["status"] == "paused"


# --- bad input, through a real socket ---


def submit_descriptors(client: RawClient, *descriptors: int) -> str:
    source = {"kind": "fd", "name": "x"}
    return error_of(lambda: client.call("submit", descriptors=descriptors, source=source))


def test_descriptors_that_are_no_files_to_read(client: RawClient, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    reader, writer = os.pipe()
    master, terminal = os.openpty()
    opened = [
        os.open(tmp_path, os.O_RDONLY),
        os.open(file, os.O_WRONLY),
        os.open(file, os.O_PATH),
        os.open("/dev/null", os.O_RDONLY),
    ]
    good = os.open(file, os.O_RDONLY)
    try:
        for fd in (reader, terminal, *opened):
            assert submit_descriptors(client, fd) == "bad_request"
        assert submit_descriptors(client, good, good) == "bad_request"
        assert submit_descriptors(client) == "no_descriptor"
    finally:
        for fd in (reader, writer, master, terminal, good, *opened):
            os.close(fd)


def test_files_that_hold_no_audio_fail_with_a_sentence(client: RawClient, tmp_path: Path) -> None:
    for name, content in {"empty": b"", "text": b"To be, or not to be. " * 50, "noise": os.urandom(5000)}.items():
        path = tmp_path / name
        path.write_bytes(content)
        job = client.result(submit(client, path)["id"])["job"]
        assert (job["state"], job["error"]["code"]) == ("failed", "bad_audio")
        assert len(job["error"]["message"]) > 20


def test_a_memfd_at_its_end_is_read_from_its_beginning(client: RawClient, recording: Callable[..., Path]) -> None:
    fd = os.memfd_create("speech")
    os.write(fd, recording(2).read_bytes())
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK)
    job = client.call("submit", descriptors=[fd], source={"kind": "fd", "name": ""}, options=PLAIN_OPTIONS)["job"]
    os.close(fd)
    assert client.result(job["id"])["job"]["state"] == "done"


def test_a_broken_client_hurts_only_itself(client: RawClient, shared: Daemon) -> None:
    for data in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x03abc", b"\x00\x00\x00\x01\xc0", b"GET / HTTP/1.1\r\n\r\n"):
        with shared.client() as broken:
            broken.send_bytes(data)
            reply = broken.receive(10)
            assert reply["id"] == 0
            assert reply["error"]["code"] in ("bad_frame", "too_large")
            with pytest.raises(EOFError):
                broken.receive(10)
    assert client.call("health")["status"] == "ready"


def test_stats_are_what_the_documentation_names(client: RawClient, shared: Daemon) -> None:
    stats = client.call("stats")
    assert stats["daemon"]["pid"] == shared.pid
    assert stats["model"]["pid"] == shared.helpers("whisperd.model.main")[0].pid
    assert {"jobs", "queue", "wait_s", "run_s", "audio", "model", "lanes", "cache_hits", "spool_bytes"} <= set(stats)
    assert {"database_bytes", "connections", "daemon"} <= set(stats)
