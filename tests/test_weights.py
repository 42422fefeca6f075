"""One model's file at a time, by the code of the fetch helper: resumed, checked, and refused with a reason."""

from __future__ import annotations

import fcntl
import hashlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.media_server import MediaServer, serving
from tests.support import write_noise
from whisperd.fetch.download import Settings
from whisperd.fetch.explain import FetchError
from whisperd.fetch.guard import Guard, is_anything
from whisperd.fetch.weights import WeightsFetcher
from whisperd.protocol.catalogue import CHECKPOINTS, Checkpoint, catalogue

HALF_S = 64  # of 32,000 bytes each: pieces of this size are worth to be gone on with at once


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MediaServer]:
    with serving(write_noise(tmp_path_factory.mktemp("served") / "any", 2 * HALF_S)) as server:
        yield server


@pytest.fixture(autouse=True)
def afresh(server: MediaServer) -> None:
    server.parts.clear()
    server.asked.clear()


class Case:
    """A cache folder, and the model that the server has, by the name `ours`."""

    def __init__(self, folder: Path, server: MediaServer) -> None:
        self.server, self.cache_dir = server, folder / "cache"
        self.wanted = Checkpoint(file_name="ours.pt", sha256=hashlib.sha256(server.content).hexdigest())
        self.home = self.wanted.home(self.cache_dir)
        self.partial = self.home.with_name("ours.pt.partial")
        self.home.parent.mkdir(parents=True)
        self.environ = {"HOME": str(folder)}

    def fetch(self, how: str = "", **settings: Any) -> Path:
        defaults: dict[str, Any] = {
            "spool": self.cache_dir,
            "cache_dir": self.cache_dir,
            "fetch_extractors": [],
            "fetch_cookies": "",
            "fetch_timeout_s": 10,
            "fetch_limit_s": 10,
            "max_source_bytes": 10**9,
            "max_audio_s": 60,
            "min_free_bytes": 0,
            "models_url": self.server.url(how),
        }
        fetcher = WeightsFetcher(Settings(**defaults | settings), Guard(allowed=is_anything), self.environ)
        return fetcher.fetch(self.wanted, self.look)

    def look(self, done: float, total: float) -> None:
        """The download is wanted."""

    def failure(self, how: str, **settings: Any) -> FetchError:
        with pytest.raises(FetchError) as caught:
            self.fetch(how, **settings)
        assert not self.home.exists()
        return caught.value

    def is_whole(self) -> bool:
        return self.home.read_bytes() == self.server.content and os.listdir(self.home.parent) == ["ours.pt"]


@pytest.fixture
def case(tmp_path: Path, server: MediaServer) -> Case:
    return Case(tmp_path, server)


@pytest.mark.parametrize("how", ["", "cut", "whole"])
def test_a_file_arrives_whole_under_its_name(case: Case, how: str) -> None:
    assert case.fetch(how) == case.home
    assert case.is_whole()
    first, *others = case.server.parts
    assert (first, len(others)) == (0, how == "cut")
    assert all(0 < other <= len(case.server.content) // 2 for other in others)


@pytest.mark.parametrize(("how", "parts"), [("", [100_000]), ("whole", [0])])
def test_what_an_earlier_try_left_is_gone_on_with(case: Case, how: str, parts: list[int]) -> None:
    case.partial.write_bytes(case.server.content[:100_000])
    case.fetch(how)
    assert case.is_whole()
    assert case.server.parts == parts


def test_a_partial_file_that_is_whole_needs_nothing(case: Case) -> None:
    case.partial.write_bytes(case.server.content)
    case.fetch()
    assert case.is_whole()


@pytest.mark.parametrize("left", [b"damaged" * 1000, b"too long" * 10**6], ids=["damaged", "too long"])
def test_a_damaged_remainder_is_fetched_anew_once(case: Case, left: bytes) -> None:
    case.partial.write_bytes(left)
    case.fetch()
    assert case.is_whole()
    assert case.server.parts[-1] == 0


def test_a_server_that_sends_something_else_is_asked_once(case: Case) -> None:
    case.wanted = Checkpoint(file_name="ours.pt", sha256="0" * 64)
    error = case.failure("")
    assert (error.code, error.transient) == ("fetch_failed", False)
    assert "models_url" in error.message
    assert case.server.parts == [0]
    assert case.partial.stat().st_size == 0, "nothing of it is gone on with"


@pytest.mark.parametrize(
    ("how", "code", "transient"),
    [
        ("status/404", "fetch_unavailable", False),
        ("status/403", "fetch_blocked", False),
        ("status/500", "fetch_failed", True),
        ("limited/7", "fetch_rate_limited", True),
        ("always-cut", "fetch_failed", True),
    ],
)
def test_what_a_server_refuses(case: Case, how: str, code: str, transient: bool) -> None:
    error = case.failure(how)
    assert (error.code, error.transient) == (code, transient)
    assert error.wait_s == (7 if how == "limited/7" else 0)
    assert case.wanted.file_name in error.message


def test_a_mirrors_password_is_sent_and_told_nobody(case: Case) -> None:
    url = case.server.url("status/404").replace("//", "//anna:secret@")
    error = case.failure("", models_url=url)
    assert error.code == "fetch_unavailable"
    assert "127.0.0.1" in error.message
    assert "secret" not in error.message


def test_no_network_is_for_the_moment(case: Case) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    error = case.failure("", models_url=f"http://127.0.0.1:{port}")
    assert (error.code, error.transient) == ("fetch_failed", True)
    assert "check the network" in error.message


def test_a_folder_that_cannot_be_written_is_not_the_networks_fault(case: Case) -> None:
    case.partial.mkdir()
    error = case.failure("")
    assert (error.code, error.transient) == ("fetch_failed", False)
    assert "cache folder" in error.message


def test_a_disk_without_room_is_told_before_anything_is_written(case: Case) -> None:
    error = case.failure("", min_free_bytes=2**60)
    assert (error.code, error.transient) == ("storage_full", False)
    assert "make room" in error.message


def test_a_disk_that_becomes_full_is_given_back_what_was_written(case: Case) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))  # what a full disk does to a write, or nearly
    try:
        error = case.failure("")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.code == "storage_full"
    assert not case.partial.exists()


