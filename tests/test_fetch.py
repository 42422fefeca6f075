"""The fetch helper's rules, one by one: what is refused, what errors mean, whose cookies are read."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from yt_dlp.utils import DownloadError, ExtractorError, GeoRestrictedError

from tests.media_server import serving
from tests.support import write_noise
from whisperd.fetch.download import Settings, Watch, address_of, check_extractor, read_cookies
from whisperd.fetch.explain import explain
from whisperd.fetch.guard import is_public
from whisperd.fetch.runtime import describe, find_programs
from whisperd.protocol.errors import WhisperdError

YOUTUBE = ["youtube"]

# What yt-dlp (2026.10) says, word for word, with the names of videos taken out.
SAID = [
    ("Sign in to confirm you’re not a bot. Use --cookies-from-browser or --cookies", "fetch_blocked", False),
    ("Sign in to confirm your age. This video may be inappropriate for some users.", "fetch_age_restricted", False),
    ("Private video. Sign in if you've been granted access to this video", "fetch_private", False),
    ("Join this channel to get access to members-only content like this video", "fetch_private", False),
    ("This video is available to this channel's members on level: Fan (or any higher level)", "fetch_private", False),
    ("This video is only available to Music Premium members", "fetch_private", False),
    ("The uploader has not made this video available in your country", "fetch_unavailable", False),
    ("This live event will begin in 3 hours.", "fetch_unavailable", False),
    ("Premieres in 5 days", "fetch_unavailable", False),
    ("Video unavailable. This video has been removed by the uploader", "fetch_unavailable", False),
    ("This video is DRM protected", "fetch_unavailable", False),
    (
        "Video unavailable. This content isn't available, try again later. The current session has been rate-limited "
        "by YouTube for up to an hour.",
        "fetch_rate_limited",
        True,
    ),
    ("All player responses are invalid. Your IP is likely being blocked by Youtube", "fetch_blocked", False),
    ("Requested format is not available. Use --list-formats for a list of available formats", "fetch_failed", False),
    ("This video is only available for registered users. Use --username and --password", "fetch_private", False),
    ("Got HTTP Error 403 caused by Cloudflare anti-bot challenge", "fetch_blocked", False),
    ("Unsupported URL: https://example.org/", "fetch_unavailable", False),
    ("The extracted extension ('html') is unusual and will be skipped for safety", "fetch_unavailable", False),
    ("Unable to download webpage: The read operation timed out", "fetch_failed", True),
    ("Unable to download API page: Failed to resolve host (Name or service not known)", "fetch_failed", True),
    ("unable to write data: [Errno 28] No space left on device", "storage_full", True),
    ("Something that nobody has seen yet", "fetch_failed", False),
]


@pytest.mark.parametrize(("said", "code", "transient"), SAID, ids=lambda value: str(value)[:30])
def test_what_yt_dlp_says_becomes_a_code_and_advice(said: str, code: str, transient: bool) -> None:
    cause = ExtractorError(said, expected=True, video_id="dQw4w9WgXcQ", ie="youtube")
    error = explain(DownloadError(f"ERROR: {cause}", (type(cause), cause, None)))
    assert (error.code, error.transient) == (code, transient)
    assert not error.message.startswith(("ERROR", "["))
    assert len(error.message) > 40, "it says what to do"
    assert "--" not in error.message, "yt-dlp's options are not ours"
    assert (error.wait_s > 0) == (code == "fetch_rate_limited")


def test_a_defect_of_an_extractor_asks_for_an_upgrade() -> None:
    error = explain(DownloadError(f"ERROR: {ExtractorError('Unable to extract title')}"))
    assert error.code == "fetch_failed"
    assert "upgrade yt-dlp" in error.message
    assert "report" not in error.message


def test_the_countries_of_a_restriction_are_not_needed() -> None:
    error = explain(GeoRestrictedError("This video is not available from your location", countries=["DE"]))
    assert error.code == "fetch_unavailable"


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("192.168.0.1", False),
        ("172.16.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("localhost", False),
        ("/run/docker.sock", False),
        (b"93.184.216.34", False),
        (None, False),
    ],
)
def test_only_literal_public_addresses_are_public(host: Any, public: bool) -> None:
    assert is_public(host) is public


def refused(source: dict[str, Any], allowed: list[str]) -> tuple[str, str]:
    with pytest.raises(WhisperdError) as caught:
        check_extractor(source, allowed)
    return caught.value.code, caught.value.message


def test_ids_become_addresses_and_may_begin_with_a_dash() -> None:
    source = {"kind": "video", "id": "-bcdefghijk"}
    assert address_of(source) == "https://www.youtube.com/watch?v=-bcdefghijk"
    check_extractor(source, YOUTUBE)
    assert refused(source, ["generic"])[0] == "forbidden", "generic would ask YouTube as well"


def test_extractors_that_are_not_allowed_are_refused_with_another_way() -> None:
    code, message = refused({"kind": "url", "url": "https://example.org/podcast.mp3"}, YOUTUBE)
    assert code == "forbidden"
    assert "whisperctl submit -" in message
    assert "fetch_extractors" in message
    check_extractor({"kind": "url", "url": "https://example.org/podcast.mp3"}, ["youtube", "generic"])
    check_extractor({"kind": "url", "url": "https://youtu.be/dQw4w9WgXcQ"}, YOUTUBE)


def test_a_playlist_is_refused_with_the_command_that_lists_it() -> None:
    url = "https://www.youtube.com/playlist?list=PL0123456789abcdef"
    code, message = refused({"kind": "url", "url": url}, YOUTUBE)
    assert code == "bad_request"
    assert f"yt-dlp --flat-playlist --print url -- '{url}'" in message


def watch(spool: Path, checkpoint: Callable[[float, float], None] = lambda done, total: None, **fields: Any) -> Watch:
    defaults: dict[str, Any] = {
        "spool": spool,
        "cache_dir": spool,
        "fetch_extractors": [],
        "fetch_cookies": "",
        "fetch_timeout_s": 10,
        "fetch_limit_s": 10,
        "max_source_bytes": 1000,
        "max_audio_s": 60,
        "min_free_bytes": 0,
        "models_url": "",
    }
    return Watch(Settings(**defaults | fields), checkpoint, clock=iter(range(0, 100, 8)).__next__)


@pytest.mark.parametrize(
    ("info", "code"),
    [
        ({"is_live": True}, "fetch_unavailable"),
        ({"live_status": "is_upcoming"}, "fetch_unavailable"),
        ({"duration": 61.0}, "too_long"),
        ({"filesize": 1001}, "too_large"),
    ],
)
def test_what_a_site_says_beforehand_may_refuse_it(tmp_path: Path, info: dict[str, Any], code: str) -> None:
    with pytest.raises(WhisperdError) as caught:
        watch(tmp_path).check_video(info)
    assert caught.value.code == code
    watch(tmp_path).check_video({"live_status": "was_live", "duration": 60, "filesize": 1000})


def test_caps_hold_while_bytes_arrive(tmp_path: Path) -> None:
    watched = watch(tmp_path)
    watched.progressed({"downloaded_bytes": 1000})
    with pytest.raises(WhisperdError, match="max_source_bytes"):
        watch(tmp_path).progressed({"downloaded_bytes": 1001})
    with pytest.raises(WhisperdError, match="fetch_limit_s"):
        watched.look()
    with pytest.raises(WhisperdError, match="min_free_bytes"):
        watch(tmp_path, min_free_bytes=2**60).progressed({"downloaded_bytes": 1, "total_bytes": 5})


def test_an_extractor_that_swallows_a_cancel_meets_it_again(tmp_path: Path) -> None:
    said = []

    def checkpoint(done: float, total: float) -> None:
        said.append(done)
        raise WhisperdError("cancelled", "cancelled")

    watched = watch(tmp_path, checkpoint)
    for _ in range(2):
        with pytest.raises(WhisperdError) as caught:
            watched.look()
        assert caught.value.code == "cancelled"
    assert said == [0.0], "the daemon says it once"


def test_cookies_are_a_users_own_and_a_copy(tmp_path: Path) -> None:
    mine = tmp_path / f"{os.geteuid()}.txt"
    mine.write_text("# Netscape HTTP Cookie File\n")
    cookies = read_cookies(str(tmp_path), os.geteuid())
    assert cookies is not None
    cookies.truncate(0)
    assert mine.read_text().startswith("# Netscape")
    assert read_cookies(str(tmp_path), 54321) is None
    assert read_cookies("", os.geteuid()) is None


# The guard cannot be taken off a process again, so it is tried in one of its own: real yt-dlp, real connections.
GUARDED = """
import socket, subprocess, sys
from pathlib import Path
from whisperd.fetch.download import Fetcher, Settings
from whisperd.fetch.guard import Guard
from whisperd.protocol.errors import WhisperdError

