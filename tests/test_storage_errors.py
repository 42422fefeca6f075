"""Storage that fails in other ways than by being full: no false acknowledgement, exit code 1, and no endless trying."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.media_server import serving
from tests.support import NO_MODEL, Daemon, error_of, requires_program, requires_root, submit, wait_until
from tests.tracing import traced, wait_for_end
from whisperd.protocol.errors import WhisperdError


def ended(daemon: Daemon) -> int:
    """Wait for a daemon that ends by itself; return its exit code."""
    assert daemon.process is not None
    code = daemon.process.wait(30)
    daemon.process = None
    return code


def database(daemon: Daemon) -> Path:
    return daemon.state_dir / "whisperd.sqlite3"


def change(daemon: Daemon, sql: str) -> None:
    """Change the rows behind the daemon's back."""
    with closing(sqlite3.connect(database(daemon), isolation_level=None)) as person:
        person.execute(sql)


# --- rows that are not as they should be ---


def test_rows_that_contradict_each_other_fail_their_run_and_only_worse_ends_the_daemon(
    start_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=str(micro), ready=True)

    def running() -> int:
        job = submit(client, recording(60))
        wait_until(lambda: client.call("result", job=job["id"])["job"]["state"] == "running")
        return int(job["id"])

    with daemon.client() as client:
        number = running()
        change(daemon, "INSERT INTO transcripts SELECT id, x'80' FROM runs")  # in the way of the run's end
        failed = client.result(number)["job"]
        assert (failed["state"], failed["error"]["code"]) == ("failed", "internal")
        running()
        change(daemon, "UPDATE runs SET state = 'odd' WHERE state = 'running'")  # nobody can make anything of it
        assert ended(daemon) == 1
    daemon.start(wait=False)
    assert ended(daemon) == 4
    assert str(daemon.state_dir) in daemon.log().splitlines()[-1]


# --- disks that fail ---


@requires_program("strace")
@pytest.mark.parametrize("call", ["fsync,fdatasync", "pwrite64"])
def test_a_disk_that_fails_at_a_commit_ends_the_daemon_without_a_reply(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path], tmp_path: Path, call: str
) -> None:
    daemon = start_daemon(model=NO_MODEL)
    log = Path(f"{database(daemon)}-wal")
    path = recording()
    with daemon.client() as client:
        kept = submit(client, recording(), key="before")
        # Decoded, else that is written while the disk fails, and not what is submitted then.
        wait_until(lambda: client.call("result", job=kept["id"])["job"]["audio_s"])
        with traced(daemon.pid, tmp_path / "trace", "-P", str(log), "-e", f"inject={call}:error=EIO"):
            with pytest.raises((EOFError, OSError)):
                submit(client, path, key="at")
            wait_for_end(daemon.pid)
    assert ended(daemon) == 1
    assert log.exists(), "who closes the database writes to that disk again"
    assert "storage failed" in daemon.log()
    daemon.start()
    with daemon.client() as client:
        assert client.call("result", job=kept["id"])["job"]["state"] == "queued"
        again = submit(client, path, key="at")
        assert [job["id"] for job in client.call("jobs")["jobs"]] == [again["id"], kept["id"]]


@requires_program("strace")
def test_a_disk_that_fails_when_the_log_is_folded_ends_the_daemon(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path], tmp_path: Path
) -> None:
    """SQLite itself would pass over this one, try again, and be told that all is well."""
    daemon = start_daemon(model=NO_MODEL)
    inject = ["-P", str(database(daemon)), "-e", "inject=fsync,fdatasync:error=EIO"]
    with daemon.client() as client:
        job = submit(client, recording())
        with traced(daemon.pid, tmp_path / "trace", *inject), suppress(EOFError, OSError):
            for _ in range(1000):
                client.call("jobs")
            wait_for_end(daemon.pid)
    assert ended(daemon) == 1
    daemon.start()
    with daemon.client() as client:
        assert [row["id"] for row in client.call("jobs")["jobs"]] == [job["id"]]


@requires_program("strace")
@pytest.mark.parametrize("call", ["fsync", "sync_file_range"])
def test_a_disk_that_fails_under_a_copy_refuses_the_submit(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path], tmp_path: Path, call: str
) -> None:
    """The second is told once, while a long file is still being written; the `fsync` in the end would be clean."""
    daemon = start_daemon(model=NO_MODEL)
    (copier,) = wait_until(lambda: daemon.helpers("whisperd.audio.copier"))
    with daemon.client() as client:
        with traced(copier.pid, tmp_path / "trace", "-e", f"inject={call}:error=EIO"):
            with pytest.raises(WhisperdError, match=r"disk of the spool cannot be written.*administrator") as caught:
                submit(client, recording(600))
            assert caught.value.code == "internal"
        wait_until(lambda: not list((daemon.state_dir / "spool").iterdir()), message="nothing stays in the spool")
        assert submit(client, recording())["state"] == "queued"


