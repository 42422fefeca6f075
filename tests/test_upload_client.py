"""Client and command line behind a forwarded socket: descriptors get lost on the way, so they upload by themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import NO_MODEL, PLAIN_OPTIONS, Daemon, running_daemon, submit, wait_until, write_noise
from tests.test_cli_terminal import Terminal
from whisperctl import Client, SourceUnreadable, WhisperdError
from whisperd.protocol.messages import MAX_CHUNK_BYTES

FORWARDING = Path(__file__).with_name("forwarding.py")


@pytest.fixture(scope="module")
def shared(micro: Path) -> Iterator[Daemon]:
    """One daemon for the tests that leave it as they found it."""
    with running_daemon(model=str(micro), ready=True) as daemon:
        yield daemon


@contextmanager
def forwarding(daemon: Daemon, *, cut_after_bytes: int | None = None) -> Iterator[Path]:
    """Forward a socket to a daemon's, as `ssh -L` does, and give its path."""
    path = daemon.folder / f"f{os.urandom(3).hex()}"
    cut = [] if cut_after_bytes is None else [str(cut_after_bytes)]
    process = subprocess.Popen([sys.executable, str(FORWARDING), str(path), str(daemon.socket), *cut])
    try:
        wait_until(path.exists, message="the forwarder listens")
        yield path
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def forwarded(shared: Daemon) -> Iterator[Path]:
    with forwarding(shared) as path:
        yield path


def test_a_recording_gets_through_where_its_descriptor_does_not(
    shared: Daemon, forwarded: Path, recording: Callable[..., Path]
) -> None:
    path = recording(20)
    arrived: list[tuple[int, int | None]] = []
    with Client(forwarded) as far, Client(shared.socket) as near:
        job = far.submit(path, on_upload=lambda *sent: arrived.append(sent), **PLAIN_OPTIONS)
        size_bytes = path.stat().st_size
        assert job.source == {"kind": "upload", "name": path.name, "size_bytes": size_bytes}
        assert [sent for sent, _ in arrived] == [*range(MAX_CHUNK_BYTES, size_bytes, MAX_CHUNK_BYTES), size_bytes]
        text = far.result(job.id, wait=True).text
        assert text == near.transcribe(path, **PLAIN_OPTIONS).text != ""
        assert far.stats()["cache_hits"] == 1, "the same bytes, the same work"


def test_every_kind_of_source_gets_through(forwarded: Path, recording: Callable[..., Path]) -> None:
    path = recording(3)
    with Client(forwarded) as far, path.open("rb") as file:
        reader, writer = os.pipe()
        threading.Thread(target=lambda: (os.write(writer, path.read_bytes()[:50_000]), os.close(writer))).start()
        jobs = [far.submit(source, **PLAIN_OPTIONS) for source in (path, file, file.fileno(), reader)]
        os.close(reader)
        assert len({far.result(job.id, wait=True).text for job in jobs[:3]}) == 1
        assert jobs[3].source["size_bytes"] == 50_000


