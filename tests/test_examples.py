"""The two programs that started it all, at the same time against one daemon: real yt-dlp, videos on loopback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.media_server import MediaServer, serving
from tests.support import wait_until, write_noise
from tests.video_daemon import VideoDaemon
from whisperctl import Client

EXAMPLES = Path(__file__).parents[1] / "examples"
BACKGROUND = [f"background{n}" for n in range(6)]  # eleven letters: ids
INTERACTIVE = "-nteractive"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MediaServer]:
    with serving(write_noise(tmp_path / "talk.wav", 5)) as server:
        for video in BACKGROUND:
            server.by_name[f"{video}.wav"] = write_noise(tmp_path / "video.wav", 5).read_bytes()
        server.by_name[f"{INTERACTIVE}.wav"] = write_noise(tmp_path / "video.wav", 70).read_bytes()
        yield server


@pytest.fixture
def daemon(micro: Path, server: MediaServer) -> Iterator[VideoDaemon]:
    # Few places: the finder has more videos than are taken at once.
    daemon = VideoDaemon(server, model=str(micro), capacity=4)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()


def start(name: str, daemon: VideoDaemon, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments],
        env=daemon.environment() | {"WHISPERD_SOCKET": str(daemon.socket)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_both_at_once(daemon: VideoDaemon, server: MediaServer, tmp_path: Path) -> None:
    videos, texts = tmp_path / "ids.txt", tmp_path / "texts"
    videos.write_text("\n".join([*BACKGROUND, "not-to-be-h", BACKGROUND[0]]))
    server.refused["not-to-be-h.wav"] = 404
    server.slow.update(f"{video}.wav" for video in BACKGROUND)
    finder = start("auto_discovery", daemon, str(videos), str(texts))
    with Client(daemon.socket) as client:
        wait_until(lambda: len(client.jobs()) >= 3, 30, "the finder has filled its places")

        # While the finder's downloads are under way, somebody wants a transcript now.
        analyzer = start("manual_analyzer", daemon)
        out, err = analyzer.communicate(f"{INTERACTIVE}\n\nno id\n", 120)
        assert analyzer.returncode == 1
        assert "11 characters" in err
        (job,) = (job for job in client.jobs() if job.source["id"] == INTERACTIVE)
        segments = client.result(job.id).require().segments
        assert len(segments) > 3
        heard = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("  ")]
        first = out.splitlines()[0].removeprefix("video id: ").split(maxsplit=1)[1]
        assert [first, *heard] == [segment.text.strip() for segment in segments]
        assert not list(texts.iterdir()), "nothing of the background is done yet"

        # Killed in the middle, and started again.
        finder.kill()
        finder.communicate()
        server.go_on.set()
        again = start("auto_discovery", daemon, str(videos), str(texts))
        printed, errors = again.communicate(timeout=120)
        assert (again.returncode, errors) == (0, "")
        wanted = {*(f"{video}.txt" for video in BACKGROUND), "not-to-be-h.failed"}
        assert set(printed.split()) == {path.name for path in texts.iterdir()} == wanted
        assert (texts / "not-to-be-h.failed").read_text().startswith("fetch_unavailable: ")
        for video in BACKGROUND:
            # One, however often the finder was started.
            (job,) = (job for job in client.jobs(limit=200) if job.source["id"] == video)
            assert (texts / f"{video}.txt").read_text() == client.result(job.id).text != ""

        # Nothing is left to do, but what failed is tried again once its mark is gone.
        (texts / "not-to-be-h.failed").unlink()
        del server.refused["not-to-be-h.wav"]
        last = start("auto_discovery", daemon, str(videos), str(texts))
        assert last.communicate(timeout=120) == ("not-to-be-h.txt\n", "")
