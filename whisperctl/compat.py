"""The names of the HTTP client that whisperd replaces: a program moves over by changing its import.

    from whisperctl.compat import WhisperAPIClient

A video that cannot be had raises, with its reason, instead of being None for ever; asking for it again tries anew.
New programs are better off with `whisperctl.Client`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import threading
import time
import weakref
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from whisperctl.client import Client
from whisperctl.connection import seconds_left
from whisperctl.errors import DaemonUnreachable, JobTimeout, NotFound
from whisperctl.private import PrivateDaemon
from whisperctl.results import Result
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.jobs import JobState, Priority

__all__ = ["WhisperAPIClient", "WhisperTranscriber", "WhisperTranscriberCompat"]

_HERE = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0"})
_LOOK_AT_MODEL_S = 2.0
_MOST_DEATHS = 3


class WhisperAPIClient:
    """Transcribes YouTube videos by their ids. One may be shared by threads, and kept across a fork.

    `base_url` is where the HTTP server was: an address of this machine is passed over, a path (or `unix:PATH`) is the
    daemon's socket. Without it the daemon is found as `Client` finds it. `timeout` bounds short requests in seconds.
    `options` are openai-whisper's (`language="de"`) and hold for every video. Raises `ValueError` for another machine.
    """

    def __init__(self, base_url: str | None = None, timeout: float = 30.0, **options: Any) -> None:
        self._socket = _socket_of(base_url)
        self._timeout_s = timeout
        self._options = options
        self._variant = _digest(options)
        self._asked: dict[tuple[str, Priority], int] = {}  # jobs whose end nobody has been told
        _every_client.add(self)
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._client = Client(self._socket, self._timeout_s)

    def transcribe_video_sync(self, video_id: str, timeout: float | None = 300) -> str:
        """Return a video's text, before all background work; waits for it.

        Raises `JobTimeout` after `timeout` seconds: the work goes on, and asking again goes on waiting for it. Raises
        `JobFailed` or `JobCancelled` with the reason; asking again tries anew.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        result = self._result(video_id, Priority.INTERACTIVE, wait=True, deadline=deadline)
        return result.require().text

    def transcribe_video_async(self, video_id: str) -> str | None:
        """Return a video's text, or None while it is worked on in the background: ask again, as often as you like.

        Raises as `transcribe_video_sync` does, but for the timeout.
        """
        result = self._result(video_id, Priority.BACKGROUND, wait=False, deadline=None)
        return result.require().text if result.job.ended else None

    def health(self) -> dict[str, Any]:
        """Return how the daemon is (the former `GET /health`): `status` is `ready` when all is well."""
        return self._client.health()

    def stats(self) -> dict[str, Any]:
        """Return the daemon's counters (the former `GET /stats`), as docs/protocol.md names them."""
        return self._client.stats()

    def close(self) -> None:
        """End the connection; what was asked for goes on."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _result(self, video_id: str, priority: Priority, *, wait: bool, deadline: float | None) -> Result:
        """Return a video's job with its transcript. An end is told once: the next call asks the daemon anew."""
        for attempt in (1, 2):
            job_id = self._job_of(video_id, priority, deadline)
            try:
                result = self._wait(job_id, deadline) if wait else self._client.result(job_id)
            except NotFound:  # forgotten, or past its retention
                self._told(video_id, priority, job_id)
                if attempt == 2:
                    raise
            else:
                if result.job.ended:
                    self._told(video_id, priority, job_id)
                return result
        raise AssertionError("the second attempt returns or raises")

    def _wait(self, job_id: int, deadline: float | None) -> Result:
        return self._client.result(job_id, wait=True, timeout_s=seconds_left(deadline))

    def _job_of(self, video_id: str, priority: Priority, deadline: float | None) -> int:
        """Return the job of a video: the one we know of, else its key's, else a new one.

        The key says what is asked for, so that all threads and processes of a user come to the same job. A key whose
        job was cancelled, or is long past, is used up: the next number is tried.
        """
        with self._lock:
            known = self._asked.get((video_id, priority))
        if known is not None:
            return known
        for number in itertools.count(1):
            key = f"compat {priority} {video_id[:64]} {self._variant} {number}"
            try:
                job = self._client.submit_video(
                    video_id, priority=priority, key=key, timeout_s=seconds_left(deadline), options=self._options
                )
            except NotFound:
                continue
            if job.state is not JobState.CANCELLED:
                break
        with self._lock:
            return self._asked.setdefault((video_id, priority), job.id)

    def _told(self, video_id: str, priority: Priority, job_id: int) -> None:
        with self._lock:
            if self._asked.get((video_id, priority)) == job_id:  # else another thread was faster, and asked anew
                del self._asked[video_id, priority]


