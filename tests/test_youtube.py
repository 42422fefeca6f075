"""What YouTube answers, and what becomes of it: yt-dlp's own extractor in the real fetch helper, YouTube on loopback.

The words of the player are YouTube's, as yt-dlp's own sources and its users' reports have them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helper_process import HelperProcess
from tests.media_server import MediaServer, serving
from tests.superserver import superserver
from tests.support import PLAIN_OPTIONS, Daemon, write_noise
from whisperd.protocol.helper_messages import Failed, Fetch, Fetched, FetchFailed

HELPER = "tests.loopback_youtube"
TALK_S = 5


class Youtube:
    """A server that answers for YouTube's player, and sends the recordings."""

    def __init__(self, server: MediaServer) -> None:
        self.server = server
        self._numbers = itertools.count(1)

    def new_id(self) -> str:
        """Return an id that nobody has had. All of them begin with a dash: that must not make an option of them."""
        return f"-{next(self._numbers):010}"

    def publish(self, video_id: str, *tracks: dict[str, Any], status: dict[str, Any], **details: Any) -> None:
        """Answer for `video_id` from now on."""
        answer: dict[str, Any] = {
            "videoDetails": {"videoId": video_id, "title": "A talk", "lengthSeconds": str(TALK_S)} | details,
            "playabilityStatus": status,
        }
        if tracks:
            answer["streamingData"] = {"adaptiveFormats": list(tracks)}
        self.server.by_name[video_id] = json.dumps(answer).encode()

    def track(self, path: str = "talk.wav", **fields: Any) -> dict[str, Any]:
        """Return an audio track as the player describes it."""
        sort = {"itag": 140, "mimeType": 'audio/mp4; codecs="mp4a.40.2"', "audioQuality": "AUDIO_QUALITY_MEDIUM"}
        return {**sort, "url": self.server.url(path), "contentLength": str(len(self.server.content)), **fields}


@pytest.fixture(scope="module")
def youtube(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Youtube]:
    with serving(write_noise(tmp_path_factory.mktemp("media") / "talk.wav", TALK_S)) as server:
        yield Youtube(server)


class Fetching:
    """A fetch helper and its folder."""

    def __init__(self, helper: HelperProcess, spool: Path) -> None:
        self._helper, self.spool = helper, spool
        self._runs = itertools.count(1)

    def __call__(self, video_id: str) -> Fetched | FetchFailed | Failed:
        run = next(self._runs)
        source = {"kind": "video", "id": video_id}
        self._helper.send(Fetch(run=run, generation=1, folder=f"f{run}", source=source, uid=0))
        return self._helper.answer(Fetched, FetchFailed, Failed)


@pytest.fixture(scope="module")
def fetch(tmp_path_factory: pytest.TempPathFactory, youtube: Youtube) -> Iterator[Fetching]:
    spool = tmp_path_factory.mktemp("spool")
    settings = {
        **{"spool": str(spool), "cache_dir": str(tmp_path_factory.mktemp("cache"))},
        **{"fetch_extractors": ["youtube"], "fetch_allow_private": True, "fetch_cookies": "", "models_url": ""},
        **{"fetch_timeout_s": 20.0, "fetch_limit_s": 60.0, "max_source_bytes": 1_000_000, "max_audio_s": 60.0},
        "min_free_bytes": 0,
    }
    with HelperProcess(HELPER, settings, {"YOUTUBE_URL": youtube.server.url("player")}) as helper:
        yield Fetching(helper, spool)


def screen(**fields: Any) -> dict[str, Any]:
    return {"errorScreen": fields}


def subreason(text: str) -> dict[str, Any]:
    return screen(playerErrorMessageRenderer={"subreason": {"simpleText": text}})


