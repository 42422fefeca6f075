"""Kills, floods and disk trouble, while clients of every manner work; then the oracle looks at every job."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import wave
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.models import micro_checkpoint
from tests.support import PLAIN_OPTIONS, RawClient, running_daemon
from torture.book import Book
from torture.clients import Client
from torture.machine import HELPERS, Victim, victim
from torture.oracle import judge, judge_remains, tokens_of
from torture.report import Report

_LENGTHS_S = (1, 2, 3, 5, 20, 40, 65)
_DISK = "128m"
# Deaths are tried again at once, and nothing waits long: more happens in a minute.
SETTINGS: dict[str, Any] = {
    "helper_backoff_s": 0.02,
    "helper_backoff_max_s": 0.2,
    "heartbeat_timeout_s": 5,
    "copy_timeout_s": 5,
    "decode_timeout_s": 5,
    "stall_timeout_s": 10,
    "cancel_grace_s": 0.5,
    # Above what decoding wants free (twice the ballast), else what waits could fill the disk and nothing be decoded.
    "min_free_bytes": 24 * 2**20,
    "max_audio_s": 600,
    # Else the disk is full of what was cancelled, and hardly a submit gets in.
    "keep_failed_audio_hours": 0.005,
}
_DAEMON_ENDS = {"kill -9": signal.SIGKILL, "segmentation fault": signal.SIGSEGV, "stop": signal.SIGTERM}
_HELPER_HURTS = ("KILL", "SEGV", "STOP", "memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how hard: it ends after `minutes`, or after `kills` of daemon and helpers if those come first."""

    seed: int = 1
    minutes: float = 10.0
    kills: int = 10_000
    pause_s: float = 0.8  # between two blows, on average
    clients: int = 5
    deep: int = 25  # clients submit while fewer jobs wait: all of them must end before the oracle can judge


def torture(plan: Plan) -> Report:
    """Do it and return what was tried and what was lost."""
    report = Report(f"kills, seed {plan.seed}")
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        model = micro_checkpoint(folder)
        recordings = write_recordings(folder, Random(f"{plan.seed}:recordings"))
        tokens = undisturbed(model, recordings)
        disk = _DISK if os.geteuid() == 0 else None
        with victim(report, disk=disk, model=str(model), **SETTINGS) as target:
            _run(plan, target, Book(tokens), report)
    finally:
        shutil.rmtree(folder)
        report.end()
    return report


def write_recordings(folder: Path, random: Random, lengths_s: Sequence[int] = _LENGTHS_S) -> list[Path]:
    """Write noise by the seed, which has the same tokens each time; return the paths."""
    paths = []
    for number, seconds in enumerate(lengths_s):
        samples = np.random.default_rng(random.getrandbits(32)).integers(-3000, 3000, seconds * 16_000, dtype=np.int16)
        paths.append(folder / f"noise-{number}.wav")
        with wave.open(str(paths[-1]), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(samples.tobytes())
    return paths


def undisturbed(model: Path, recordings: list[Path]) -> Mapping[Path, list[list[int]]]:
    """Return the tokens of each recording from a daemon that nobody harms."""
    with running_daemon(model=str(model), ready=True) as daemon, daemon.client() as client:
        jobs = {path: client.submit(path, options=PLAIN_OPTIONS)["id"] for path in recordings}
        return {path: tokens_of(client.result(job)["transcript"]) for path, job in jobs.items()}


def _run(plan: Plan, target: Victim, book: Book, report: Report) -> None:
    target.start()
    path = target.daemon.socket
    clients = [Client(number, str(plan.seed), path, book, report, deep=plan.deep) for number in range(plan.clients)]
    for client in clients:
        client.start()
    _Blows(plan, target, report).deal()
    _calm(target)
    for client in clients:
        client.stop()
    for client in clients:
        client.join()
    _load_model(target, report)
    target.daemon.wait_ready(120)
    judge(path, book, report)
    report.count("submits acknowledged", len(book.acknowledged))
    target.end(signal.SIGTERM)
    target.daemon.process = None
    judge_remains(target, report)


def _calm(target: Victim) -> None:
    target.empty_disk()
    target.check_alive()


def _load_model(target: Victim, report: Report) -> None:
    """Ask for the model where it was killed so often while it was loaded that the daemon waits for an administrator."""
    with target.daemon.client() as client:
        if client.call("health")["model"]["state"] == "failed":
            report.count("loads of the model that an administrator had to ask for")
            client.call("model", action="load")


class _Blows:
    """Deals one blow after the other, by the seed."""

    def __init__(self, plan: Plan, target: Victim, report: Report) -> None:
        self._plan, self._target, self._report = plan, target, report
        self._random = Random(f"{plan.seed}:blows")
        self._kills = 0
        blows: list[tuple[Callable[[], None], int]] = [
            (self._end_daemon, 25),
            (self._hurt_helper, 60),
            (self._stand_still, 5),
            (self._flood, 5),
        ]
        if target.has_small_disk:
            blows.append((self._turn_disk, 10))
        self._blows, self._weights = zip(*blows, strict=True)

    def deal(self) -> None:
        """Go on until the plan says that it is enough."""
        deadline = time.monotonic() + self._plan.minutes * 60
        while time.monotonic() < deadline and self._kills < self._plan.kills:
            time.sleep(self._random.expovariate(1 / self._plan.pause_s))
            if self._random.random() < 0.04:
                time.sleep(6)  # long enough for the model to load and get on
            self._target.check_alive()
            self._random.choices(self._blows, self._weights)[0]()

    def _killed(self, what: str) -> None:
        self._kills += 1
        self._report.count(what)
        self._report.count("kills in all")

    def _end_daemon(self) -> None:
        how = self._random.choice(list(_DAEMON_ENDS))
        self._target.end(_DAEMON_ENDS[how])
        self._killed(f"daemon: {how}")
        if self._target.full and self._random.random() < 0.5:
            self._target.empty_disk()
        self._target.start()

    def _hurt_helper(self) -> None:
        module, how = self._random.choice(HELPERS), self._random.choice(_HELPER_HURTS)
        if self._target.hurt_helper(self._random, module, how):
            self._killed(f"{module.split('.')[-2]} {module.split('.')[-1]}: {how}")

    def _stand_still(self) -> None:
        self._target.stand_still(self._random.uniform(0.05, 1.0))
        self._report.count("daemon: stood still for a while")

    def _flood(self) -> None:
        """Many connections at once that say half a sentence and vanish."""
        try:
            crowd = [RawClient(self._target.daemon.socket) for _ in range(100)]
        except OSError:
            return
        for client in crowd:
            with suppress(OSError):
                client.send_bytes(b"\0\0\0\x30\x83\xa2id")
            client.close()
        self._report.count("floods of 100 connections")

    def _turn_disk(self) -> None:
        if self._target.full:
            self._target.empty_disk()
        else:
            self._target.fill_disk()
            self._report.count("full disks")
