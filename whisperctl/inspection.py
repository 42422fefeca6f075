"""The steps of `selftest`. What the client cannot see for itself, the daemon tells: nothing heavy is imported here."""

from __future__ import annotations

import difflib
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import whisperd
from whisperctl.client import Client
from whisperctl.connection import seconds_left
from whisperctl.errors import BadRequest, JobTimeout
from whisperctl.words import duration, map_in, model_words, size
from whisperd import __version__
from whisperd.protocol import PROTOCOL_VERSION
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.jobs import Priority

_ASSETS = Path(whisperd.__file__).with_name("assets")
_LOOK_AGAIN_S = 0.5
_OLD_DAYS = 90  # yt-dlp's own warning comes then; sites change more often
_LIKE_ENOUGH = 0.7  # of the words; the smallest models get nine of ten
_UNKNOWN_UIDS = frozenset({65534, 2**32 - 1})  # nobody; -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What was found. `ok` is None for a step that could not be tried; `mend` says what to do."""

    name: str
    ok: bool | None
    told: str
    mend: str = ""

    def to_wire(self) -> dict[str, Any]:
        """Return the map that `--json` writes."""
        return {"name": self.name, "ok": self.ok, "told": self.told, "mend": self.mend}


class _Wrong(Exception):
    """A step does not hold."""

    def __init__(self, told: str, mend: str) -> None:
        super().__init__(told)
        self.told, self.mend = told, mend


