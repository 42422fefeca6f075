"""One download: a video or an address → `<folder>/source` in the spool, hashed and durable.

yt-dlp does the fetching, with everything off that is not needed for it: no other programs, no post-processing (the
decoder reads what sites send), no configuration, no plugins, no passwords from files.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pwd
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yt_dlp import YoutubeDL
from yt_dlp.extractor import gen_extractor_classes
from yt_dlp.networking.exceptions import RequestError

from whisperd.fetch.explain import FetchError, explain, whole
from whisperd.fetch.guard import Guard, forbidden_address
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.spoolfolder import new_folder

log = logging.getLogger("whisperd.fetch")

_CHUNK_BYTES = 2**20
# The original language first: where a site dubs by machine, the best audio may be in another one.
_FORMAT = "ba[format_note*=original]/ba/b"
SOCKET_TIMEOUT_S = 20.0

Checkpoint = Callable[[float, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The daemon's settings for downloads, by their names there."""

    spool: Path
    cache_dir: Path
    fetch_extractors: list[str]
    fetch_cookies: str
    fetch_timeout_s: float
    fetch_limit_s: float
    max_source_bytes: int
    max_audio_s: float
    min_free_bytes: int
    models_url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """What was fetched. `title` is empty where the site does not tell."""

    sha256: str
    size_bytes: int
    title: str


def address_of(source: Mapping[str, Any]) -> str:
    """Return the address of a source as a Job shows it. An id becomes part of one, so it may begin with `-`."""
    return f"https://www.youtube.com/watch?v={source['id']}" if source["kind"] == "video" else str(source["url"])


