"""Whole daemons under bad luck and bad manners: what breaks hurts whom it must, and nobody else."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.models import micro_checkpoint
from tests.support import (
    NO_MODEL,
    PLAIN_OPTIONS,
    Daemon,
    RawClient,
    client_as,
    error_of,
    requires_root,
    running_daemon,
    small_disk,
    submit,
    wait_until,
)
from whisperctl import Client
from whisperd.daemon.store import Retention, Store
from whisperd.daemon.store.database import Database
from whisperd.daemon.store.rows import NewJob, about
from whisperd.protocol.jobs import Priority


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """One daemon without a model, for the tests that leave it as they found it."""
    with running_daemon(model=NO_MODEL) as daemon:
        yield daemon


@pytest.fixture
def client(shared: Daemon) -> Iterator[RawClient]:
    with shared.client() as client:
        yield client


# --- clients ---


def test_a_long_past_does_not_cut_off_who_reads_it(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(model=NO_MODEL, max_output_bytes=65_536)
    segments = [{"id": n, "text": "word " * 200} for n in range(700)]
    job_id = job_of_the_past(daemon.state_dir, segments)
    daemon.start()
    with daemon.client() as client:
        number = client.send("subscribe", job=job_id)
        assert client.reply(number)["ok"]
        events = [client.receive() for _ in range(len(segments) + 3)]
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert [event["segment"] for event in events if event["event"] == "segment"] == segments
        assert events[-1]["event"] == "end"


def job_of_the_past(state_dir: Path, segments: list[dict[str, Any]], transcript: bytes = b"\x80") -> int:
    """Write the state of a daemon that has transcribed one recording; return the job's id."""
    state_dir.mkdir(mode=0o700, parents=True)
    database = Database(state_dir / "whisperd.sqlite3", deliver=lambda fn: None, failed=lambda reason: None)
    store = Store(Retention(jobs_s=1e9, keys_s=1e9, failed_audio_s=1e9))
    new = NewJob(
        uid=os.geteuid(),
        priority=Priority.BACKGROUND,
        attached=False,
        key=None,
        source={"kind": "fd", "name": "talk"},
        options={},
        fresh=False,
        fingerprint=b"f",
        share_key=b"s",
        folder="folder",
        sha256="",
        size_bytes=1,
    )
    now = time.time()
    job, run = about(database.run(lambda db: store.accept(db, new, now)))
    database.run(lambda db: store.start(db, run.id, now))
    database.run(lambda db: store.add_segments(db, run.id, segments))
    database.run(lambda db: store.finish(db, run.id, transcript, now))
    database.connection.close()
    return job.id


# --- helpers ---


def only(helpers: list[psutil.Process]) -> psutil.Process:
    (helper,) = helpers
    return helper


def copier_of(daemon: Daemon) -> psutil.Process:
    """Return the copier that was started ahead of the first copy."""
    return only(wait_until(lambda: daemon.helpers("whisperd.audio.copier")))


