"""What is on the disk before what is said, and what is left when a process is killed at any of these steps.

A power cut cannot be made here, and kill -9 keeps what the kernel has: so the order of write, fsync, rename, commit and
reply is read from a trace of the system calls. Then the same calls are where each process is killed.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.media_server import serving
from tests.support import NO_MODEL, Daemon, RawClient, files_in, requires_program, running_daemon, submit, wait_until
from tests.tracing import SystemCall, calls, traced, wait_for_end

pytestmark = requires_program("strace")


# --- the order ---

# Which call is which step. `STATE` is the state folder, RUN the name of a run's folder.
_STEPS = {
    r"write\(\d+<STATE/spool/RUN\.partial/source>": "source: write",
    r"fsync\(\d+<STATE/spool/RUN\.partial/source>": "source: fsync",
    r"fsync\(\d+<STATE/spool/RUN\.partial>": "source: fsync of its folder",
    r'rename\("STATE/spool/RUN\.partial", "STATE/spool/RUN"': "source: rename",
    r"fsync\(\d+<STATE/spool>": "source: fsync of the spool",
    r"sendto\(.*Copied": "source: told",
    r"write\(\d+<STATE/spool/RUN/audio\.pcm\.partial>": "pcm: write",
    r"fsync\(\d+<STATE/spool/RUN/audio\.pcm\.partial>": "pcm: fsync",
    r'rename\("STATE/spool/RUN/audio\.pcm\.partial", "STATE/spool/RUN/audio\.pcm"': "pcm: rename",
    r"fsync\(\d+<STATE/spool/RUN>": "pcm: fsync of its folder",
    r"sendto\(.*Decoded": "pcm: told",
    r"pwrite64\(\d+<STATE/whisperd\.sqlite3-wal>": "rows: write",
    r"fdatasync\(\d+<STATE/whisperd\.sqlite3-wal>": "rows: fsync",
    r"sendmsg\(.*id\\\d+\\\d+ok": "reply",
    r"unlink\w*\(": "unlink",
}
_TRACED = "trace=write,pwrite64,fsync,fdatasync,rename,sendto,sendmsg,unlink,unlinkat"


def steps(daemon: Daemon, trace: list[SystemCall]) -> list[str]:
    """Return the steps of a trace in their order; several of a kind in a row are one."""
    found = []
    for call in trace:
        line = f"{call.name}({call.arguments}".replace(str(daemon.state_dir), "STATE")
        line = re.sub(r"[0-9a-f]{32}", "RUN", line)
        found += [step for pattern, step in _STEPS.items() if re.match(pattern, line)]
    return [step for step, _ in groupby(found)]


def test_nothing_is_said_before_it_is_on_the_disk(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path], tmp_path: Path
) -> None:
    daemon = start_daemon(model=NO_MODEL)
    helpers = [wait_until(lambda kind=kind: daemon.helpers(f"whisperd.audio.{kind}"))[0] for kind in _HELPERS]
    with daemon.client() as client, daemon.client() as watcher:
        with traced([daemon.pid, *(helper.pid for helper in helpers)], tmp_path / "submit", "-e", _TRACED):
            job = submit(client, recording())
            # Seen in memory, as a commit is: a reply would stand in the trace.
            wait_until(lambda: len(rows(daemon, "SELECT 1 FROM runs WHERE decoded")) == 1)
        with traced(daemon.pid, tmp_path / "cancel", "-e", _TRACED):
            client.call("cancel", job=job["id"])
            client.call("hello")  # its answer comes once the call that sent the other one has returned
        with traced(daemon.pid, tmp_path / "forget", "-e", _TRACED):
            client.call("forget", job=job["id"])
            client.call("hello")
            wait_until(lambda: not folders(daemon))
        assert watcher.call("jobs")["jobs"] == []
    source = ["write", "fsync", "fsync of its folder", "rename", "fsync of the spool", "told"]
    pcm = ["write", "fsync", "rename", "fsync of its folder", "told"]
    commit = ["rows: write", "rows: fsync"]
    assert steps(daemon, calls(tmp_path / "submit")) == [
        *(f"source: {step}" for step in source), *commit, "reply", *(f"pcm: {step}" for step in pcm), *commit
    ]  # fmt: skip
    assert steps(daemon, calls(tmp_path / "cancel")) == [*commit, "reply"]
    forgotten = steps(daemon, calls(tmp_path / "forget"))
    assert forgotten[:2] == commit
    assert set(forgotten[2:]) == {"unlink", "reply"}, "in either order: threads of their own"


# --- what is left ---

_HELPERS = ("copier", "decoder")


def rows(daemon: Daemon, sql: str) -> list[Any]:
    """Ask the database from outside."""
    with closing(sqlite3.connect(f"file:{daemon.state_dir}/whisperd.sqlite3?mode=ro", uri=True)) as db:
        return db.execute(sql).fetchall()


def folders(daemon: Daemon) -> set[str]:
    return {path.name for path in (daemon.state_dir / "spool").iterdir()}


def check_spool(daemon: Daemon) -> None:
    """Every folder has a row and every row its folder, with a source and nothing half done in it."""

    def agree() -> bool:
        named = {name for (name,) in rows(daemon, "SELECT folder FROM runs WHERE folder IS NOT NULL")}
        files = {path.name for path in files_in(daemon.state_dir / "spool")}
        return named == folders(daemon) and files <= {"source", "audio.pcm"}

    wait_until(agree, message="folders and rows agree")


def ended(daemon: Daemon) -> int:
    """Return the exit code of a daemon that has ended."""
    assert daemon.process is not None
    code = daemon.process.wait(30)
    daemon.process = None
    return code


def end_all(client: RawClient) -> None:
    """Cancel every job, and see that each tells its end once."""
    for job in client.call("jobs")["jobs"]:
        client.call("cancel", job=job["id"])
        number = client.send("subscribe", job=job["id"])
        last = client.reply(number)["result"]["last_seq"]
        events = [client.receive() for _ in range(last)]
        assert [event["event"] for event in events].count("end") == 1
        assert events[-1]["event"] == "end"
        client.call("forget", job=job["id"])


@pytest.fixture(scope="module")
def hardened() -> Iterator[Daemon]:
    """A daemon whose helpers are killed again and again."""
    with running_daemon(model=NO_MODEL, helper_backoff_s=0.05, copiers=1, decoders=1) as daemon:
        yield daemon


@pytest.mark.parametrize(
    ("helper", "call", "nth"),
    [
        ("copier", "mkdir", 1),  # before anything
        ("copier", "write", 1),  # an empty file
        ("copier", "fsync", 1),  # written, not on the disk
        ("copier", "fsync", 2),  # its folder is not
        ("copier", "rename", 1),
        ("copier", "fsync", 3),  # renamed
        ("copier", "sendto", 1),  # all done, and not told
        ("decoder", "write", 1),
        ("decoder", "fsync", 1),
        ("decoder", "rename", 1),
        ("decoder", "fsync", 2),
        ("decoder", "sendto", 1),
    ],
)
def test_a_helper_that_is_killed_at_a_step_costs_nothing(
    hardened: Daemon, recording: Callable[..., Path], tmp_path: Path, helper: str, call: str, nth: int
) -> None:
    (victim,) = wait_until(lambda: hardened.helpers(f"whisperd.audio.{helper}"))
    with hardened.client() as client:
        kill = f"inject={call}:signal=SIGKILL:when={nth}"
        with traced(victim.pid, tmp_path / "trace", "-e", f"trace={call}", "-e", kill):
            job = submit(client, recording(), key=f"{helper}-{call}-{nth}")
            wait_until(lambda: client.call("result", job=job["id"])["job"]["audio_s"])
        assert not victim.is_running(), "it was killed, or this test shows nothing"
        assert [row["id"] for row in client.call("jobs")["jobs"]] == [job["id"]]
        check_spool(hardened)
        end_all(client)
        check_spool(hardened)


@pytest.mark.parametrize(
    ("call", "nth", "kept"),
    [
        ("sendmsg", 1, False),  # before the copy is ordered
        ("pwrite64", 1, False),  # copied, before the first page of the commit
        ("pwrite64", 6, False),  # some pages
        ("fdatasync", 1, False),  # all pages, and not on the disk: kill -9 leaves them to the kernel
        ("sendmsg", 2, True),  # committed, not acknowledged
        ("fdatasync", 2, True),  # acknowledged; the decoder's word is being committed
    ],
)
def test_a_daemon_that_is_killed_at_a_step_keeps_what_it_acknowledged(
    make_daemon: Callable[..., Daemon],
    recording: Callable[..., Path],
    tmp_path: Path,
    call: str,
    nth: int,
    kept: bool,
) -> None:
    daemon = make_daemon(model=NO_MODEL)
    daemon.start()
    path, database = recording(), daemon.state_dir / "whisperd.sqlite3"
    unfolded = database.stat().st_mtime_ns
    with daemon.client() as client:
        before = submit(client, recording(), key="before")
        wait_until(lambda: "audio.pcm" in {path.name for path in files_in(daemon.state_dir)})
        wait_until(lambda: client.call("result", job=before["id"])["job"]["audio_s"])
        # The log is folded after ten commits. Let it be so now: its calls would be counted among those of the submit.
        wait_until(lambda: client.call("jobs") and database.stat().st_mtime_ns != unfolded)
        client.call("jobs")  # the store thread is done with it
        helpers = daemon.children()
        acknowledged = None
        kill = f"inject={call}:signal=SIGKILL:when={nth}"
        with traced(daemon.pid, tmp_path / "trace", "-e", f"trace={call}", "-e", kill):
            with suppress(EOFError, OSError):
                acknowledged = submit(client, path, key="at")
            wait_for_end(daemon.pid)
        assert ended(daemon) == -9
    assert not psutil.wait_procs(helpers, timeout=5)[1], "no helper outlives its daemon"
    daemon.start()
    with daemon.client() as client:
        check_spool(daemon)
        numbers = [job["id"] for job in client.call("jobs")["jobs"]]
        assert before["id"] in numbers
        assert acknowledged is None or acknowledged["id"] in numbers
        assert len(numbers) == 2 if kept else len(numbers) <= 2
        again = submit(client, path, key="at")
        assert acknowledged is None or again["id"] == acknowledged["id"]
        assert len(client.call("jobs")["jobs"]) == 2, "the key is one job, whether it was acknowledged or not"
        end_all(client)
        check_spool(daemon)


@pytest.mark.parametrize(("call", "nth"), [("fdatasync", 1), ("sendmsg", 1), ("unlink,unlinkat", 1), ("rmdir", 1)])
def test_a_daemon_that_is_killed_while_it_forgets_leaves_all_or_nothing(
    make_daemon: Callable[..., Daemon], recording: Callable[..., Path], tmp_path: Path, call: str, nth: int
) -> None:
    daemon = make_daemon(model=NO_MODEL)
    daemon.start()
    with daemon.client() as client:
        job = submit(client, recording(), key="k")
        wait_until(lambda: client.call("result", job=job["id"])["job"]["audio_s"])
        client.call("cancel", job=job["id"])
        kill = f"inject={call}:signal=SIGKILL:when={nth}"
        with traced(daemon.pid, tmp_path / "trace", "-e", f"trace={call}", "-e", kill):
            with suppress(EOFError, OSError):
                client.call("forget", job=job["id"])
            wait_for_end(daemon.pid)
        assert ended(daemon) == -9
    daemon.start()
    with daemon.client() as client:
        check_spool(daemon)
        assert len(client.call("jobs")["jobs"]) == len(rows(daemon, "SELECT 1 FROM keys")) == len(folders(daemon))


def test_a_daemon_that_is_killed_after_a_transcript_was_stored_ends_its_job_once(
    make_daemon: Callable[..., Daemon], micro: Path, recording: Callable[..., Path], tmp_path: Path
) -> None:
    """After the commit of the end, before its audio is deleted."""
    daemon = make_daemon(model=str(micro))
    daemon.start(ready=True)
    with daemon.client() as client:
        kill = "inject=unlink,unlinkat:signal=SIGKILL:when=1"
        with traced(daemon.pid, tmp_path / "trace", "-e", "trace=unlink,unlinkat", "-e", kill):
            job = submit(client, recording())
            wait_for_end(daemon.pid)
        assert ended(daemon) == -9
    daemon.start()
    with daemon.client() as client:
        answer = client.call("result", job=job["id"])
        assert answer["job"]["state"] == "done"
        assert answer["transcript"]["segments"]
        check_spool(daemon)
        assert not folders(daemon)
        end_all(client)


def test_a_daemon_that_is_killed_while_it_takes_a_download_over_downloads_anew(
    make_daemon: Callable[..., Daemon], recording: Callable[..., Path], tmp_path: Path
) -> None:
    daemon = make_daemon(model=NO_MODEL, fetch_allow_private=True, fetch_extractors=["generic"])
    path = recording()
    with serving(path) as server:
        # Before the name in the spool, and after it; before the rows are on the disk.
        for call, nth in (("rename,renameat,renameat2", 1), ("fsync", 1), ("fdatasync", 2)):
            daemon.start()
            with daemon.client() as client:
                client.call("pause")
                client.call("submit", source={"kind": "url", "url": server.url(path.name)}, fresh=True)
                kill = f"inject={call}:signal=SIGKILL:when={nth}"
                with traced(daemon.pid, tmp_path / "trace", "-e", f"trace={call}", "-e", kill):
                    with suppress(EOFError, OSError):
                        client.call("resume")
                    wait_for_end(daemon.pid)
                assert ended(daemon) == -9
        daemon.start()
        with daemon.client() as client:
            wait_until(lambda: [bool(job["audio_s"]) for job in client.call("jobs")["jobs"]] == [True] * 3)
            check_spool(daemon)
            end_all(client)
            check_spool(daemon)
