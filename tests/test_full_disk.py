"""Whole daemons on a disk that is really full: what is there goes on, new work waits, and all goes on by itself."""

from __future__ import annotations

import os
import queue
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.audio_files import write_audio, write_silence
from tests.ledgers import ledger_on
from tests.media_server import serving
from tests.support import (
    NO_MODEL,
    PLAIN_OPTIONS,
    Daemon,
    RawClient,
    error_of,
    files_in,
    fill,
    requires_root,
    small_disk,
    submit,
    wait_until,
)
from tests.test_upload import upload
from whisperd.daemon.config import Config
from whisperd.daemon.loop import Loop
from whisperd.daemon.state.disk import Disk
from whisperd.daemon.state.spool import Spool
from whisperd.daemon.store.ballast import Ballast
from whisperd.daemon.store.database import Database
from whisperd.protocol.errors import WhisperdError

TINY: dict[str, Any] = {
    "min_free_bytes": 0,
    "ballast_bytes": 4 * 2**20,
    "disk_check_s": 0.2,
    "full_disk_pause_s": 0.5,
    "log_level": "warning",
}

pytestmark = requires_root


@pytest.fixture
def tiny(make_daemon: Callable[..., Daemon]) -> Iterator[Callable[..., Daemon]]:
    """A function that prepares a daemon whose state lies on a disk of 24 MiB, or of another size."""
    mounts = []

    def make(size: str = "24m", **settings: Any) -> Daemon:
        daemon = make_daemon(**TINY | settings)
        mount = small_disk(daemon.state_dir, size)
        mount.__enter__()
        mounts.append(mount)
        return daemon

    yield make
    for mount in mounts:
        mount.__exit__(None, None, None)


def ballast(daemon: Daemon) -> Path:
    return daemon.state_dir / "ballast"


def filler(daemon: Daemon) -> Path:
    """A file that takes all the room there is."""
    path = daemon.state_dir / "fill"
    fill(path)
    return path


def full(client: RawClient) -> bool:
    return any("is full" in problem for problem in client.call("health")["problems"])


def test_a_full_disk_refuses_new_work_and_nothing_else(
    tiny: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = tiny(model=NO_MODEL)
    daemon.start()
    assert ballast(daemon).stat().st_blocks * 512 == TINY["ballast_bytes"], "real blocks, not a hole"
    with daemon.client() as client:
        first = recording()
        jobs = [submit(client, first if n == 0 else recording(), key=f"k{n}") for n in range(3)]
        for job in jobs:
            wait_until(lambda job=job: client.call("result", job=job["id"])["job"]["audio_s"])
    assert daemon.stop() == 0
    daemon.start()  # with a log that has no blocks yet
    with daemon.client() as client:
        rubbish = filler(daemon)
        assert error_of(lambda: submit(client, recording())) == "storage_full"
        # A key that is known takes no room: its file is only compared.
        assert submit(client, first, key="k0")["id"] == jobs[0]["id"]
        assert error_of(lambda: submit(client, recording(), key="k0")) == "key_conflict"
        # A `cancel` and a `forget` write; the ballast makes room for them.
        for job in jobs[:2]:
            assert client.call("cancel", job=job["id"])["job"]["state"] == "cancelled"
            fill(rubbish.with_name(f"more-{job['id']}"))  # somebody who takes every block that becomes free
        assert client.call("forget", job=jobs[0]["id"])["job"]["id"] == jobs[0]["id"]
        assert not ballast(daemon).exists()
        wait_until(lambda: full(client))
        assert error_of(lambda: submit(client, recording())) == "storage_full"
        assert [job["id"] for job in client.call("jobs")["jobs"]] == [jobs[2]["id"], jobs[1]["id"]]
        for path in daemon.state_dir.glob("more-*"):
            path.unlink()
        rubbish.unlink()
        wait_until(lambda: ballast(daemon).exists() and not full(client))
        assert submit(client, recording())["state"] == "queued"
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log()


def leave(daemon: Daemon, client: RawClient, free_bytes: int) -> None:
    """Have somebody take the disk but for about so many bytes, and wait until the daemon knows."""
    path = daemon.state_dir / "fill"
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(daemon.state_dir).free - free_bytes)
    wait_until(lambda: abs(client.call("stats")["free_bytes"] - free_bytes) < 2**18)


