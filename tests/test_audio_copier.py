"""The copier: a descriptor into the spool, whole and durable or not at all."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helper_process import HelperProcess
from tests.support import wait_until
from whisperd.protocol.helper_messages import Cancel, Copied, CopyIn, Failed

MAX_BYTES = 2**40


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


def settings(spool: Path, *, max_source_bytes: int = MAX_BYTES) -> dict[str, Any]:
    return {"spool": str(spool), "max_source_bytes": max_source_bytes, "min_free_bytes": 0}


@pytest.fixture
def copier(spool: Path) -> Iterator[HelperProcess]:
    with HelperProcess("whisperd.audio.copier", settings(spool)) as helper:
        yield helper


def copy(copier: HelperProcess, fd: int, *, run: int = 1, folder: str = "run") -> Copied | Failed:
    copier.send(CopyIn(run=run, generation=1, folder=folder), [fd])
    answer = copier.answer(Copied, Failed)
    assert (answer.run, answer.generation) == (run, 1)
    return answer


def open_memory(content: bytes) -> int:
    fd = os.memfd_create("recording")
    os.write(fd, content)
    return fd


@pytest.mark.parametrize("size_bytes", [0, 1, 2**20, 3 * 2**20 + 17, 20 * 2**20 + 1])
def test_a_copy_is_whole_and_hashed(copier: HelperProcess, spool: Path, tmp_path: Path, size_bytes: int) -> None:
    content = os.urandom(size_bytes)
    (tmp_path / "talk.wav").write_bytes(content)
    with open(tmp_path / "talk.wav", "rb") as file:
        answer = copy(copier, file.fileno())
    digest = hashlib.sha256(content).hexdigest()
    assert answer == Copied(run=1, generation=1, sha256=digest, size_bytes=size_bytes)
    assert [entry.name for entry in spool.iterdir()] == ["run"]
    source = spool / "run" / "source"
    assert source.read_bytes() == content
    assert source.stat().st_mode & 0o777 == 0o600
    assert source.parent.stat().st_mode & 0o777 == 0o700


def test_the_clients_offset_is_neither_used_nor_moved(copier: HelperProcess, spool: Path) -> None:
    fd = open_memory(b"from the very first byte")  # the offset stands at the end
    os.lseek(fd, 5, os.SEEK_SET)
    copy(copier, fd)
    assert (spool / "run" / "source").read_bytes() == b"from the very first byte"
    assert os.lseek(fd, 0, os.SEEK_CUR) == 5
    os.close(fd)


def test_no_descriptor_stays_open(copier: HelperProcess) -> None:
    fd = open_memory(b"x")
    before = copier.open_descriptors
    for number in range(5):
        copy(copier, fd, folder=f"run{number}")
    os.close(fd)
    # The answer leaves before the descriptor is closed.
    wait_until(lambda: copier.open_descriptors == before)


def test_too_large_leaves_nothing(spool: Path) -> None:
    with HelperProcess("whisperd.audio.copier", settings(spool, max_source_bytes=2**20)) as copier:
        fits, too_large = open_memory(bytes(2**20)), open_memory(bytes(2**20 + 1))
        assert isinstance(copy(copier, fits, folder="fits"), Copied)
        answer = copy(copier, too_large, run=2, folder="large")
        os.close(fits)
        os.close(too_large)
    assert isinstance(answer, Failed)
    assert answer.code == "too_large"
    assert "max_source_bytes" in answer.message
    assert [entry.name for entry in spool.iterdir()] == ["fits"]


def test_a_full_disk_leaves_nothing_and_the_next_copy_works(copier: HelperProcess, spool: Path) -> None:
    # The kernel tells a file size limit (EFBIG) as it tells a full disk (ENOSPC), and no small disk is needed.
    _, hard = resource.prlimit(copier.process.pid, resource.RLIMIT_FSIZE)
    fd = open_memory(bytes(5 * 2**20))
    resource.prlimit(copier.process.pid, resource.RLIMIT_FSIZE, (2**21, hard))
    answer = copy(copier, fd)
    assert isinstance(answer, Failed)
    assert answer.code == "storage_full"
    assert list(spool.iterdir()) == []
    resource.prlimit(copier.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert isinstance(copy(copier, fd, run=2), Copied)
    os.close(fd)


def test_what_cannot_be_read_is_bad_audio(copier: HelperProcess, spool: Path, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)  # the daemon refuses a folder; here it stands for a disk that fails
    answer = copy(copier, fd)
    os.close(fd)
    assert isinstance(answer, Failed)
    assert answer.code == "bad_audio"
    assert "cannot be read" in answer.message
    assert list(spool.iterdir()) == []


def test_cancel_stops_a_copy_and_removes_it(copier: HelperProcess, spool: Path) -> None:
    fd = os.memfd_create("endless")
    os.ftruncate(fd, 2**39)  # without the cancel this would fill any disk
    copier.send(CopyIn(run=7, generation=2, folder="run"), [fd])
    os.close(fd)
    copier.send(Cancel(run=7, generation=1))  # another start of the same run: not this one
    copier.send(Cancel(run=7, generation=2))
    answer = copier.answer(Copied, Failed)
    assert answer == Failed(run=7, generation=2, code="cancelled", message="cancelled")
    assert list(spool.iterdir()) == []


def test_a_cancel_that_comes_too_late_means_nothing(copier: HelperProcess) -> None:
    fd = open_memory(b"words")
    copier.send(Cancel(run=1, generation=1))
    assert isinstance(copy(copier, fd, run=2), Copied)
    os.close(fd)


def test_what_a_killed_copier_left_does_not_hinder_the_next(copier: HelperProcess, spool: Path) -> None:
    for name in ("run.partial", "run"):
        (spool / name).mkdir()
        (spool / name / "source").write_bytes(b"half")
    fd = open_memory(b"whole")
    copy(copier, fd)
    os.close(fd)
    assert [entry.name for entry in spool.iterdir()] == ["run"]
    assert (spool / "run" / "source").read_bytes() == b"whole"


def test_the_helper_ends_with_its_daemon(spool: Path) -> None:
    with HelperProcess("whisperd.audio.copier", settings(spool)) as copier:
        assert copier.hello.role == "copier"
        assert copier.close() == 0


def test_the_copier_loads_no_ffmpeg() -> None:
    code = "import sys, whisperd.audio.copier; sys.exit('av' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_copier_without_memory_ends_and_does_not_fail_one_order_after_the_other(copier: HelperProcess) -> None:
    with os.fdopen(open_memory(b"x" * 100)) as file:
        assert isinstance(copy(copier, file.fileno()), Copied)
        resource.prlimit(copier.process.pid, resource.RLIMIT_AS, (2**20, 2**20))
        copier.send(CopyIn(run=2, generation=1, folder="second"), [file.fileno()])
        with pytest.raises(EOFError):
            copier.answer(Copied, Failed)