class Fetcher:
    """Downloads with the settings of one daemon. `programs` are JavaScript runtimes by yt-dlp's names."""

    def __init__(
        self, settings: Settings, guard: Guard, programs: Mapping[str, str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings, self._guard, self._programs, self._clock = settings, guard, programs, clock

    def fetch(self, source: Mapping[str, Any], *, uid: int, folder: str, checkpoint: Checkpoint) -> Download:
        """Fetch `source` to `<spool>/<folder>/source`, as `new_folder` makes a folder: whole or not at all.

        `checkpoint(done_bytes, total_bytes)` is called all the time; total is 0 while it is not known. Raises
        `FetchError`, `WhisperdError` of the spool's disk, or what `checkpoint` raises; no trace of it is left then.
        """
        # Where this process has a user of its own, the daemon comes by its group; else the umask keeps all out.
        with new_folder(self._settings.spool, folder, mode=0o770) as partial:
            info = self._download(source, uid, partial, checkpoint)
            sha256, size_bytes = _finish(partial, checkpoint)
        return Download(
            sha256=sha256,
            size_bytes=size_bytes,
            title=whole(str(info.get("title") or "")[:500]),
        )

    def _download(
        self, source: Mapping[str, Any], uid: int, partial: Path, checkpoint: Checkpoint
    ) -> Mapping[str, Any]:
        address, settings = address_of(source), self._settings
        check_extractor(source, settings.fetch_extractors)
        watch = Watch(settings, checkpoint, self._clock)
        cookies = read_cookies(settings.fetch_cookies, uid)
        self._guard.refused = None
        try:
            with _Downloader(self._options(partial, watch, cookies), watch) as downloader:
                info: Mapping[str, Any] | None = downloader.extract_info(address)
        except Exception as error:
            # Whatever an extractor made of it, this is why:
            if watch.ended is not None:
                raise explain(watch.ended) from None
            if self._guard.refused is not None:
                raise explain(forbidden_address(self._guard.refused)) from None
            raise explain(error, last_refusal=watch.refused) from None
        return info or {}

    def _options(self, partial: Path, watch: Watch, cookies: io.StringIO | None) -> dict[str, Any]:
        settings = self._settings
        return {
            "allowed_extractors": list(settings.fetch_extractors),
            "cachedir": str(settings.cache_dir / "yt-dlp"),
            "color": {"stdout": "never", "stderr": "never"},
            # A stream of our own: what the site changes is written there, and the file stays as it is.
            "cookiefile": cookies,
            "external_downloader": {"default": "native"},
            "ffmpeg_location": os.devnull,
            "fixup": "never",
            "format": _FORMAT,
            "fragment_retries": 3,
            "geo_bypass": False,
            "hls_prefer_native": True,
            "ignoreerrors": False,
            "js_runtimes": {name: {"path": path} for name, path in self._programs.items()},
            "logger": _Logger(),
            "match_filter": watch.check_video,
            "max_filesize": None,  # yt-dlp would end without a word; `Watch` speaks
            "noplaylist": True,
            "noprogress": True,
            "outtmpl": {"default": str(partial / "source").replace("%", "%%")},
            "postprocessors": [],
            "progress_hooks": [watch.progressed],
            "proxy": "",  # by an address that is really connected to, and none from the environment
            "quiet": True,
            "retries": 3,
            "socket_timeout": min(SOCKET_TIMEOUT_S, settings.fetch_timeout_s / 2),
            "updatetime": False,
            "usenetrc": False,
        }


class _Downloader(YoutubeDL):  # type: ignore[misc]
    """yt-dlp, which looks up between requests and takes no lists."""

    def __init__(self, options: dict[str, Any], watch: Watch) -> None:
        self._watch = watch
        super().__init__(options)

    def urlopen(self, req: Any) -> Any:
        """As yt-dlp's; a download that is not wanted any more makes no further request."""
        self._watch.look()
        try:
            return super().urlopen(req)
        except RequestError as error:
            self._watch.refused = error
            raise

    def process_ie_result(self, ie_result: dict[str, Any], download: bool = True, extra_info: Any = None) -> Any:
        """As yt-dlp's, but a list of videos is refused: each is to be a job of its own."""
        if ie_result.get("_type") in ("playlist", "multi_video", "compat_list"):
            raise playlist(str(ie_result.get("webpage_url") or ie_result.get("original_url") or "URL"))
        return super().process_ie_result(ie_result, download=download, extra_info=extra_info)


class Watch:
    """Keeps the caps of one download, before it and while it runs."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint, clock: Callable[[], float]) -> None:
        self._settings, self._checkpoint, self._clock = settings, checkpoint, clock
        self._deadline = clock() + settings.fetch_limit_s
        self._done, self._total = 0.0, 0.0
        # What ended it. Extractors catch much on their way, so it is kept, and raised again at the next look.
        self.ended: WhisperdError | None = None
        self.refused: RequestError | None = None  # the last request that got no answer, or a bad one

    def look(self) -> None:
        """Raise what ends the download: a cancel, its time, or what ended it before."""
        with self._last_word():
            self._checkpoint(self._done, self._total)
            if self._clock() > self._deadline:
                raise FetchError(
                    ErrorCode.TIMED_OUT,
                    f"the download took more than {self._settings.fetch_limit_s:g} s (setting fetch_limit_s): download "
                    "it by other means and submit the file",
                )

    def check_video(self, info: Mapping[str, Any], *, incomplete: bool = False) -> None:
        """Raise what refuses a video for what the site says of it."""
        with self._last_word():
            self._check_video(info)

    @contextmanager
    def _last_word(self) -> Iterator[None]:
        if self.ended is not None:
            raise self.ended
        try:
            yield
        except WhisperdError as error:
            self.ended = error
            raise

    def _check_video(self, info: Mapping[str, Any]) -> None:
        if info.get("is_live") or info.get("live_status") in ("is_live", "is_upcoming", "post_live"):
            raise FetchError(
                ErrorCode.FETCH_UNAVAILABLE,
                "live and upcoming streams are not fetched: submit it again once the recording is there",
            )
        duration_s, max_audio_s = info.get("duration"), self._settings.max_audio_s
        if duration_s is not None and duration_s > max_audio_s:
            raise FetchError(
                ErrorCode.TOO_LONG,
                f"the recording has {duration_s:.0f} s and at most {max_audio_s:.0f} s are taken (setting "
                "max_audio_s): download it, cut it and submit the parts",
            )
        self._check_size(float(info.get("filesize") or 0))

    def progressed(self, state: Mapping[str, Any]) -> None:
        """Take yt-dlp's progress; raise what ends the download."""
        self._done = float(state.get("downloaded_bytes") or 0)
        self._total = float(state.get("total_bytes") or 0)
        self.look()
        with self._last_word():
            self._check_size(max(self._done, self._total))

    def _check_size(self, size_bytes: float) -> None:
        settings = self._settings
        if size_bytes > settings.max_source_bytes:
            raise FetchError(
                ErrorCode.TOO_LARGE,
                f"the recording has more than {settings.max_source_bytes} bytes (setting max_source_bytes): download "
                "it, cut it and submit the parts",
            )
        status = os.statvfs(settings.spool)
        if status.f_bavail * status.f_frsize - max(0.0, size_bytes - self._done) < settings.min_free_bytes:
            raise FetchError(
                ErrorCode.STORAGE_FULL,
                f"the disk of the spool has no room for {size_bytes:.0f} bytes beside the {settings.min_free_bytes} "
                "that stay free (setting min_free_bytes): make room",
                transient=True,
            )


class _Logger:
    """Where yt-dlp says what it does. Its errors come back as exceptions."""

    def debug(self, message: str) -> None:
        log.debug("%s", message)

    def info(self, message: str) -> None:
        log.debug("%s", message)

    def warning(self, message: str) -> None:
        log.info("yt-dlp: %s", message)

    def error(self, message: str) -> None:
        log.debug("%s", message)


def check_extractor(source: Mapping[str, Any], allowed: list[str]) -> None:
    """Raise `forbidden` for a source that no allowed extractor knows, `bad_request` for an allowed site's list.

    Before any connection is made. A video's id is YouTube's alone: `generic` would ask there as well.
    """
    address = address_of(source)
    names = []
    for extractor in gen_extractor_classes():
        name = extractor.IE_NAME.lower()
        if not extractor.suitable(address) or (source["kind"] == "video" and name != "youtube"):
            continue
        if _matches(name, allowed):
            return
        site = name.partition(":")[0]
        if site != name and _matches(site, allowed):
            raise playlist(address)
        names.append(name)
    site = "addresses of any site" if names[0] == "generic" else names[0]
    raise FetchError(
        ErrorCode.FORBIDDEN,
        f"this daemon does not fetch from {site} (setting fetch_extractors allows {', '.join(allowed) or 'none'}): "
        "download the recording and submit the file, or pipe it into `whisperctl submit -`",
    )


def _matches(name: str, allowed: list[str]) -> bool:
    """True when an extractor's name is allowed: the settings are regular expressions, as yt-dlp takes them."""
    matched = False
    for pattern in allowed:
        if pattern in ("all", "default") or re.fullmatch(pattern.removeprefix("-"), name, re.IGNORECASE):
            matched = not pattern.startswith("-")
    return matched


def playlist(address: str) -> WhisperdError:
    """Return the error for a list of videos."""
    return FetchError(
        ErrorCode.BAD_REQUEST,
        f"this is a list, not one recording: `yt-dlp --flat-playlist --print url -- {shlex.quote(address)}` lists "
        "what is in it; submit what you want of that",
    )


def read_cookies(folder: str, uid: int, environ: Mapping[str, str] = os.environ) -> io.StringIO | None:
    """Return a private copy of a user's cookies: `UID.txt` or `NAME.txt` in `folder`; None without any.

    systemd hands a service the files of a folder as `cookies_UID.txt` and so on (LoadCredential=cookies:FOLDER).
    """
    handed_over = environ.get("CREDENTIALS_DIRECTORY", "")
    places = [prefix for prefix in (folder and f"{folder}/", handed_over and f"{handed_over}/cookies_") if prefix]
    names = [str(uid)]
    with suppress(KeyError):  # a uid without a name
        names.append(pwd.getpwuid(uid).pw_name)
    for path in (f"{place}{name}.txt" for place in places for name in names):
        try:
            return io.StringIO(Path(path).read_text())
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            log.warning("cookies cannot be read uid=%d error=%r", uid, error)
    return None


def _finish(partial: Path, checkpoint: Checkpoint) -> tuple[str, int]:
    """Hash what was downloaded and bring it to the disk, alone; return its SHA-256 in hex and its size."""
    digest = hashlib.sha256()
    if not (partial / "source").exists():
        raise FetchError(ErrorCode.FETCH_FAILED, "the site sent nothing: try again, or upgrade yt-dlp", transient=True)
    with (partial / "source").open("rb") as source:
        total = os.fstat(source.fileno()).st_size
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            checkpoint(total, total)
        os.fsync(source.fileno())
    for leftover in set(os.listdir(partial)) - {"source"}:
        os.unlink(partial / leftover)
    return digest.hexdigest(), total