def test_a_file_that_is_too_large_is_refused(case: Case) -> None:
    assert case.failure("", max_source_bytes=1000).code == "too_large"


def test_two_processes_do_not_write_one_file(case: Case) -> None:
    with case.partial.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        error = case.failure("")
    assert (error.transient, case.server.parts) == (True, [])


def test_a_model_of_openai_whispers_own_folder_is_used_where_it_is(case: Case) -> None:
    theirs = Path(case.environ["HOME"], ".cache", "whisper", "ours.pt")
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(case.server.content)
    assert case.fetch() == theirs
    theirs.write_bytes(b"half a download")
    assert case.fetch() == case.home
    case.home.write_bytes(b"damaged since")
    assert case.fetch() == case.home
    assert case.is_whole()
    assert case.server.parts == [0, 0]


def test_what_ends_a_download_leaves_what_has_arrived(case: Case) -> None:
    def look(done: float, total: float) -> None:
        if done >= 2 * 2**20:
            raise FetchError("cancelled", "cancelled")

    case.look = look  # type: ignore[method-assign]
    assert case.failure("").code == "cancelled"
    assert case.partial.read_bytes() == case.server.content[: 2 * 2**20]


GUARDED = """
import sys
from pathlib import Path
from whisperd.fetch.download import Settings
from whisperd.fetch.guard import Guard
from whisperd.fetch.weights import WeightsFetcher
from whisperd.protocol.catalogue import Checkpoint
from whisperd.protocol.errors import WhisperdError

guard = Guard(allowed=lambda host: host == "127.0.0.1")
guard.install()
settings = Settings(
    spool=Path(), cache_dir=Path(sys.argv[1]), fetch_extractors=[], fetch_cookies="", fetch_timeout_s=20,
    fetch_limit_s=60, max_source_bytes=10**9, max_audio_s=3600, min_free_bytes=0, models_url=sys.argv[2],
)
try:
    WeightsFetcher(settings, guard, {}).fetch(
        Checkpoint(file_name="x.pt", sha256="0" * 64), lambda done, total: None
    )
except WhisperdError as error:
    print(error.code, error.message)
"""


def test_a_redirect_into_the_house_is_refused(case: Case) -> None:
    command = [sys.executable, "-c", GUARDED, str(case.cache_dir), case.server.url("redirect/127.0.0.2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("forbidden ")
    assert "127.0.0.2" in done.stdout


def test_names_of_ones_own() -> None:
    sha256 = "0123456789abcdef" * 4
    assert catalogue([f"our-model.2={sha256}"])["our-model.2"].file_name == "our-model.2.pt"
    assert catalogue([]) == CHECKPOINTS
    for wrong in ("our", f"../our={sha256}", f"our={sha256[1:]}", f"our={sha256.upper()}", f"small={sha256}"):
        with pytest.raises(ValueError, match=r"our|small"):
            catalogue([wrong])
