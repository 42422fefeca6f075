"""What went wrong with a download, as one of the protocol's codes and a sentence that says what to do.

yt-dlp tells most of it in words only. The words here are its own (versions of 2026) and those of YouTube's player.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from yt_dlp.networking.exceptions import HTTPError, RequestError

from whisperd.protocol.errors import ErrorCode, WhisperdError

_MAX_SAID = 300
# What a site that names no time is given. YouTube blocks a session "for up to an hour".
_YOUTUBE_REST_S = 3600.0
MAX_REST_S = 6 * 3600.0

_COOKIES = "an administrator can give this user cookies (setting fetch_cookies)"
_NEWER = "upgrade yt-dlp (pip install -U 'yt-dlp[default]' deno) and try again"
_ELSEWHERE = "download it by other means and submit the file"


class FetchError(WhisperdError):
    """A download that failed. `transient`: trying again may help, but not before `wait_s`."""

    def __init__(self, code: str, message: str, *, transient: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(code, whole(message))
        self.transient = transient
        self.wait_s = wait_s


def whole(text: str) -> str:
    """Return what a site says with `?` for halves of surrogate pairs: JSON may hold them, and no frame can."""
    return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    pattern: re.Pattern[str]
    code: ErrorCode
    advice: str
    transient: bool = False
    wait_s: float = 0.0


def _rule(pattern: str, code: ErrorCode, advice: str, *, transient: bool = False, wait_s: float = 0.0) -> _Rule:
    return _Rule(
        pattern=re.compile(pattern, re.IGNORECASE), code=code, advice=advice, transient=transient, wait_s=wait_s
    )


_NO_ANSWER = re.compile(r"Failed to extract any player response")

# The first that fits wins: what is said in particular stands before what is said in general.
_RULES: tuple[_Rule, ...] = (
    _rule(
        r"No space left on device|Disk quota exceeded|File too large",
        ErrorCode.STORAGE_FULL,
        "make room on the disk of the spool",
        transient=True,
    ),
    _rule(
        r"rate-limited by YouTube|isn.t available, try again later",
        ErrorCode.FETCH_RATE_LIMITED,
        "wait an hour, and fetch less at a time",
        transient=True,
        wait_s=_YOUTUBE_REST_S,
    ),
    _rule(
        r"not a bot|captcha|IP is likely being blocked",
        ErrorCode.FETCH_BLOCKED,
        f"the site takes this machine for a robot: wait some hours, or {_COOKIES}",
    ),
    _rule(
        r"confirm your age|age[- ]restrict|inappropriate for some users|age[- ]verif",
        ErrorCode.FETCH_AGE_RESTRICTED,
        f"it needs an account of age: {_COOKIES}",
    ),
    _rule(
        r"members[- ]only|join this channel|channel.s members|Music Premium members|requires payment|"
        r"only available (for|to) (registered|paying|premium)|subscribers? only",
        ErrorCode.FETCH_PRIVATE,
        f"it is for members only: {_COOKIES}",
    ),
    _rule(
        r"(video|playlist|post|content|track) is private|Private video|granted access to this video",
        ErrorCode.FETCH_PRIVATE,
        f"its owner shows it to some accounts only: {_COOKIES}",
    ),
    _rule(
        r"available in your country|in your (country|region|location)|from your location|geo[- ]?restrict",
        ErrorCode.FETCH_UNAVAILABLE,
        f"it is not shown where this machine stands: {_ELSEWHERE}",
    ),
    _rule(
        r"live event will begin|Premieres? in|Premiere will begin|is upcoming|begin shortly|not currently live|"
        r"is offline|live stream recording is not available|live event has ended",
        ErrorCode.FETCH_UNAVAILABLE,
        "live and upcoming streams are not fetched: submit it again once the recording is there",
    ),
    _rule(r"\bDRM\b", ErrorCode.FETCH_UNAVAILABLE, "it is protected against copying, and nothing here unlocks it"),
    _rule(
        r"Video unavailable|video is (not|no longer) available|been removed|been terminated|no longer exists|"
        r"does not exist|copyright|Invalid video id|Incomplete YouTube ID|content isn.t available|not found on",
        ErrorCode.FETCH_UNAVAILABLE,
        "check the id; the video may be deleted",
    ),
    _rule(
        r"Sign in|log ?in (is )?required|requires? (a )?log ?in|registered users|account credentials|--cookies",
        ErrorCode.FETCH_PRIVATE,
        f"it needs an account: {_COOKIES}",
    ),
    _rule(
        r"Unsupported URL|No media found|no suitable (extractor|InfoExtractor)|extracted extension .* is unusual",
        ErrorCode.FETCH_UNAVAILABLE,
        "there is nothing to hear at that address that yt-dlp knows: give the address of the recording itself",
    ),
    _rule(
        r"Cloudflare|anti-bot",
        ErrorCode.FETCH_BLOCKED,
        f"the site lets no programs in: {_ELSEWHERE}",
    ),
    _rule(
        r"n challenge solving failed|nsig|signature|No video formats|Requested format is not available|"
        r"Only images are available|JavaScript runtime|Unable to extract|Failed to (extract|parse)|please report",
        ErrorCode.FETCH_FAILED,
        f"the site has changed, or a JavaScript runtime is missing: {_NEWER}",
    ),
    _rule(
        r"timed? ?out|Temporary failure in name resolution|Name or service not known|getaddrinfo|resolve host|"
        r"Connection (refused|reset|aborted)|Remote end closed|Network is unreachable|No route to host|"
        r"IncompleteRead|bytes read, .* more expected|content too short|Did not get any data blocks|"
        r"EOF occurred in violation|UNEXPECTED_EOF",
        ErrorCode.FETCH_FAILED,
        "check the network and the address",
        transient=True,
    ),
    _rule(
        r"CERTIFICATE_VERIFY_FAILED|certificate verify failed",
        ErrorCode.FETCH_FAILED,
        "the site's certificate does not hold: check the address and this machine's clock",
    ),
)


def explain(
    error: BaseException, *, last_refusal: RequestError | None = None, now_s: float | None = None
) -> FetchError:
    """Return what an exception of yt-dlp means. `now_s` (Unix seconds) is for `Retry-After` dates.

    `last_refusal` is the last request that failed: an extractor that goes through several of YouTube's players takes
    the failure of each for a warning, and in the end only says that none has answered.
    """
    if last_refusal is not None and _NO_ANSWER.search(str(error)):
        return explain(last_refusal, now_s=now_s)
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, FetchError):
            return link
        if isinstance(link, WhisperdError):
            return FetchError(link.code, link.message, transient=link.code == ErrorCode.STORAGE_FULL)
    raw, said = str(error), _said(error)
    status = next((link for link in chain if isinstance(link, HTTPError)), None)
    if status is not None and status.status == 429:
        return _rate_limited(said, status, time.time() if now_s is None else now_s)
    for rule in _RULES:
        if rule.pattern.search(raw):
            return FetchError(rule.code, f"{said}: {rule.advice}", transient=rule.transient, wait_s=rule.wait_s)
    if status is not None:
        return _http_error(said, status.status)
    transient = any(isinstance(link, RequestError | OSError) for link in chain)
    advice = "check the network and the address" if transient else f"{_NEWER}, or {_ELSEWHERE}"
    return FetchError(ErrorCode.FETCH_FAILED, f"{said}: {advice}", transient=transient)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and all that led to it: yt-dlp keeps those in several places."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        link = waiting.pop(0)
        if not isinstance(link, BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        exc_info = getattr(link, "exc_info", None) or (None, None)
        waiting += [exc_info[1], getattr(link, "cause", None), link.__cause__, link.__context__]


def _said(error: BaseException) -> str:
    """Return what yt-dlp says, without its prefix and without its advice, which is for its own command line."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(getattr(error, "msg", None) or error))
    said = re.sub(r"^ERROR:\s*(\[\S+\] (\S+: )?)?", "", said)
    said = re.sub(r"[;.]? *please report this issue on.*", "", said, flags=re.DOTALL)
    said = re.sub(r"(\. *)?(Use|See|For more information, refer to|You might want to) .*", "", said, flags=re.DOTALL)
    said = re.sub(r"\(caused by .*", "", said, flags=re.DOTALL)
    said = " ".join(said.split()).strip(" .:;") or type(error).__name__
    return said if len(said) <= _MAX_SAID else said[: _MAX_SAID - 1] + "…"