def test_several_at_once_share_a_client(forwarded: Path, recording: Callable[..., Path]) -> None:
    paths = [recording(10) for _ in range(4)]
    texts: dict[Path, str] = {}
    with Client(forwarded) as far:

        def work(path: Path) -> None:
            texts[path] = far.transcribe(path, **PLAIN_OPTIONS).text

        threads = [threading.Thread(target=work, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert all(far.transcribe(path, **PLAIN_OPTIONS).text == texts[path] != "" for path in paths)


def test_an_upload_that_is_cut_off_begins_anew_and_is_one_job(shared: Daemon, recording: Callable[..., Path]) -> None:
    path = recording(120)
    size_bytes = path.stat().st_size
    arrived: list[int] = []
    with forwarding(shared, cut_after_bytes=size_bytes // 2) as socket, Client(socket) as far:
        before = [job.id for job in far.jobs()]
        job = far.submit(path, key="cut in the middle", on_upload=lambda sent, _: arrived.append(sent), **PLAIN_OPTIONS)
        assert arrived.count(MAX_CHUNK_BYTES) == 2, "it was cut, and began anew"
        assert far.result(job.id, wait=True).text
        assert [job.id for job in far.jobs() if job.id not in before] == [job.id]
        again = far.submit(path, key="cut in the middle", **PLAIN_OPTIONS)
        assert again.id == job.id
    wait_until(lambda: not list((shared.state_dir / "spool").iterdir()), message="nothing stays in the spool")


def test_an_attached_upload_is_held_by_its_client(forwarded: Path, recording: Callable[..., Path]) -> None:
    with Client(forwarded) as watcher:
        with Client(forwarded) as far:
            job = far.submit(recording(600), attached=True, **PLAIN_OPTIONS)
            wait_until(lambda: watcher.job(job.id).state == "running")
        assert watcher.result(job.id, wait=True).job.state == "cancelled"


def test_attached_uploads_outlive_their_daemon(tmp_path: Path) -> None:
    with running_daemon(model=NO_MODEL, attach_grace_s=5) as daemon, forwarding(daemon) as socket:
        with Client(socket) as far, Client(daemon.socket) as watcher, daemon.client() as leaves:
            paths = [write_noise(tmp_path / f"{number}.wav", 0.1) for number in range(4)]
            held = [far.submit(path, attached=True, **PLAIN_OPTIONS).id for path in paths[:3]]
            lost = submit(leaves, paths[3], attached=True)["id"]
            daemon.kill()
            daemon.start()
            assert watcher.result(lost, wait=True).job.state == "cancelled", "its holder did not come back"
            assert [watcher.job(job).state for job in held] == ["queued"] * 3
        with Client(daemon.socket) as watcher:
            assert [watcher.result(job, wait=True).job.state for job in held] == ["cancelled"] * 3, "far has left"


def test_a_refusal_is_the_daemons_own_word(forwarded: Path, tmp_path: Path) -> None:
    talk = tmp_path / "talk"
    talk.write_bytes(bytes(200_000))
    with Client(forwarded) as far:
        with pytest.raises(WhisperdError) as caught:
            far.submit(talk, beam_size=1000)
        assert caught.value.code == "bad_request"
        far.submit(talk, key="one", **PLAIN_OPTIONS)
        with pytest.raises(WhisperdError) as caught:
            far.submit(talk, key="one", language="en")
        assert caught.value.code == "key_conflict"


def test_a_file_that_shrinks_while_it_is_sent_is_said(forwarded: Path, tmp_path: Path) -> None:
    talk = tmp_path / "talk"
    talk.write_bytes(bytes(3_000_000))
    with Client(forwarded) as far, pytest.raises(SourceUnreadable, match="became shorter"):
        far.submit(talk, on_upload=lambda *sent: os.truncate(talk, 1000))
    with Client(forwarded) as far:
        wait_until(lambda: far.stats()["lanes"]["upload"]["active"] == 0)


def test_the_command_line_uploads_by_itself(shared: Daemon, forwarded: Path, recording: Callable[..., Path]) -> None:
    path = recording(3)
    options = ("--language", "en", "--temperature", "0", "--option", "condition_on_previous_text=false")
    near = shared.whisperctl("transcribe", str(path), *options)
    far = shared.whisperctl("--socket", str(forwarded), "transcribe", str(path), *options)
    assert (far.returncode, far.stdout) == (0, near.stdout)
    piped = shared.whisperctl(
        "--socket", str(forwarded), "transcribe", "-", "--fresh", *options, stdin=path.read_bytes()
    )
    assert (piped.returncode, piped.stdout) == (0, near.stdout)
    several = shared.whisperctl("--socket", str(forwarded), "submit", *(str(recording(1)) for _ in range(3)))
    assert (several.returncode, len(several.stdout.split())) == (0, 3)


def test_a_terminal_shows_how_far_an_upload_is(forwarded: Path, recording: Callable[..., Path]) -> None:
    path = recording(60)
    terminal = Terminal(forwarded, "submit", str(path), columns=200)
    assert terminal.end() == 0
    shown = terminal.bytes.decode()
    assert f"copying {path} (1.9 MB)" in shown
    assert f"copying {path} (1.9 MB, 51 %)" in shown
    assert len(terminal.screen) == 1, "the id alone stays"
