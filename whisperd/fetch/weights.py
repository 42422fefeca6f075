"""One model's file, from openai-whisper's own address or a mirror → the cache folder, checked by its hash.

What has arrived stays under a temporary name, whoever dies meanwhile, and the next try asks for the rest.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from yt_dlp import YoutubeDL
from yt_dlp.networking import Request
from yt_dlp.networking.exceptions import CertificateVerifyError, HTTPError, IncompleteRead, RequestError

from whisperd.fetch.download import SOCKET_TIMEOUT_S, Settings
from whisperd.fetch.explain import FetchError, retry_after_s
from whisperd.fetch.guard import Guard
from whisperd.protocol.catalogue import Checkpoint
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.spoolfolder import storage_errors, sync_folder

log = logging.getLogger("whisperd.fetch")

_CHUNK_BYTES = 2**18  # so much is lost when the line breaks
# A line that breaks again and again is gone on with at once for as long as each piece is worth the request.
_WORTHWHILE_BYTES = 2**20

# Called all the time with the bytes that are there and all that there will be (0: not known); may raise.
Look = Callable[[float, float], None]


class WeightsFetcher:
    """Downloads models with the settings of one daemon. `environ` says where openai-whisper keeps a user's models."""

    def __init__(self, settings: Settings, guard: Guard, environ: Mapping[str, str]) -> None:
        self._settings, self._guard, self._environ = settings, guard, environ

    def fetch(self, wanted: Checkpoint, look: Look) -> Path:
        """Return where the file lies, whole; downloaded unless it is there already.

        Raises `FetchError`, or what `look` raises. What has arrived by then is kept for the next try.
        """
        home = wanted.home(self._settings.cache_dir)
        partial = home.with_name(f"{home.name}.partial")
        with _explained(wanted.url(self._settings.models_url), partial, self._guard):
            for path in wanted.present(self._settings.cache_dir, self._environ):
                if _sha256_of(path, look) == wanted.sha256:
                    return path
            if not self._settings.models_url:
                raise FetchError(ErrorCode.FORBIDDEN, wanted.only_by_hand(self._settings.cache_dir))
            home.parent.mkdir(parents=True, exist_ok=True)
            with _alone_with(partial) as file:
                self._complete(wanted, _Arriving(file, home.parent, look))
                os.fsync(file.fileno())
                partial.rename(home)
                sync_folder(home.parent)
        return home

    def _complete(self, wanted: Checkpoint, arriving: _Arriving) -> None:
        """Receive what is missing, and check the whole."""
        self._receive_all(wanted, arriving)
        if arriving.sha256 != wanted.sha256 and arriving.inherited:
            log.warning("what an earlier try left of file=%s is damaged, and fetched anew", wanted.file_name)
            arriving.empty()
            self._receive_all(wanted, arriving)
        if (sha256 := arriving.sha256) != wanted.sha256:
            arriving.empty()
            url = _shown(wanted.url(self._settings.models_url))
            raise FetchError(
                ErrorCode.FETCH_FAILED,
                f"{url} is not the file that it should be (sha256 {sha256}): a proxy may be in the way, or the setting "
                "models_url leads to something else",
            )

    def _receive_all(self, wanted: Checkpoint, arriving: _Arriving) -> None:
        url = wanted.url(self._settings.models_url)
        options = {
            "quiet": True,
            "no_warnings": True,
            "proxy": "",  # as for recordings: the guard looks at the address that is really connected to
            "socket_timeout": min(SOCKET_TIMEOUT_S, self._settings.fetch_timeout_s / 2),
        }
        with YoutubeDL(options) as downloader:
            while True:
                before = arriving.size
                try:
                    self._receive(downloader, url, arriving)
                except RequestError:
                    if arriving.size < before + _WORTHWHILE_BYTES:
                        raise
                    log.info("file=%s bytes=%d the line broke; asking for the rest", wanted.file_name, arriving.size)
                else:
                    return

    def _receive(self, downloader: Any, url: str, arriving: _Arriving) -> None:
        """Ask for what is missing and take it. Returns when the server has no more; raises what ends it before."""
        headers = {"Accept-Encoding": "identity"}
        if arriving.size:
            headers["Range"] = f"bytes={arriving.size}-"
        try:
            response = downloader.urlopen(Request(url, headers=headers))
        except HTTPError as error:
            # There is nothing after what we have: it is whole, or something else altogether. Its hash will tell.
            if error.status == 416 and arriving.size:
                error.close()
                return
            raise
        with closing(response):
            if response.status != 206 or not _begins_at(response, arriving.size):
                arriving.empty()
            length = response.get_header("Content-Length") or ""
            total = arriving.size + int(length) if length.isdecimal() else 0
            self._check_size(arriving, total)
            while data := response.read(_CHUNK_BYTES):
                arriving.append(data, total)
                self._check_size(arriving, total)
        if arriving.size < total:
            raise IncompleteRead(partial=arriving.size, expected=total - arriving.size)

    def _check_size(self, arriving: _Arriving, total: int) -> None:
        settings, missing = self._settings, max(0, total - arriving.size)
        if max(arriving.size, total) > settings.max_source_bytes:
            raise FetchError(
                ErrorCode.TOO_LARGE,
                f"the file has more than {settings.max_source_bytes} bytes (setting max_source_bytes): raise that, or "
                "look at the setting models_url",
            )
        status = os.statvfs(arriving.folder)
        room = status.f_bavail * status.f_frsize - settings.min_free_bytes
        if room < missing:
            raise FetchError(
                ErrorCode.STORAGE_FULL,
                f"the disk of {arriving.folder} has no room for the {missing} bytes that are still to "
                f"come beside the {settings.min_free_bytes} that stay free (setting min_free_bytes): make room",
            )