class WhisperTranscriberCompat(WhisperAPIClient):
    """The transcriber's names, by way of the daemon."""

    def transcribe_video(self, video_id: str, timeout: float | None = 300) -> str | None:
        """Return a video's text, or None if it is not there after `timeout` seconds: the work goes on, ask again.

        Raises `JobFailed` or `JobCancelled` with the reason; asking again tries anew.
        """
        try:
            return self.transcribe_video_sync(video_id, timeout)
        except JobTimeout:
            return None


class WhisperTranscriber:
    """The same without a daemon: a private one, in a temporary folder, for the lifetime of this object.

    Needs the server's packages (`pip install 'whisperd[server]'`) and loads a model of its own: where a daemon runs,
    `WhisperTranscriberCompat` does the same for nothing. `model`, `device` and `threads` are whisperd's own flags; all
    else is read from its usual configuration. `options` are openai-whisper's. Raises `DaemonUnreachable`, saying why.
    """

    def __init__(
        self, model: str | None = None, *, device: str | None = None, threads: int | None = None, **options: Any
    ) -> None:
        flags = {"--model": model, "--device": device, "--threads": threads}
        self._daemon = PrivateDaemon([word for flag, value in flags.items() if value is not None
                                      for word in (flag, str(value))])  # fmt: skip
        self._api = _PrivateClient(self._daemon, **options)

    def transcribe_video(self, video_id: str, timeout: float | None = None) -> str | None:
        """As `WhisperTranscriberCompat.transcribe_video`, but waits for as long as it takes unless told otherwise.

        Raises `WhisperdError` (`model_unavailable`) when the model cannot be loaded.
        """
        self._daemon.ensure()
        return self._api.transcribe_video(video_id, timeout)

    def close(self) -> None:
        """End the private daemon; what it has not finished is lost."""
        self._api.close()
        self._daemon.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _PrivateClient(WhisperTranscriberCompat):
    """Nobody but us looks after the private daemon: one that dies is started again, and a model that cannot be loaded
    ends the wait, to be tried again at the next call.
    """

    def __init__(self, daemon: PrivateDaemon, **options: Any) -> None:
        super().__init__(str(daemon.socket_path), **options)
        self._daemon = daemon

    def _wait(self, job_id: int, deadline: float | None) -> Result:
        if self._model_error() is not None:
            self._client.model("load")
        deaths = 0
        while True:
            left_s = seconds_left(deadline)
            try:
                slice_s = _LOOK_AT_MODEL_S if left_s is None else min(left_s, _LOOK_AT_MODEL_S)
                return self._client.result(job_id, wait=True, timeout_s=slice_s)
            except JobTimeout:
                if left_s is not None and left_s <= _LOOK_AT_MODEL_S:
                    raise
            try:
                error = self._model_error()
            except DaemonUnreachable:
                deaths += 1
                if deaths == _MOST_DEATHS:
                    raise
                self._daemon.ensure()
            else:
                if error is not None:
                    raise WhisperdError(ErrorCode.MODEL_UNAVAILABLE, error)

    def _model_error(self) -> str | None:
        model = self._client.health()["model"]
        return str(model["error"]) if model["state"] == "failed" else None


def _socket_of(base_url: str | None) -> str | None:
    """Return the socket that a former `base_url` stands for; None = look in the usual places."""
    if not base_url:
        return None
    if not re.match(r"[a-z][a-z0-9+.-]*:", base_url, re.IGNORECASE):
        return base_url
    address = urlsplit(base_url)
    if address.scheme == "unix":
        return address.path
    if address.scheme in ("http", "https") and address.hostname in _HERE:
        return None
    raise ValueError(
        f"{base_url} is another machine's, and whisperd has no network port: forward its socket (ssh -L "
        "/tmp/whisperd.sock:/run/whisperd/whisperd.sock HOST) and give the path of that as base_url"
    )


def _digest(options: dict[str, Any]) -> str:
    """Return a few letters for the options: with others a video is another piece of work, under a key of its own."""
    text = json.dumps(options, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16] if options else "plain"


# Web servers make their clients first and fork then: each child gets a connection, and a lock, of its own.
_every_client: weakref.WeakSet[WhisperAPIClient] = weakref.WeakSet()


def _renew_in_child() -> None:
    for client in list(_every_client):
        client._begin()


os.register_at_fork(after_in_child=_renew_in_child)