def test_helpers_hear_nothing_of_what_systemd_told_the_daemon(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(model=NO_MODEL)
    told = {"NOTIFY_SOCKET": str(daemon.folder / "n"), "WATCHDOG_USEC": "60000000", "STATE_DIRECTORY": "/nowhere"}
    daemon.variables |= told | {"LANGUAGE": "fr"}
    daemon.start()
    given = copier_of(daemon).environ()
    assert not told.keys() & given
    assert given["LANGUAGE"] == "fr"
    assert not {"NUMBA_CACHE_DIR", "TRITON_CACHE_DIR"} & given.keys() - daemon.environment().keys(), "the model's alone"


def test_a_copier_that_dies_costs_its_client_nothing(
    shared: Daemon, client: RawClient, recording: Callable[..., Path]
) -> None:
    copier = copier_of(shared)
    copier.suspend()
    with recording().open("rb") as file:
        source = {"kind": "fd", "name": "talk"}
        number = client.send("submit", descriptors=[file.fileno()], source=source, options=PLAIN_OPTIONS)
    wait_until(lambda: client.call("stats")["lanes"]["copy"]["active"] == 1)
    copier.kill()
    assert client.reply(number)["result"]["job"]["state"] == "queued"


def test_a_file_whose_reading_hangs_is_given_up(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, copy_timeout_s=5)
    with daemon.client() as client:
        submit(client, recording())  # by a copier that has come up: else it is not the reading that hangs
        copier_of(daemon).suspend()
        assert error_of(lambda: submit(client, recording())) == "timed_out"
        assert submit(client, recording())["state"] == "queued"


@requires_root
def test_one_user_may_not_take_all_copiers_but_an_admin_may(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, copiers=3, copies_per_user=1, socket_mode="0666")
    for uid, copies in ((0, 2), (65534, 1)):
        with client_as(daemon, uid) as client, recording().open("rb") as file:
            # Every copier that there is stands still, so that each copy occupies one.
            pending = []
            for _ in range(2):
                for copier in daemon.helpers("whisperd.audio.copier"):
                    copier.suspend()
                source = {"kind": "fd", "name": "talk"}
                pending.append(client.send("submit", descriptors=[file.fileno()], source=source, options=PLAIN_OPTIONS))
                client.call("hello")
            wait_until(lambda copies=copies: client.call("stats")["lanes"]["copy"]["active"] == copies)
            assert client.call("stats")["lanes"]["copy"]["waiting"] == 2 - copies
            for copier in daemon.helpers("whisperd.audio.copier"):
                copier.resume()
            for number in pending:
                assert client.reply(number)["ok"]


def test_helpers_that_do_not_start_fail_nobody(
    make_daemon: Callable[..., Daemon], recording: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = make_daemon(model=NO_MODEL, helper_backoff_s=0.1, helper_backoff_max_s=0.5)
    broken = daemon.folder / "broken"
    broken.mkdir()
    (broken / "av.py").write_text("raise ImportError('an upgrade went wrong')\n")
    clean = daemon.environment()
    monkeypatch.setattr(daemon, "environment", lambda: clean | {"PYTHONPATH": str(broken)})
    daemon.start()
    with daemon.client() as client:
        jobs = [submit(client, recording()) for _ in range(3)]
        wait_until(lambda: any("decoder" in problem for problem in client.call("health")["problems"]))
        wait_until(lambda: client.call("stats")["lanes"]["decode"]["failed"] > 4)
        shutil.rmtree(broken)
        for job in jobs:
            wait_until(lambda job=job: client.call("result", job=job["id"])["job"]["audio_s"])
        assert not any("decoder" in problem for problem in client.call("health")["problems"])


def test_copiers_of_another_version_refuse_no_file(
    make_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    """An upgrade under a running daemon: what is submitted waits until there are copiers again."""
    daemon = make_daemon(model=NO_MODEL, helper_backoff_s=0.1, helper_backoff_max_s=0.3)
    upgrade = daemon.folder / "upgrade"
    upgrade.mkdir()
    (upgrade / "sitecustomize.py").write_text(
        "import sys, whisperd\nif 'whisperd.audio.copier' in sys.orig_argv: whisperd.__version__ = '0.0.1'\n"
    )
    daemon.variables = {"PYTHONPATH": str(upgrade)}
    daemon.start()
    with daemon.client() as client:
        with recording().open("rb") as file:
            source = {"kind": "fd", "name": "talk"}
            number = client.send("submit", descriptors=[file.fileno()], source=source, options=PLAIN_OPTIONS)
        wait_until(lambda: daemon.log().count("helpers rest role=copier") > 4)
        wait_until(lambda: any("0.0.1" in problem for problem in client.call("health")["problems"]))
        (upgrade / "sitecustomize.py").unlink()
        assert client.reply(number)["result"]["job"]["state"] == "queued"


# --- what the machine runs out of ---


def test_descriptors_that_run_out_are_waited_for(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, helper_backoff_s=0.1, helper_backoff_max_s=0.5)
    process = psutil.Process(daemon.pid)
    soft, hard = process.rlimit(psutil.RLIMIT_NOFILE)
    assert soft == hard, "the limit is raised as far as it goes"
    with daemon.client() as client:
        submit(client, recording())
        used = process.num_fds()
        process.rlimit(psutil.RLIMIT_NOFILE, (used + 2, hard))
        crowd = [daemon.client() for _ in range(8)]
        wait_until(lambda: "cannot accept" in daemon.log())
        assert client.call("health")["queue"]["depth"] == 1
        for one in crowd:
            one.close()
        # One descriptor for what is submitted, none for a copy to a helper or for a helper to start.
        wait_until(lambda: process.num_fds() == used)
        process.rlimit(psutil.RLIMIT_NOFILE, (used + 1, hard))
        with recording().open("rb") as file:
            source = {"kind": "fd", "name": "talk"}
            number = client.send("submit", descriptors=[file.fileno()], source=source, options=PLAIN_OPTIONS)
            wait_until(lambda: any("copier" in problem for problem in client.call("health")["problems"]))
        process.rlimit(psutil.RLIMIT_NOFILE, (hard, hard))
        assert client.reply(number)["ok"]
        assert daemon.answers()


@requires_root
def test_a_state_folder_that_cannot_be_written_is_said(make_daemon: Callable[..., Daemon], shared: Daemon) -> None:
    read_only, blocked = make_daemon(model=NO_MODEL), make_daemon(model=NO_MODEL)
    blocked.state_dir.mkdir()
    (blocked.state_dir / "spool").write_text("in the way")
    assert exit_code(blocked) == 4
    with small_disk(read_only.state_dir, "8m"):
        read_only.start()
        read_only.stop()
        subprocess.run(["mount", "-o", "remount,ro", read_only.state_dir], check=True)
        assert exit_code(read_only) == 4
    for daemon in (read_only, blocked):
        assert str(daemon.state_dir) in daemon.log().splitlines()[-1]
        assert "Traceback" not in daemon.log()


def exit_code(daemon: Daemon) -> int:
    """Start a daemon that is to end by itself."""
    daemon.start(wait=False)
    assert daemon.process is not None
    code = daemon.process.wait(30)
    daemon.process = None
    return code


def test_a_spool_that_is_deleted_costs_what_was_in_it_and_no_more(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, decoders=1)
    with daemon.client() as client:
        only(wait_until(lambda: daemon.helpers("whisperd.audio.decoder"))).suspend()
        lost = submit(client, recording())
        shutil.rmtree(daemon.state_dir / "spool")
        wait_until(lambda: (daemon.state_dir / "spool").exists())
        kept = submit(client, recording())
        only(daemon.helpers("whisperd.audio.decoder")).resume()
        assert client.result(lost["id"])["job"]["state"] == "failed"
        wait_until(lambda: client.call("result", job=kept["id"])["job"]["audio_s"])
        assert client.call("cancel", job=kept["id"])["job"]["state"] == "cancelled"


def test_a_model_file_that_is_replaced_answers_only_once_it_is_loaded(
    start_daemon: Callable[..., Daemon], micro: Path, tmp_path: Path, recording: Callable[..., Path]
) -> None:
    place = tmp_path / "model.pt"
    shutil.copy(micro, place)
    daemon = start_daemon(model=str(place), ready=True)
    talk, other = recording(), recording()

    def text(path: Path) -> str:
        answer: str = client.result(submit(client, path)["id"])["transcript"]["text"]
        return answer

    with daemon.client() as client:
        old = text(talk)
        replacement = micro_checkpoint(tmp_path, seed=1)
        replacement.replace(place)
        assert text(talk) == old
        text(other)
        client.call("model", action="unload")
        client.call("model", action="load")
        daemon.wait_ready()
        assert text(talk) != old
        assert client.call("stats")["cache_hits"] == 1
        text(other)
        assert client.call("stats")["cache_hits"] == 1, "the old model's words are not the new one's"


# --- the machine around it ---


def test_a_log_that_nobody_reads_holds_up_nothing(
    make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch, recording: Callable[..., Path]
) -> None:
    daemon = make_daemon(model=NO_MODEL, log_level="debug")
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    daemon.log_file.symlink_to(f"/proc/{os.getpid()}/fd/{writer}")
    daemon.start()
    monkeypatch.setattr(daemon, "log", lambda: "")
    with daemon.client() as client:
        path = recording(0.1)
        for _ in range(100):
            client.call("cancel", job=submit(client, path, fresh=True)["id"])
        assert client.call("stats")["jobs"]["since_start"]["cancelled"] == 100
    assert daemon.stop() == 0
    os.close(reader)
    os.close(writer)


def test_a_stop_takes_ten_seconds_at_most_whatever_stands_still(
    make_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = make_daemon(model="/nowhere/model.pt", decoders=1)  # a model's process that stands still too
    daemon.start()
    with daemon.client() as client, daemon.client() as deaf:
        wait_until(lambda: len(daemon.children()) == 3)
        for helper in daemon.helpers("whisperd.audio"):
            helper.suspend()
        with recording().open("rb") as file:
            source = {"kind": "fd", "name": "talk"}
            number = client.send(
                "submit", descriptors=[file.fileno()], source=source, options=PLAIN_OPTIONS, key="kept"
            )
        copier_of(daemon).resume()
        job = client.reply(number)["result"]["job"]
        copier_of(daemon).suspend()
        with recording().open("rb") as file:
            refused = client.send("submit", descriptors=[file.fileno()], source=source, options=PLAIN_OPTIONS)
        for _ in range(60):
            deaf.send("jobs", limit=200)
        waiting = client.send("result", job=job["id"], wait_s=None)
        wait_until(lambda: client.call("stats")["lanes"]["copy"]["active"] == 1)
        for helper in daemon.children():
            helper.suspend()
        assert daemon.stop(10) == 0
        assert client.reply(refused)["error"]["code"] == "stopping"
        with pytest.raises(EOFError):
            client.reply(waiting)
    daemon.start()
    with daemon.client() as client:
        wait_until(lambda: client.call("result", job=job["id"])["job"]["audio_s"])
        assert client.call("health")["queue"]["depth"] == 1


def test_a_copy_ends_with_its_client_unless_it_has_a_key(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, cancel_grace_s=20)  # the copier that stands still is not replaced
    copier_of(daemon)
    spool = daemon.state_dir / "spool"
    with daemon.client() as client:
        for params, jobs in (({}, 0), ({"key": "held", "attached": True}, 0), ({"key": "free"}, 1)):
            for copier in daemon.helpers("whisperd.audio.copier"):
                copier.suspend()
            leaving = daemon.client()
            with recording().open("rb") as file:
                source = {"kind": "fd", "name": "talk"}
                leaving.send("submit", descriptors=[file.fileno()], source=source, options=PLAIN_OPTIONS, **params)
            wait_until(lambda: client.call("stats")["lanes"]["copy"]["active"] == 1)
            leaving.close()
            wait_until(lambda: client.call("stats")["connections"] == 1)
            for copier in daemon.helpers("whisperd.audio.copier"):
                copier.resume()
            wait_until(lambda: client.call("stats")["lanes"]["copy"] == {"active": 0, "waiting": 0, "failed": 0})
            wait_until(lambda jobs=jobs: len(client.call("jobs")["jobs"]) == len(list(spool.iterdir())) == jobs)


def test_a_file_size_limit_is_a_full_disk(start_daemon: Callable[..., Daemon], recording: Callable[..., Path]) -> None:
    daemon = start_daemon(model=NO_MODEL, disk_check_s=0.2)
    process = psutil.Process(daemon.pid)
    with daemon.client() as client:
        first = submit(client, recording())
        wait_until(lambda: client.call("result", job=first["id"])["job"]["audio_s"])
        unlimited = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (1, unlimited[1]))
        assert error_of(lambda: submit(client, recording())) == "storage_full"
        assert error_of(lambda: client.call("cancel", job=first["id"])) == "storage_full"
        assert client.call("result", job=first["id"])["job"]["state"] == "queued"
        assert [job["id"] for job in client.call("jobs")["jobs"]] == [first["id"]]
        process.rlimit(psutil.RLIMIT_FSIZE, unlimited)
        wait_until(lambda: not any("is full" in problem for problem in client.call("health")["problems"]))
        second = submit(client, recording())
        assert client.call("cancel", job=first["id"])["job"]["state"] == "cancelled"
        wait_until(lambda: len(list((daemon.state_dir / "spool").iterdir())) == 2)
        assert client.call("result", job=second["id"])["job"]["id"] == second["id"]


# --- strangers ---


@requires_root
def test_a_stranger_learns_nothing_and_changes_nothing(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, socket_mode="0666", admins=["65533"])
    path = recording()
    with client_as(daemon, 1) as owner, client_as(daemon, 65534) as stranger, client_as(daemon, 65533) as admin:
        events = stranger.send("subscribe")
        assert stranger.reply(events)["ok"]
        job = submit(owner, path, key="mine")["id"]
        for op, params in {"result": {"wait_s": None}, "cancel": {}, "forget": {}, "subscribe": {}}.items():
            there = stranger.reply(stranger.send(op, job=job, **params))["error"]
            nowhere = stranger.reply(stranger.send(op, job=job + 1000, **params))["error"]
            assert there["code"] == nowhere["code"] == "not_found"
            assert there["message"].replace(str(job), "") == nowhere["message"].replace(str(job + 1000), "")
        assert stranger.call("jobs") == {"jobs": [], "more": False}
        assert error_of(lambda: stranger.call("jobs", all=True)) == "forbidden"
        assert error_of(lambda: stranger.call("model", action="unload")) == "forbidden"
        assert error_of(lambda: stranger.call("pull", model="small")) == "forbidden"
        own = submit(stranger, path, key="mine")
        assert (own["id"], own["uid"]) == (job + 1, 65534), "another's key and recording are not his"
        assert [row["id"] for row in admin.call("jobs", all=True)["jobs"]] == [own["id"], job]
        assert admin.call("jobs")["jobs"] == []
        assert admin.call("cancel", job=job)["job"]["state"] == "cancelled"
        assert owner.call("result", job=job)["job"]["state"] == "cancelled"
        assert stranger.call("cancel", job=own["id"])["job"]["state"] == "cancelled"
        told = [stranger.receive_until(lambda message: message["id"] == events) for _ in range(2)]
        assert [event["job"] for event in told] == [own["id"]] * 2


# --- people ---


def test_a_person_who_holds_the_database_makes_it_wait_and_not_die(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, stop_grace_s=1)
    with daemon.client() as client, closing(sqlite3.connect(daemon.state_dir / "whisperd.sqlite3")) as person:
        person.isolation_level = None
        person.execute("BEGIN IMMEDIATE")
        with recording().open("rb") as file:
            source = {"kind": "fd", "name": "talk"}
            number = client.send("submit", descriptors=[file.fileno()], source=source, options=PLAIN_OPTIONS)
        wait_until(lambda: "another program holds the database" in daemon.log())
        assert client.call("health")["queue"]["depth"] == 1
        person.execute("ROLLBACK")
        assert client.reply(number)["ok"]
        person.execute("BEGIN IMMEDIATE")
        assert daemon.stop(10) == 0


# --- file systems ---


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """A function that opens a file whose file system no longer answers."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("this test needs /dev/fuse")
    folder, flag = tmp_path / "mount", tmp_path / "mute"
    folder.mkdir()
    server = subprocess.Popen([sys.executable, Path(__file__).with_name("hanging_files.py"), folder, flag])
    wait_until(lambda: folder.is_mount())

    def open_talk() -> int:
        flag.unlink(missing_ok=True)
        fd = os.open(folder / "talk", os.O_RDONLY)
        flag.touch()
        return fd

    yield open_talk
    server.kill()  # its files fail at once, and whoever waits for them goes on
    server.wait()
    subprocess.run(["umount", "--lazy", folder], check=True)


@requires_root
def test_a_file_system_that_does_not_answer_does_not_stop_the_loop(
    start_daemon: Callable[..., Daemon], hanging: Callable[[], int], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL)
    with daemon.client() as client, daemon.client() as hostile:
        # A descriptor that no operation asked for is closed, which asks the file system; so does looking at one.
        assert hostile.reply(hostile.send("health", descriptors=[hanging()]))["ok"]
        assert submit(client, recording())["state"] == "queued"
        hostile.send("submit", descriptors=[hanging()], source={"kind": "fd", "name": "talk"})
        wait_until(lambda: client.call("stats")["lanes"]["copy"]["active"] == 1)
        assert client.call("health")["queue"]["depth"] == 2


@requires_root
def test_files_that_cannot_be_closed_do_not_pile_up(
    start_daemon: Callable[..., Daemon], hanging: Callable[[], int], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, closers=8)
    process = psutil.Process(daemon.pid)
    with daemon.client() as client, daemon.client() as hostile:
        threads = process.num_threads()
        hanging_fd = hanging()
        for _ in range(18):
            hostile.call("health", descriptors=[hanging_fd])
        wait_until(lambda: any("cannot be closed" in problem for problem in client.call("health")["problems"]))
        assert process.num_threads() <= threads + 8
        used = process.num_fds()
        for _ in range(20):
            hostile.call("health", descriptors=[hanging_fd])
        assert process.num_fds() == used, "no more are taken"
        assert error_of(lambda: submit(client, recording())) == "no_descriptor"
        with Client(daemon.socket) as far:
            assert far.submit(recording()).source["kind"] == "upload"


def test_a_known_file_that_there_is_no_descriptor_left_for_is_to_be_uploaded(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon, path = start_daemon(model=NO_MODEL), recording()
    process = psutil.Process(daemon.pid)

    def open_descriptors() -> dict[int, str]:
        folder = f"/proc/{daemon.pid}/fd"
        return {int(name): os.readlink(f"{folder}/{name}") for name in os.listdir(folder)}

    with daemon.client() as client:
        job = submit(client, path, key="known")
        wait_until(lambda: str(path) not in open_descriptors().values())
        free = next(number for number in itertools.count() if number not in open_descriptors())
        limits = process.rlimit(psutil.RLIMIT_NOFILE)
        # The client's descriptor still arrives; the copy of it that is compared would be the next one.
        process.rlimit(psutil.RLIMIT_NOFILE, (free + 1, limits[1]))
        assert error_of(lambda: submit(client, path, key="known")) == "no_descriptor"
        process.rlimit(psutil.RLIMIT_NOFILE, limits)
        with Client(daemon.socket) as far:
            assert far.submit(path, key="known", **PLAIN_OPTIONS).id == job["id"]


@requires_root
def test_helpers_start_while_a_file_that_hangs_is_held(
    start_daemon: Callable[..., Daemon], hanging: Callable[[], int], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, copiers=4)
    with daemon.client() as client, daemon.client() as hostile:
        source = {"kind": "fd", "name": "talk"}
        for copies in (1, 2):
            hostile.send("submit", descriptors=[hanging()], source=source)
            wait_until(lambda copies=copies: client.call("stats")["lanes"]["copy"]["active"] == copies)
        # The copiers that are there wait for the hanging files: this takes a new one.
        job = submit(client, recording())
        wait_until(lambda: client.call("result", job=job["id"])["job"]["audio_s"])
        for helper in daemon.helpers("whisperd.audio.decoder"):
            helper.kill()
        again = submit(client, recording())
        wait_until(lambda: client.call("result", job=again["id"])["job"]["audio_s"])