def test_no_setting_lets_submits_have_what_two_ballasts_need(
    tiny: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    """Below that nothing is decoded: queued audio would lie there for ever. All that takes no room goes on."""
    daemon = tiny(model=str(micro))
    daemon.start(ready=True)
    with daemon.client() as client:
        done = submit(client, recording())["id"]
        assert client.result(done)["job"]["state"] == "done"
        client.call("pause")
        waiting = submit(client, recording(), key="k")["id"]
        bound = client.call("stats")["min_free_bytes"]
        assert bound == 2 * TINY["ballast_bytes"] > TINY["min_free_bytes"]
        leave(daemon, client, bound - 2**19)
        assert error_of(lambda: submit(client, recording())) == "storage_full"
        assert any("nearly full" in problem for problem in client.call("health")["problems"])
        assert ballast(daemon).exists(), "the disk is not full"
        assert client.call("result", job=done)["transcript"]["segments"]
        assert client.call("cancel", job=waiting)["job"]["state"] == "cancelled"
        for job in (waiting, done):
            assert client.call("forget", job=job)["job"]["id"] == job
        assert client.call("jobs")["jobs"] == []
        leave(daemon, client, bound + 2**19)
        client.call("resume")
        assert client.result(submit(client, recording())["id"])["job"]["state"] == "done"


def test_submits_that_come_between_two_looks_at_the_disk_leave_free_what_decoding_needs(
    tiny: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    """Each was admitted by what was free before the first; whoever writes looks again."""
    daemon = tiny(model=NO_MODEL, disk_check_s=60)
    daemon.start()
    with daemon.client() as client:
        bound = client.call("stats")["min_free_bytes"]
        (decoder,) = wait_until(lambda: daemon.helpers("whisperd.audio.decoder"))
        decoder.suspend()
        files = [recording(250) for _ in range(3)]  # 8 MB each, of 20 MiB
        job = submit(client, files[0])
        assert error_of(lambda: submit(client, files[1])) == "storage_full"
        with pytest.raises(WhisperdError, match="min_free_bytes") as caught:
            upload(client, files[2].read_bytes())
        assert caught.value.code == "storage_full"
        wait_until(lambda: len(list((daemon.state_dir / "spool").iterdir())) == 1)
        assert shutil.disk_usage(daemon.state_dir).free >= bound
        decoder.resume()
        wait_until(lambda: client.call("result", job=job["id"])["job"]["audio_s"])


def test_a_full_disk_can_be_tidied_for_ever(tmp_path: Path) -> None:
    """More commits than ballast and log have room for: the log is folded, and its own blocks are written again."""
    folder = tmp_path / "disk"
    with small_disk(folder, "6m"):
        ballast = Ballast(folder / "ballast", 2**20)
        ballast.make()
        database = Database(folder / "db", ballast=ballast, deliver=lambda call: call(), failed=pytest.fail)
        database.start()

        def run(sql: str) -> list[Any]:
            outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
            database.call(lambda db: db.execute(sql).fetchall(), outcomes.put)
            outcome = outcomes.get(timeout=30)
            assert isinstance(outcome, list), outcome
            return outcome

        run("CREATE TABLE things (id INTEGER PRIMARY KEY, size BLOB)")
        for _ in range(500):
            run("INSERT INTO things (size) VALUES (zeroblob(2000))")
        fill(folder / "fill")
        for number in range(1, 501):
            run(f"DELETE FROM things WHERE id = {number}")
            fill(folder / f"more-{number}")  # somebody who takes every block that becomes free
        assert ballast.missing
        run("INSERT INTO things (id) VALUES (7)")
        # As after kill -9: the room that was given to the log is no part of what it says.
        crashed = tmp_path / "crashed"
        crashed.mkdir()
        for name in ("db", "db-wal"):
            shutil.copyfile(folder / name, crashed / name)
        with closing(sqlite3.connect(crashed / "db")) as db:
            assert db.execute("SELECT id FROM things").fetchall() == [(7,)]
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        database.stop()


def test_what_waits_for_room_is_begun_also_where_the_disk_was_full_between_two_looks(tmp_path: Path) -> None:
    config = Config(socket=tmp_path / "s", state_dir=tmp_path, cache_dir=tmp_path, ballast_bytes=2**20, disk_check_s=60)
    ballast, loop = Ballast(tmp_path / "ballast", config.ballast_bytes), Loop()
    database = Database(tmp_path / "db", ballast=ballast, deliver=loop.call_soon_threadsafe, failed=pytest.fail)
    ledger = ledger_on(loop, database, Spool(tmp_path / "spool"))
    roomy: list[bool] = []
    disk = Disk(loop, config, ledger, ballast, lambda: roomy.append(not disk.full))
    disk.prepare()
    database.start()

    def run(call: Callable[[sqlite3.Connection], None]) -> None:
        database.call(call, lambda outcome: loop.stop())  # after all that was handed over before it
        loop.run()

    def look() -> None:
        disk.look()
        run(lambda db: None)

    look()
    run(lambda db: ballast.give_to(tmp_path / "db-wal"))
    assert ledger.full
    assert roomy == []
    look()
    look()
    assert roomy == [True], "told once"
    loop.close()
    database.stop()


def test_a_full_disk_delays_and_loses_nothing(
    tiny: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon = tiny(model=str(micro))
    daemon.start(ready=True)
    with daemon.client() as client:
        job = submit(client, recording(100))
        wait_until(lambda: client.call("result", job=job["id"])["job"]["state"] == "running")
        filler(daemon)
        transcript = client.result(job["id"])["transcript"]  # its audio makes room as it goes
        assert transcript["segments"]
        number = client.send("subscribe", job=job["id"])
        assert client.reply(number)["ok"]
        told = []
        while (event := client.receive())["event"] != "end":
            told += [event["segment"]["text"]] if event["event"] == "segment" else []
        assert told == [segment["text"] for segment in transcript["segments"]]
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log()


def test_a_site_is_not_asked_again_and_again_while_the_disk_is_nearly_full(
    tiny: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    """What a download needs is known only once the site was asked."""
    settings = {"fetch_allow_private": True, "fetch_extractors": ["generic"], "full_disk_pause_s": 0.2}
    daemon = tiny(model=NO_MODEL, **settings)
    daemon.start()
    with serving(recording(60)) as server, daemon.client() as client:  # 2 MB

        def rests_until() -> float | None:
            until: float | None = client.call("stats")["lanes"]["fetch"]["rests_until"]
            return until

        bound = client.call("stats")["min_free_bytes"]
        client.call("pause")
        job = client.call("submit", source={"kind": "url", "url": server.url("talk.wav")})["job"]
        leave(daemon, client, bound - 2**19)
        client.call("resume")
        rests = {wait_until(rests_until)}
        asked = server.asked.copy()
        wait_until(lambda: rests.add(rests_until()) or len(rests - {None}) > 4)  # type: ignore[func-returns-value]
        assert server.asked == asked
        leave(daemon, client, bound + 2**20)
        wait_until(lambda: "for_s=0.8" in daemon.log(), message="there is room, and too little: each rest is longer")
        (daemon.state_dir / "fill").unlink()
        wait_until(lambda: client.call("result", job=job["id"])["job"]["state"] == "queued")


def test_decoding_pauses_on_a_full_disk_and_goes_on_by_itself(
    tiny: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = tiny(model=NO_MODEL, ballast_bytes=0)
    daemon.start()
    with daemon.client() as client:
        rubbish = daemon.state_dir / "fill"
        rubbish.write_bytes(b"x" * 14 * 2**20)
        job = submit(client, recording(180))  # 6 MB, and as much again once it is decoded
        wait_until(lambda: any("decoding waits" in problem for problem in client.call("health")["problems"]))
        assert client.call("result", job=job["id"])["job"]["state"] == "queued"
        rubbish.unlink()
        wait_until(lambda: client.call("result", job=job["id"])["job"]["audio_s"])
        assert client.call("result", job=job["id"])["job"]["attempts"] == 0
        assert not [path for path in files_in(daemon.state_dir) if path.suffix == ".partial"]


@pytest.mark.parametrize("name", ["long.flac", "long.wav"])
def test_a_recording_that_does_not_fit_waits_for_room_and_the_others_go_on(
    tiny: Callable[..., Daemon], micro: Path, recording: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """FLAC says how long it is; of a WAV nobody knows until the disk has become too small for it."""
    daemon = tiny("64m", model=str(micro))
    daemon.start(ready=True)
    path = tmp_path / name
    if name == "long.flac":
        write_silence(path, 600)  # decoded it has 19 MB
    else:
        write_audio(path, "pcm_mulaw", seconds=600, rate=8000)  # a fourth of that
    with daemon.client() as client:
        leave(daemon, client, 14 * 2**20)
        (decoder,) = daemon.helpers("whisperd.audio.decoder")
        decoder.suspend()
        # All of it is decoded; one window is enough of it.
        long = submit(client, path, options=PLAIN_OPTIONS | {"clip_timestamps": "0,5"})
        others = [submit(client, recording(3)) for _ in range(3)]
        decoder.resume()
        for job in others:
            assert client.result(job["id"])["job"]["state"] == "done"
        waiting = wait_until(lambda: "room" in (job := client.call("result", job=long["id"])["job"])["phase"] and job)
        assert (waiting["state"], waiting["attempts"]) == ("queued", 0)
        assert any("decoding waits" in problem for problem in client.call("health")["problems"])
        assert ballast(daemon).exists(), "the disk was never full"
        (daemon.state_dir / "fill").unlink()
        assert client.result(long["id"])["job"]["state"] == "done"
        assert client.call("health")["problems"] == []
    assert "Traceback" not in daemon.log()


def test_a_daemon_starts_on_a_full_disk_and_is_tidied_there(
    tiny: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = tiny(model=NO_MODEL)
    daemon.start()
    with daemon.client() as client:
        job = submit(client, recording())
    assert daemon.stop() == 0
    filler(daemon)
    daemon.start()
    with daemon.client() as client:
        assert full(client)
        assert error_of(lambda: submit(client, recording())) == "storage_full"
        assert client.call("cancel", job=job["id"])["job"]["state"] == "cancelled"
        assert client.call("forget", job=job["id"])
        assert client.call("jobs")["jobs"] == []
        assert client.call("health")["status"] == "degraded"
    daemon.kill()
    fill(daemon.state_dir / "more")  # and now there is no ballast any more
    daemon.start()
    with daemon.client() as client:
        assert full(client)
        (daemon.state_dir / "fill").unlink()
        (daemon.state_dir / "more").unlink()
        wait_until(lambda: not full(client))
        assert submit(client, recording())["state"] == "queued"


def test_a_copy_that_does_not_fit_leaves_nothing_and_hurts_nobody(
    tiny: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = tiny(model=NO_MODEL)
    daemon.start()
    with daemon.client() as client, daemon.client() as other:
        with recording(900).open("rb") as file:  # 29 MB into 16
            number = client.send("submit", descriptors=[file.fileno()], source={"kind": "fd", "name": "long"})
        assert submit(other, recording())["state"] == "queued"
        assert client.reply(number)["error"]["code"] == "storage_full"
        wait_until(lambda: len(list((daemon.state_dir / "spool").iterdir())) == 1)
        assert submit(client, recording())["state"] == "queued"