@requires_root
def test_a_state_folder_that_may_only_be_read_refuses_and_delays_and_loses_nothing(
    make_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    """Seen through a mount that is read-only, as the kernel refuses to turn one that is written to."""
    daemon = make_daemon(model=NO_MODEL, decoders=1, disk_check_s=0.2, full_disk_pause_s=0.5)
    state = daemon.state_dir
    daemon.start()
    with daemon.client() as client:

        def decoded(job: dict[str, Any]) -> float | None:
            audio_s: float | None = client.call("result", job=job["id"])["job"]["audio_s"]
            return audio_s

        def degraded() -> bool:
            health = client.call("health")
            return health["status"] == "degraded" and "Read-only" in str(health["problems"])

        before = submit(client, recording())
        wait_until(lambda: decoded(before))
        (decoder,) = daemon.helpers("whisperd.audio.decoder")
        decoder.suspend()
        job = submit(client, recording(), key="k")
        subprocess.run(["mount", "--bind", state, state], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", state], check=True)
            decoder.resume()  # it has to write now
            wait_until(degraded)
            with pytest.raises(WhisperdError, match="Read-only") as caught:
                submit(client, recording())
            assert caught.value.code == "storage_full"
            wait_until(lambda: "decoding waits" in str(client.call("health")["problems"]))
            assert client.call("cancel", job=before["id"])["job"]["state"] == "cancelled"
        finally:
            subprocess.run(["umount", state], check=True)
        wait_until(lambda: decoded(job))
        wait_until(lambda: "Read-only" not in str(client.call("health")["problems"]))
        assert submit(client, recording())["state"] == "queued"
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log()


@requires_program("strace")
def test_a_quota_that_is_used_up_is_a_full_disk(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path], tmp_path: Path
) -> None:
    """In a copy, a decode, and a commit, of which SQLite says what it also says of a broken disk."""
    daemon = start_daemon(model=NO_MODEL, copiers=1, decoders=1, full_disk_pause_s=0.5, disk_check_s=0.2)
    (copier,) = wait_until(lambda: daemon.helpers("whisperd.audio.copier"))
    (decoder,) = wait_until(lambda: daemon.helpers("whisperd.audio.decoder"))

    with daemon.client() as client:
        with traced(copier.pid, tmp_path / "copy", "-e", "inject=write:error=EDQUOT"):
            assert error_of(lambda: submit(client, recording())) == "storage_full"
        with traced(decoder.pid, tmp_path / "decode", "-e", "inject=write:error=EDQUOT"):
            job = submit(client, recording())
            wait_until(lambda: "decoding waits" in str(client.call("health")["problems"]))
        wait_until(lambda: client.call("result", job=job["id"])["job"]["audio_s"])
        with traced(daemon.pid, tmp_path / "commit", "-e", "inject=pwrite64:error=EDQUOT"):
            assert error_of(lambda: submit(client, recording())) == "storage_full"
        assert submit(client, recording())["state"] == "queued"
    assert daemon.stop() == 0


@requires_program("strace")
def test_a_disk_that_fills_under_a_download_delays_it(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path], tmp_path: Path
) -> None:
    """The database's log has blocks of its own: it does not notice that the disk is full."""
    settings = {"fetch_allow_private": True, "fetch_extractors": ["generic"], "full_disk_pause_s": 0.5}
    daemon = start_daemon(model=NO_MODEL, **settings)
    with serving(recording()) as server, daemon.client() as client:

        def fetch(name: str) -> int:
            return int(client.call("submit", source={"kind": "url", "url": server.url(name)})["job"]["id"])

        def seen(job: int) -> tuple[str, str]:
            found = client.call("result", job=job)["job"]
            return found["state"], found["phase"]

        first = fetch("first.wav")
        wait_until(lambda: seen(first)[0] == "queued")
        (fetcher,) = daemon.helpers("whisperd.fetch.fetcher")
        inject = ["-e", "trace=mkdir,mkdirat", "-e", "inject=mkdir,mkdirat:error=ENOSPC"]
        with traced(fetcher.pid, tmp_path / "download", *inject):
            job = fetch("second.wav")
            wait_until(lambda: seen(job) == ("pending", "waiting for room on the disk"))
            assert "downloads rest" in str(client.call("health")["problems"])
        wait_until(lambda: seen(job)[0] == "queued")