REFUSALS: list[tuple[dict[str, Any], str, bool]] = [
    ({"status": "LOGIN_REQUIRED", "reason": "Sign in to confirm you’re not a bot"}, "fetch_blocked", False),
    (
        {
            "status": "LOGIN_REQUIRED",
            "reason": "Sign in to confirm your age",
            "desktopLegacyAgeGateReason": 1,
            **subreason("This video may be inappropriate for some users."),
        },
        "fetch_age_restricted",
        False,
    ),
    (
        {
            "status": "UNPLAYABLE",
            "reason": "Join this channel to get access to members-only content like this video, and other perks.",
        },
        "fetch_private",
        False,
    ),
    (
        {
            "status": "LOGIN_REQUIRED",
            "reason": "Private video",
            **subreason("Sign in if you've been granted access to this video"),
        },
        "fetch_private",
        False,
    ),
    (
        {
            "status": "UNPLAYABLE",
            "reason": "Video unavailable",
            **subreason("The uploader has not made this video available in your country"),
        },
        "fetch_unavailable",
        False,
    ),
    (
        {
            "status": "ERROR",
            "reason": "Video unavailable",
            **subreason("This video has been removed by the uploader"),
        },
        "fetch_unavailable",
        False,
    ),
    ({"status": "LIVE_STREAM_OFFLINE", "reason": "Premieres in 5 days"}, "fetch_unavailable", False),
    ({"status": "LIVE_STREAM_OFFLINE", "reason": "This live event will begin in 3 hours."}, "fetch_unavailable", False),
    (
        {"status": "UNPLAYABLE", "reason": "This content isn't available, try again later."},
        "fetch_rate_limited",
        True,
    ),
    (
        {"status": "UNPLAYABLE", "reason": "Video unavailable", **screen(playerCaptchaViewModel={"challenge": 1})},
        "fetch_blocked",
        False,
    ),
    ({"status": "OK"}, "fetch_failed", False),  # and no format: the site has changed
]


@pytest.mark.parametrize(("status", "code", "transient"), REFUSALS, ids=lambda value: str(value)[-40:])
def test_what_the_player_says(
    youtube: Youtube, fetch: Fetching, status: dict[str, Any], code: str, transient: bool
) -> None:
    video_id = youtube.new_id()
    youtube.publish(video_id, status=status)
    answer = fetch(video_id)
    assert isinstance(answer, FetchFailed)
    assert (answer.code, answer.transient) == (code, transient)
    assert answer.wait_s == (3600 if code == "fetch_rate_limited" else 0)


@pytest.mark.parametrize(
    ("number", "code", "transient"),
    [
        (429, "fetch_rate_limited", True),
        (403, "fetch_blocked", False),
        (503, "fetch_failed", True),
        (0, "fetch_failed", True),
    ],
)
def test_a_player_that_does_not_answer(
    youtube: Youtube, fetch: Fetching, number: int, code: str, transient: bool
) -> None:
    """yt-dlp warns of each player and then knows no more than that none has answered."""
    video_id = youtube.new_id()
    youtube.server.refused[video_id] = number
    answer = fetch(video_id)
    assert isinstance(answer, FetchFailed)
    assert (answer.code, answer.transient) == (code, transient)
    assert number == 0 or str(number) in answer.message
    assert "changed" not in answer.message


def test_a_machine_whose_address_is_blocked_is_told_of_another_video(youtube: Youtube, fetch: Fetching) -> None:
    video_id = youtube.new_id()
    youtube.publish(video_id, status={"status": "OK"}, videoId="aQvGIIdgFDM")
    answer = fetch(video_id)
    assert isinstance(answer, FetchFailed)
    assert answer.code == "fetch_blocked"


@pytest.mark.parametrize(
    ("details", "code"),
    [
        ({"isLive": True, "isLiveContent": True}, "fetch_unavailable"),
        ({"isUpcoming": True}, "fetch_unavailable"),
        ({"isPostLiveDvr": True, "isLiveContent": True}, "fetch_unavailable"),
        ({"lengthSeconds": "61"}, "too_long"),
    ],
)
def test_what_is_playable_and_yet_not_taken(
    youtube: Youtube, fetch: Fetching, details: dict[str, Any], code: str
) -> None:
    video_id = youtube.new_id()
    youtube.publish(video_id, youtube.track(), status={"status": "OK"}, **details)
    answer = fetch(video_id)
    assert isinstance(answer, FetchFailed)
    assert answer.code == code