spool, url = Path(sys.argv[1]), sys.argv[2]
guard = Guard(allowed=lambda host: host == sys.argv[5], programs=["/bin/true"])
guard.install()
settings = Settings(
    spool=spool, cache_dir=spool / "cache", fetch_extractors=["generic"], fetch_cookies=sys.argv[3],
    fetch_timeout_s=20, fetch_limit_s=60, max_source_bytes=10**9, max_audio_s=3600, min_free_bytes=0,
    models_url="",
)
try:
    found = Fetcher(settings, guard, {}).fetch(
        {"kind": "url", "url": url}, uid=int(sys.argv[4]), folder="folder", checkpoint=lambda done, total: None
    )
    print("fetched", found.size_bytes)
except WhisperdError as error:
    print(error.code, error.message)
subprocess.run(["/bin/true"])
for attempt in (lambda: subprocess.run(["/bin/echo", "no"]), lambda: __import__("os").system("echo no")):
    try:
        attempt()
    except PermissionError:
        print("no program")
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.2", 9))
except WhisperdError as error:
    print("no datagram")
"""


def guarded(spool: Path, url: str, *, cookies: str = "", allowed: str = "127.0.0.1") -> list[str]:
    command = [sys.executable, "-c", GUARDED, str(spool), url, cookies, str(os.geteuid()), allowed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


def test_a_redirect_into_the_house_is_refused_where_it_connects(tmp_path: Path) -> None:
    with serving(write_noise(tmp_path / "talk.wav", 1)) as server:
        first, *others = guarded(tmp_path, server.url("redirect/127.0.0.2/talk.wav"))
        assert first.startswith("forbidden ")
        assert "127.0.0.2" in first
        assert others == ["no program", "no program", "no datagram"]
        assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith("folder")]


def test_a_name_that_points_into_the_house_is_refused(tmp_path: Path) -> None:
    with serving(write_noise(tmp_path / "talk.wav", 1)) as server:
        answer = guarded(tmp_path, f"http://localhost:{server.port}/talk.wav", allowed="localhost")[0]
        assert answer.startswith("forbidden "), "the address counts, not the name"
        assert not server.asked


def test_the_cookie_file_is_byte_for_byte_what_it_was(tmp_path: Path) -> None:
    cookies = tmp_path / "cookies"
    cookies.mkdir()
    jar = cookies / f"{os.geteuid()}.txt"
    jar.write_text("# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t0\tname\tvalue\n")
    before = (jar.read_bytes(), jar.stat().st_mtime_ns)
    with serving(write_noise(tmp_path / "talk.wav", 1)) as server:
        assert guarded(tmp_path, server.url("talk.wav"), cookies=str(cookies))[0] == f"fetched {len(server.content)}"
    assert (jar.read_bytes(), jar.stat().st_mtime_ns) == before


def test_the_runtime_that_youtube_needs_comes_with_the_server() -> None:
    assert any(name.startswith("deno") and "server" in name for name in requires("whisperd") or ())
    programs = find_programs()
    assert Path(programs["deno"]).parent == Path(sysconfig.get_path("scripts"))
    assert str(describe(programs, datetime.date(2026, 11, 30))["js_runtime"]).startswith("deno ")