class Inspection:
    """Looks at one daemon. `tell` is told in a few words what is being waited for."""

    def __init__(
        self,
        client: Client,
        *,
        timeout_s: float,
        tell: Callable[[str], None] = lambda words: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._client, self._timeout_s, self._tell = client, timeout_s, tell
        self._clock, self._sleep = clock, sleep
        self._hello: Mapping[str, Any] = {}
        self._health: Mapping[str, Any] = {}
        self._stats: Mapping[str, Any] = {}

    def steps(self) -> Iterator[Step]:
        """Yield every step as it was found. Without a socket there is nothing more to look at."""
        reached = True
        for name, look in _LOOKS.items():
            if not reached:
                yield Step(name=name, ok=None, told="not tried")
                continue
            try:
                step = Step(name=name, ok=True, told=look(self))
            except _Wrong as wrong:
                step = Step(name=name, ok=False, told=wrong.told, mend=wrong.mend)
            except WhisperdError as error:
                step = Step(name=name, ok=False, told=str(error))
            reached = step.ok is True or name != "socket"
            yield step

    # -- the daemon --------------------------------------------------------------------------------------------------

    def _socket(self) -> str:
        self._health = self._client.health()
        self._hello = self._client.hello()
        return f"whisperd answers at {self._client.socket_path}"

    def _permissions(self) -> str:
        own, path = os.geteuid(), Path(self._client.socket_path)
        uid = self._hello.get("uid", own)
        if uid != own and uid in _UNKNOWN_UIDS:
            raise _Wrong(
                f"the daemon takes you for nobody, and you are uid {own}",
                "it must see the users of this machine: no PrivateUsers= in its unit, no container between",
            )
        folder = path.parent.stat()
        if folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
            raise _Wrong(f"everybody may put another socket into {path.parent}", f"run chmod o-w {path.parent}")
        mode, role = stat.S_IMODE(path.stat().st_mode), "an admin" if self._hello.get("admin") else "no admin"
        who = "everybody" if mode & stat.S_IWOTH else "its group" if mode & stat.S_IWGRP else "its owner"
        # Through a socket that ssh forwards one is the account that ssh logged in to.
        there = "" if uid == own else f" and to the daemon uid {uid} (a forwarded socket?)"
        return f"you are uid {own}{there}, {role}; the socket (mode {mode:04o}) is open to {who}"

    def _versions(self) -> str:
        version, protocol = self._health.get("version"), self._health.get("protocol")
        if (version, protocol) != (__version__, PROTOCOL_VERSION):
            raise _Wrong(
                f"whisperctl is version {__version__} (protocol {PROTOCOL_VERSION}), whisperd {version} ({protocol})",
                "install the same version for both, and restart the daemon",
            )
        return f"whisperd and whisperctl {version}, protocol {protocol}"

    def _model(self) -> str:
        deadline = self._clock() + self._timeout_s
        # Loading has no event that tells of its end.
        while (state := self._model_of_health()["state"]) in ("loading", "downloading") and self._clock() < deadline:
            self._tell(model_words(self._model_of_health()))
            self._sleep(_LOOK_AGAIN_S)
            self._health = self._client.health()
        model = self._model_of_health()
        if state == "unloaded" and self._health.get("status") != "paused":
            return f"{model['name']}, unloaded while it is not needed"
        if self._health.get("status") == "paused":
            raise _Wrong(f"{model['name']} is {state}, and the queue stands still", " ".join(self._problems()))
        if state != "ready":
            raise _Wrong(f"{model['name']} is {state}", model.get("error") or "see the daemon's log, or wait longer")
        if problems := self._problems():
            raise _Wrong(f"{model['name']} is ready, but the daemon is {self._health['status']}", " ".join(problems))
        return f"{model['name']} is ready"

    def _model_of_health(self) -> Mapping[str, Any]:
        model: Mapping[str, Any] = self._health["model"]
        return model

    def _problems(self) -> list[str]:
        return [str(problem) for problem in self._health.get("problems") or ()]

    # -- what it is built of -------------------------------------------------------------------------------------------

    def _device(self) -> str:
        try:
            self._stats = self._client.stats(inspect=True)
        except BadRequest:  # an older daemon
            self._stats = self._client.stats()
        software, model = map_in(self._stats, "software"), self._model_of_health()
        device, torch = str(model.get("device") or ""), software.get("torch")
        if torch is None:
            raise _Wrong("the model's process has not told its torch", "see the daemon's log: does the model load?")
        where = f"{device} ({model['dtype']})" if model.get("dtype") else device or "no device while it is unloaded"
        if device.startswith("cuda"):
            return f"{where}, torch {torch} for CUDA {software.get('cuda')}"
        if seen := software.get("cuda_devices"):
            other = " and is told to use another (setting device)" if device else ""
            return f"{where}, torch {torch}; it sees CUDA ({seen}){other}"
        return f"{where}, torch {torch}; no CUDA: {software.get('cuda_problem')}"

    def _ffmpeg(self) -> str:
        software = map_in(self._stats, "software")
        if not software.get("ffmpeg"):
            raise _Wrong(
                "no decoder has told its FFmpeg", "see the daemon's log; pip install 'whisperd[server]' mends it"
            )
        return f"FFmpeg {software['ffmpeg']} in PyAV {software.get('av')}"

    def _yt_dlp(self) -> str:
        lane = map_in(map_in(self._stats, "lanes"), "fetch")
        allowed = lane.get("extractors")
        if allowed == []:
            return "no downloads (setting fetch_extractors is empty)"
        version, age_days, runtime = lane.get("yt_dlp"), lane.get("yt_dlp_age_days"), lane.get("js_runtime")
        if version is None:
            raise _Wrong(
                "no fetcher has told its yt-dlp", "see the daemon's log; pip install 'whisperd[server]' mends it"
            )
        if age_days is not None and age_days > _OLD_DAYS:
            raise _Wrong(
                f"yt-dlp {version} is {age_days} days old, and sites change",
                "where whisperd is installed: pip install -U 'yt-dlp[default]' deno, and restart the daemon",
            )
        old = "" if age_days is None else f", {age_days} days old"
        if runtime is None and any(re.search(r"youtube|all|default", str(name)) for name in allowed or ["youtube"]):
            raise _Wrong(
                f"yt-dlp {version}{old}, but no JavaScript runtime, which YouTube needs",
                "where whisperd is installed: pip install 'whisperd[server]' brings Deno (Node 22 or newer will do); "
                "then restart the daemon; "
                "where nothing is to be downloaded, say so with the setting fetch_extractors = []",
            )
        return f"yt-dlp {version}{old}" + (f", {runtime}" if runtime else "")

    def _disk(self) -> str:
        free_bytes, least_bytes = self._stats.get("free_bytes"), self._stats.get("min_free_bytes") or 0
        if free_bytes is None:
            raise _Wrong("the daemon does not tell how much room its disk has", "upgrade it")
        if free_bytes < least_bytes:
            raise _Wrong(
                f"{size(free_bytes)} free, and below {size(least_bytes)} nothing is taken",
                "make room on the disk of its state folder, or lower the setting min_free_bytes",
            )
        return f"{size(free_bytes)} free (nothing is taken below {size(least_bytes)})"

    # -- the work ------------------------------------------------------------------------------------------------------

    def _transcription(self) -> str:
        self._tell("transcribing the sample, twice at the same time")
        begun = self._clock()
        with _Sample(self._client, deadline=begun + self._timeout_s) as sample, ThreadPoolExecutor(2) as pool:
            try:
                work = [pool.submit(sample.in_background), pool.submit(sample.while_waiting)]
                texts = [each.result() for each in work]
            except BaseException:
                sample.cancel()  # else the pool's end would wait for the other one
                raise
        spoken = (_ASSETS / "sample.txt").read_text()
        for text in texts:
            if (share := _likeness(spoken, text)) < _LIKE_ENOUGH:
                raise _Wrong(
                    f"only {share:.0%} of the spoken words were heard: {text.strip()[:80]!r}",
                    "is the model the right file? Submit a recording of your own and read it",
                )
        return f"both say what is spoken, after {duration(self._clock() - begun)}"

    def _counters(self) -> str:
        done_before = map_in(map_in(self._stats, "jobs"), "since_start").get("done", 0)
        stats = self._client.stats()
        done = map_in(map_in(stats, "jobs"), "since_start").get("done", 0)
        if done < done_before + 2:
            raise _Wrong(
                f"{done} jobs done, and there were {done_before} before the two of this test",
                "did the daemon restart meanwhile? Try again",
            )
        speed = map_in(stats, "audio").get("speed")
        return f"{done} jobs done since the start" + (f", {speed:.1f} × real time" if speed else "")


class _Sample:
    """The two jobs of the test; gone when the block ends."""

    def __init__(self, client: Client, *, deadline: float) -> None:
        self._client, self._deadline = client, deadline
        self._path = _ASSETS / "sample.flac"
        self._jobs: list[int] = []
        self._lock = threading.Lock()
        self._cancelled = False

    def in_background(self) -> str:
        """As `submit`, then `result`."""
        return self._text(self._submit(attached=False, priority=Priority.BACKGROUND))

    def while_waiting(self) -> str:
        """As `submit --wait`."""
        job_id = self._submit(attached=True, priority=Priority.INTERACTIVE)
        with self._in_time(job_id):
            for _ in self._client.follow(job_id, timeout_s=seconds_left(self._deadline)):
                pass
        return self._text(job_id)

    def _submit(self, *, attached: bool, priority: Priority) -> int:
        job = self._client.submit(
            self._path,
            priority=priority,
            attached=attached,
            fresh=True,
            timeout_s=seconds_left(self._deadline),
            language="en",
        )
        with self._lock:
            self._jobs.append(job.id)
            if self._cancelled:
                self._client.cancel(job.id)
        return job.id

    def _text(self, job_id: int) -> str:
        with self._in_time(job_id):
            return self._client.result(job_id, wait=True, timeout_s=seconds_left(self._deadline)).text

    @contextmanager
    def _in_time(self, job_id: int) -> Iterator[None]:
        try:
            yield
        except JobTimeout:
            job = self._client.job(job_id)
            where = f"waits at place {job.position}" if job.position else f"is {job.state}"
            mend = "try again when there is less work, or raise --timeout"
            raise _Wrong(f"no words in time: the sample {where}", mend) from None

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            for job_id in self._jobs:
                with suppress(WhisperdError):
                    self._client.cancel(job_id)

    def __enter__(self) -> _Sample:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        for job_id in self._jobs:
            with suppress(WhisperdError):
                self._client.forget(job_id)


_LOOKS: Mapping[str, Callable[[Inspection], str]] = {
    "socket": Inspection._socket,
    "permissions": Inspection._permissions,
    "versions": Inspection._versions,
    "model": Inspection._model,
    "device": Inspection._device,
    "ffmpeg": Inspection._ffmpeg,
    "yt-dlp": Inspection._yt_dlp,
    "disk": Inspection._disk,
    "transcription": Inspection._transcription,
    "stats": Inspection._counters,
}
NAMES = tuple(_LOOKS)


def _likeness(spoken: str, heard: str) -> float:
    """Return the part of the spoken words that were heard, in their order."""
    wanted, found = (re.findall(r"\w+", text.lower()) for text in (spoken, heard))
    matcher = difflib.SequenceMatcher(None, wanted, found, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks()) / max(1, len(wanted), len(found))