class _Arriving:
    """A file on its way to `folder`, and the hash of what it holds. `inherited`: some of that is of an earlier try."""

    def __init__(self, file: BinaryIO, folder: Path, look: Look) -> None:
        self._file, self.folder, self._look = file, folder, look
        self._digest = hashlib.sha256()
        self.size = 0
        while piece := file.read(_CHUNK_BYTES):
            self._add(piece, 0)
        self.inherited = self.size > 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def append(self, data: bytes, total: int) -> None:
        """Write what came."""
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
        self._add(data, total)

    def empty(self) -> None:
        """Begin anew."""
        self._file.seek(0)
        self._file.truncate()
        self._digest, self.size, self.inherited = hashlib.sha256(), 0, False

    def _add(self, data: bytes, total: int) -> None:
        self._digest.update(data)
        self.size += len(data)
        self._look(self.size, total)


@contextmanager
def _alone_with(partial: Path) -> Iterator[BinaryIO]:
    """Open the partial file for reading and writing; nobody else has it meanwhile.

    Raises a transient `FetchError` where another process (of a daemon with the same cache folder, or one that is just
    being killed) has it, or had it until now.
    """
    # Who may read it, the umask says: where the fetcher has a user of its own, the daemon is in its group.
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    # Unbuffered: what was received and not written is what a full disk refuses, here and not when it is closed.
    with open(fd, "r+b", buffering=0) as file:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = os.fstat(fd).st_nlink == 0 or not os.path.samestat(os.fstat(fd), os.stat(partial))
        except (BlockingIOError, FileNotFoundError):
            taken = True
        if taken:
            raise FetchError(ErrorCode.FETCH_FAILED, f"another process is at work on {partial}", transient=True)
        yield file


@contextmanager
def _explained(url: str, partial: Path, guard: Guard) -> Iterator[None]:
    """Turn what goes wrong into `FetchError`. A disk that is full has the partial file taken off it."""
    guard.refused = None
    try:
        with storage_errors("the models"):
            yield
    except FetchError:
        raise
    except WhisperdError as error:
        if error.code == ErrorCode.STORAGE_FULL:
            partial.unlink(missing_ok=True)
        raise FetchError(error.code, error.message) from None
    except (RequestError, OSError) as error:
        if guard.refused is not None:
            raise FetchError(
                ErrorCode.FORBIDDEN,
                f"{_shown(url)} leads to {guard.refused}, which is not on the public internet: for a mirror in a "
                "private network set fetch_allow_private = true, or put the file where it belongs yourself",
            ) from None
        raise _explain(error, _shown(url)) from None


def _explain(error: RequestError | OSError, url: str) -> FetchError:
    said = f"{url}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, CertificateVerifyError):
        return FetchError(ErrorCode.FETCH_FAILED, f"{said}: the certificate does not hold; check this machine's clock")
    if isinstance(error, OSError):  # of files: what the network does, yt-dlp wraps
        return FetchError(ErrorCode.FETCH_FAILED, f"{said}: look at the cache folder, and who owns it")
    if not isinstance(error, HTTPError):
        return FetchError(ErrorCode.FETCH_FAILED, f"{said}: check the network", transient=True)
    match error.status:
        case 429:
            wait_s = retry_after_s(error.response.headers.get("Retry-After"), time.time())
            return FetchError(ErrorCode.FETCH_RATE_LIMITED, f"{said}: wait", transient=True, wait_s=wait_s)
        case 408 | 425 | 500 | 502 | 503 | 504:
            return FetchError(ErrorCode.FETCH_FAILED, f"{said}: the server has troubles, try later", transient=True)
        case 401 | 403 | 451:
            return FetchError(ErrorCode.FETCH_BLOCKED, f"{said}: the server refuses; check the setting models_url")
    return FetchError(ErrorCode.FETCH_UNAVAILABLE, f"{said}: the file is not there; check the setting models_url")


def _shown(url: str) -> str:
    """Return an address without the password that a mirror's may carry: everybody sees `health`."""
    return re.sub(r"(?<=//)[^/@]*@", "", url)


def _begins_at(response: Any, place: int) -> bool:
    """True when a part begins where we asked it to (RFC 9110, 14.4)."""
    return str(response.get_header("Content-Range") or "").startswith(f"bytes {place}-")


def _sha256_of(path: Path, look: Look) -> str:
    with path.open("rb") as file:
        total, digest, done = os.fstat(file.fileno()).st_size, hashlib.sha256(), 0
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
            done += len(piece)
            look(done, total)
    return digest.hexdigest()