@pytest.mark.parametrize(
    ("track", "code"),
    [
        ({"contentLength": "1000001"}, "too_large"),
        ({"path": "status/403/talk.wav"}, "fetch_blocked"),
        ({"drmFamilies": ["WIDEVINE"]}, "fetch_unavailable"),
    ],
)
def test_tracks_that_cannot_be_had(youtube: Youtube, fetch: Fetching, track: dict[str, Any], code: str) -> None:
    video_id = youtube.new_id()
    youtube.publish(video_id, youtube.track(**track), status={"status": "OK"})
    answer = fetch(video_id)
    assert isinstance(answer, FetchFailed)
    assert answer.code == code


def test_the_original_language_is_taken_and_not_a_dubbed_one(youtube: Youtube, fetch: Fetching) -> None:
    video_id = youtube.new_id()
    youtube.server.by_name["dubbed.wav"] = b"dubbed" * 1000
    dubbed = youtube.track(
        "dubbed.wav",
        itag=251,
        audioQuality="AUDIO_QUALITY_HIGH",
        audioTrack={"id": "en-US.3", "displayName": "English (US)", "audioIsDefault": True},
    )
    original = youtube.track(audioTrack={"id": "de-DE.4", "displayName": "German original", "audioIsDefault": False})
    youtube.publish(video_id, dubbed, original, status={"status": "OK"})
    answer = fetch(video_id)
    assert isinstance(answer, Fetched)
    assert answer.title == "A talk"
    assert answer.size_bytes == len(youtube.server.content)


def test_half_a_surrogate_pair_in_what_a_site_says_becomes_a_question_mark(youtube: Youtube, fetch: Fetching) -> None:
    titled, refused = youtube.new_id(), youtube.new_id()
    youtube.publish(titled, youtube.track(), status={"status": "OK"}, title="A talk \ud83d")
    answer = fetch(titled)
    assert isinstance(answer, Fetched)
    assert answer.title == "A talk ?"
    youtube.publish(refused, status={"status": "ERROR", "reason": "Removed \ud83d"})
    answer = fetch(refused)
    assert isinstance(answer, FetchFailed)
    assert "Removed ?" in answer.message


def test_ten_programs_one_video(
    start_daemon: Callable[..., Daemon],
    micro: Path,
    youtube: Youtube,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("YOUTUBE_URL", youtube.server.url("player"))
    video_id = youtube.new_id()
    youtube.publish(video_id, youtube.track("slow/one.wav"), status={"status": "OK"})
    with superserver(tmp_path / "fetch.sock", HELPER) as units:
        daemon = start_daemon(model=str(micro), ready=True, fetch_socket=str(units.path), fetch_allow_private=True)
        clients = [daemon.client() for _ in range(10)]
        try:
            source = {"kind": "video", "id": video_id}
            jobs = [client.call("submit", source=source, options=PLAIN_OPTIONS)["job"] for client in clients]
            youtube.server.go_on.set()
            answers = [client.result(job["id"]) for client, job in zip(clients, jobs, strict=True)]
        finally:
            for client in clients:
                client.close()
        assert {answer["job"]["state"] for answer in answers} == {"done"}
        assert {answer["job"]["attempts"] for answer in answers} == {1}
        assert len({answer["transcript"]["text"] for answer in answers}) == 1
        assert answers[0]["job"]["source"] == source | {"title": "A talk"}
        assert (youtube.server.asked[f"/player/{video_id}"], youtube.server.asked["/slow/one.wav"]) == (1, 1)
        done = daemon.whisperctl("transcribe", "--language", "en", "--temperature", "0", "--", video_id)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
