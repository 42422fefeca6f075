"""Clients of every manner: they submit, ask again, cancel, retry, forget, follow, vanish, and come back."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.support import PLAIN_OPTIONS, RawClient
from torture.book import Book, Request
from torture.report import Report
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.frames import encode_frame

# Refusals that a submit may meet while disks fill and daemons stop.
_BUSY = {ErrorCode.STORAGE_FULL, ErrorCode.QUEUE_FULL, ErrorCode.STOPPING, ErrorCode.UNAVAILABLE, ErrorCode.TIMED_OUT}
_ANSWER_S = 60.0
# What a client does next, and how often.
_WEIGHTS = {
    "submit": 50,
    "submit and vanish": 8,
    "ask again": 10,
    "cancel": 6,
    "retry": 6,
    "forget": 4,
    "follow": 10,
    "list": 3,
    "send rubbish": 3,
}


class _Leave(Exception):
    """This connection is done with."""


class Follower:
    """What somebody who follows a job has seen: numbers without a gap, whatever was cut off in between."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.last_seq: dict[int, int] = {}

    def see(self, job_id: int, event: Mapping[str, Any]) -> None:
        """Take one event."""
        if "seq" in event:
            wanted = self.last_seq.get(job_id, 0) + 1
            if event["seq"] != wanted:
                self._report.violate(f"job {job_id}: event {event['seq']} came where {wanted} was next")
            self.last_seq[job_id] = event["seq"]


class Client(threading.Thread):
    """One program, with a random mind of its own. It submits only while fewer than `deep` jobs wait."""

    def __init__(self, number: int, seed: str, path: Path, book: Book, report: Report, *, deep: int) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self._random = Random(f"{seed}:client:{number}")
        self._path, self._book, self._report, self._deep = path, book, report, deep
        self._recordings: Sequence[Path] = sorted(book.tokens)
        self._stopped = threading.Event()
        self._requests = 0
        self._mine: list[Request] = []
        self._follower = Follower(report)

    def stop(self) -> None:
        """End after the next step."""
        self._stopped.set()

    def run(self) -> None:
        """Connect, do a few things, leave or be cut off, come back."""
        while not self._stopped.is_set():
            try:
                with RawClient(self._path) as client:
                    for _ in range(self._random.randint(1, 12)):
                        if self._stopped.is_set():
                            return
                        self._step(client)
            except _Leave:
                pass
            except (OSError, EOFError, TimeoutError):
                self._report.count("connections cut off, or not to be had")
                self._stopped.wait(self._random.uniform(0.02, 0.3))
            except Exception as error:  # an answer that the protocol does not know, for one
                self._report.violate(f"a client met {error!r}")

    def _step(self, client: RawClient) -> None:
        what = self._random.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        jobs = self._book.sample()
        if what in ("cancel", "retry", "forget", "follow") and not jobs:
            return
        adds = what in ("submit", "submit and vanish", "retry")
        if adds and client.call("health", timeout_s=_ANSWER_S)["queue"]["depth"] > self._deep:
            self._stopped.wait(0.1)
            return
        try:
            match what:
                case "submit":
                    submit(client, self._book, self._new_request())
                case "submit and vanish":
                    self._submit_and_vanish()
                case "ask again" if self._mine:
                    submit(client, self._book, self._random.choice(self._mine[-20:]))
                case "cancel":
                    client.call("cancel", job=self._random.choice(jobs), timeout_s=_ANSWER_S)
                case "retry":
                    self._retry(client, self._random.choice(jobs))
                case "forget":
                    self._forget(client, self._random.choice(jobs[: len(jobs) // 4 + 1]))
                case "follow":
                    self._follow(client, self._random.choice(jobs[-10:]))
                case "list":
                    client.call("jobs", limit=50, timeout_s=_ANSWER_S)
                case "send rubbish":
                    self._send_rubbish()
            self._report.count(f"clients: {what}")
        except _Leave:
            self._report.count(f"clients: {what}")
            raise
        except WhisperdError as error:
            self._report.count(f"clients: {what} refused ({error.code})")
            expected = _BUSY | {ErrorCode.BAD_REQUEST, ErrorCode.NOT_FOUND, ErrorCode.CANCELLED}
            self._report.require(error.code in expected, f"{what} was answered {error.code}: {error.message}")

    def _new_request(self) -> Request:
        self._requests += 1
        request = Request(
            key=f"{self.name}-{self._requests}",
            recording=self._random.choice(self._recordings),
            interactive=self._random.random() < 0.2,
            fresh=self._random.random() < 0.7,
        )
        self._mine.append(request)
        return request

    def _submit_and_vanish(self) -> None:
        """Hang up before the answer: the job may be there or not, but not twice."""
        request = self._new_request()
        self._book.ask(request)
        with RawClient(self._path) as client, request.recording.open("rb") as file:
            client.send("submit", descriptors=[file.fileno()], **submit_params(request))

    def _retry(self, client: RawClient, job_id: int) -> None:
        self._book.ask_retry()
        recording = self._book.recording(job_id)
        try:
            again = client.call("retry", job=job_id, timeout_s=_ANSWER_S)["job"]["id"]
        except WhisperdError:
            self._book.retry_answered(None, recording)
            raise
        self._book.retry_answered(again, recording)

    def _forget(self, client: RawClient, job_id: int) -> None:
        self._book.forget(job_id)
        try:
            client.call("forget", job=job_id, timeout_s=_ANSWER_S)
        except WhisperdError as error:
            self._book.forget_answered(job_id, gone=error.code == ErrorCode.NOT_FOUND)
            raise
        self._book.forget_answered(job_id, gone=True)

    def _follow(self, client: RawClient, job_id: int) -> None:
        """Hear a few events, from where we were, and leave."""
        number = client.send("subscribe", job=job_id, after_seq=self._follower.last_seq.get(job_id, 0))
        reply = client.reply(number, _ANSWER_S)
        if not reply["ok"]:
            raise WhisperdError(reply["error"]["code"], reply["error"]["message"])
        for _ in range(self._random.randint(1, 8)):
            if reply["result"]["last_seq"] <= self._follower.last_seq.get(job_id, 0):
                break  # nothing more is sure to come
            event = client.receive_until(lambda message: "event" in message and message["id"] == number, _ANSWER_S)
            self._follower.see(job_id, event)
        raise _Leave  # the only way to stop following

    def _send_rubbish(self) -> None:
        with socket.socket(socket.AF_UNIX) as rubbish:
            rubbish.connect(str(self._path))
            frame = bytearray(encode_frame({"id": 1, "op": "health", "params": {}}))
            frame[self._random.randrange(len(frame))] ^= 1 << self._random.randrange(8)
            rubbish.sendall(frame)


def submit(client: RawClient, book: Book, request: Request) -> None:
    """Submit and note the acknowledgement. Raises what `RawClient.call` raises."""
    asked_before = book.ask(request)
    try:
        with request.recording.open("rb") as file:
            answer = client.call("submit", descriptors=[file.fileno()], timeout_s=_ANSWER_S, **submit_params(request))
    except WhisperdError:
        book.refused(request, asked_before=asked_before)
        raise
    book.acknowledge(request, answer["job"]["id"], asked_before=asked_before)


def submit_params(request: Request) -> dict[str, Any]:
    """Return a request as it travels."""
    return {
        "source": {"kind": "fd", "name": request.recording.name},
        "options": PLAIN_OPTIONS,
        "priority": "interactive" if request.interactive else "background",
        "key": request.key,
        "fresh": request.fresh,
    }