def _rate_limited(said: str, error: HTTPError, now_s: float) -> FetchError:
    wait_s = retry_after_s(error.response.headers.get("Retry-After"), now_s)
    return FetchError(
        ErrorCode.FETCH_RATE_LIMITED,
        f"{said}: the site has had too many requests from here; wait, and fetch less at a time",
        transient=True,
        wait_s=wait_s,
    )


def retry_after_s(value: str | None, now_s: float) -> float:
    """Return the seconds that a `Retry-After` asks for (RFC 9110, 10.2.3), 0 when it says nothing that is usable."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return min(MAX_REST_S, float(value))
    try:
        return min(MAX_REST_S, max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now_s))
    except ValueError:
        return 0.0


def _http_error(said: str, status: int) -> FetchError:
    match status:
        case 401:
            return FetchError(ErrorCode.FETCH_PRIVATE, f"{said}: it needs an account: {_COOKIES}")
        case 403:
            advice = f"the site refuses: {_NEWER}; if that does not help, {_COOKIES}"
            return FetchError(ErrorCode.FETCH_BLOCKED, f"{said}: {advice}")
        case 404 | 410:
            return FetchError(ErrorCode.FETCH_UNAVAILABLE, f"{said}: there is nothing at that address: check it")
        case 451:
            return FetchError(ErrorCode.FETCH_UNAVAILABLE, f"{said}: it is not shown here by law: {_ELSEWHERE}")
        case 408 | 425 | 500 | 502 | 503 | 504:
            return FetchError(ErrorCode.FETCH_FAILED, f"{said}: the site has troubles: try later", transient=True)
    return FetchError(ErrorCode.FETCH_FAILED, f"{said}: check the address, or {_ELSEWHERE}")
