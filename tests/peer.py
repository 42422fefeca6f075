"""The daemon's side of the socket in a thread: it speaks the protocol and does what the test says, no work of its own.

For tests of the client and the command line: what a daemon does at a moment that a real one seldom meets.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from whisperd.protocol.channel import Channel
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.frames import MAX_REQUEST_BYTES
from whisperd.protocol.messages import Request, error_reply, ok_reply, parse_request, request_id, source_to_wire

ENDED = ("done", "failed", "cancelled")


class Peer:
    """Listens on a socket; `stop` and `start` are a restart that keeps its jobs.

    `refuse[op]` is an error to answer with; `silent` operations are never answered; `drop[op]` closes the connection
    that many times instead of answering; `submitted` holds the bytes of each descriptor that came.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.jobs: dict[int, dict[str, Any]] = {}
        self.events: dict[int, list[dict[str, Any]]] = {}
        self.transcripts: dict[int, dict[str, Any]] = {}
        self.keys: dict[str, int] = {}
        self.attached: dict[int, set[Channel]] = {}
        self.submitted: list[bytes] = []
        self.requests: list[Request] = []
        self.refuse: dict[str, WhisperdError] = {}
        self.silent: set[str] = set()
        self.drop: dict[str, int] = {}
        self.on_submit: Callable[[int], None] = lambda job_id: None
        self.health: dict[str, Any] = {
            "status": "ready", "version": "0.1.0", "protocol": 1, "pid": 1, "uptime_s": 5.0, "problems": [],
            "model": {"name": "micro", "state": "ready", "device": "cpu", "dtype": "float32", "error": None},
            "queue": {"depth": 0, "capacity": 1000},
        }  # fmt: skip
        self.stats: dict[str, Any] = {}
        self.hello: dict[str, Any] = {
            "protocol": 1, "server": "whisperd", "version": "0.1.0", "uid": os.geteuid(), "admin": False,
        }  # fmt: skip
        self.changed = threading.Condition()
        self._channels: list[Channel] = []
        self._subscribers: list[tuple[Channel, int, int, int]] = []  # channel, request, job, after_seq
        self.start()

    # --- being there ---

    def start(self) -> None:
        """Listen (again)."""
        with suppress(FileNotFoundError):
            self.path.unlink()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Go away, as a killed daemon does: the socket file stays behind."""
        # close() alone would not wake accept(), which keeps the listening socket alive.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        """Close every connection."""
        with self.changed:
            channels, self._channels = self._channels, []
        for channel in channels:
            with suppress(OSError):
                channel.socket.shutdown(socket.SHUT_RDWR)

    @property
    def connections(self) -> int:
        """How many clients are connected now."""
        return len(self._channels)

    @property
    def subscribers(self) -> int:
        """How many subscriptions are open now."""
        return len(self._subscribers)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                channel = Channel(sock, max_bytes=MAX_REQUEST_BYTES, descriptors=True)
                with self.changed:
                    self._channels.append(channel)
                threading.Thread(target=self._serve, args=(channel,), daemon=True).start()

    def _serve(self, channel: Channel) -> None:
        try:
            while True:
                message, descriptors = channel.receive()
                try:
                    request = parse_request(message)
                except WhisperdError as error:
                    for fd in descriptors:
                        os.close(fd)
                    channel.send(error_reply(request_id(message), error))
                    continue
                with self.changed:
                    self.requests.append(request)
                    self.changed.notify_all()
                if self.drop.get(request.op, 0) > 0:
                    self.drop[request.op] -= 1
                    return
                if request.op not in self.silent:
                    threading.Thread(target=self._answer, args=(channel, request, descriptors), daemon=True).start()
        except (OSError, EOFError):
            pass
        finally:
            with suppress(OSError):
                channel.socket.shutdown(socket.SHUT_RDWR)
            with self.changed:
                if channel in self._channels:
                    self._channels.remove(channel)
                self._subscribers = [each for each in self._subscribers if each[0] is not channel]
                for holders in self.attached.values():
                    holders.discard(channel)
                self.changed.notify_all()

    def _answer(self, channel: Channel, request: Request, descriptors: list[int]) -> None:
        with suppress(OSError):
            try:
                if request.op in self.refuse:
                    raise self.refuse[request.op]
                result = _OPERATIONS[request.op](self, request, channel, descriptors)
                reply = None if result is None else ok_reply(request.id, result)
            except WhisperdError as error:
                reply = error_reply(request.id, error)
            finally:
                for fd in descriptors:  # before the reply: who has it may count the descriptors of this process
                    os.close(fd)
            if reply is not None:
                channel.send(reply)

    # --- what the test makes happen ---

    def add_job(self, **fields: Any) -> int:
        """Put a job there, as if it had been submitted; return its id."""
        with self.changed:
            job_id = len(self.jobs) + 1
            self.jobs[job_id] = {
                "id": job_id, "state": "queued", "priority": "background", "uid": os.getuid(), "options": {},
                "source": {"kind": "fd", "name": "talk.m4a"}, "submitted_at": time.time(), "position": 1,
            } | fields  # fmt: skip
            # As of a real daemon, the first event of a file's job says that it waits.
            self.events[job_id] = [{"event": "state", "job": job_id, "state": "queued", "seq": 1}]
            self.changed.notify_all()
        return job_id

    def say(self, job_id: int, event: str, **fields: Any) -> None:
        """Record and push an event; `state` and `end` move the job, `progress` is pushed only."""
        with self.changed:
            message = {"event": event, "job": job_id, **fields}
            if event != "progress":
                self.events[job_id].append(message | {"seq": len(self.events[job_id]) + 1})
            if "state" in fields:
                self.jobs[job_id]["state"] = fields["state"]
            if fields.get("error"):
                self.jobs[job_id]["error"] = fields["error"]
            self._push()
            if event == "progress":
                for channel, number, job, _ in self._subscribers:
                    if job == job_id:
                        channel.send(message | {"id": number})
            self.changed.notify_all()

    def hear(self, job_id: int, *texts: str) -> None:
        """Push a segment for each text; after a `discard` they are counted anew."""
        place = 0
        for event in self.events[job_id]:
            place = 0 if event.get("discard") else place + (event["event"] == "segment")
        for index, text in enumerate(texts, place):
            self.say(job_id, "segment", segment=segment(index, text))

    def finish(self, job_id: int, *texts: str, **more: Any) -> None:
        """End a job with a transcript of these segments."""
        self.transcripts[job_id] = transcript(*texts) | more
        self.jobs[job_id].update(started_at=time.time() - 2, ended_at=time.time(), audio_s=2.0 * len(texts))
        self.say(job_id, "end", state="done", error=None)

    def fail(self, job_id: int, code: str, message: str) -> None:
        """End a job with an error."""
        self.say(job_id, "end", state="failed", error={"code": code, "message": message})

    def transcribe_at_once(self, *texts: str) -> None:
        """Finish each job the moment it is submitted."""

        def finish(job_id: int) -> None:
            self.say(job_id, "state", state="running")
            self.hear(job_id, *texts)
            self.finish(job_id, *texts)

        self.on_submit = finish

    def wait_for(self, predicate: Callable[[], Any], timeout_s: float = 20) -> None:
        """Wait until something holds of what the clients have done."""
        with self.changed:
            assert self.changed.wait_for(predicate, timeout_s), "waited in vain"

    def seen(self, op: str) -> int:
        """Return how many requests of an operation have come."""
        return sum(request.op == op for request in self.requests)

    def _push(self) -> None:
        for index, (channel, number, job_id, after_seq) in enumerate(self._subscribers):
            for event in self.events[job_id][after_seq:]:
                with suppress(OSError):
                    channel.send(event | {"id": number})
            self._subscribers[index] = (channel, number, job_id, len(self.events[job_id]))

    # --- the operations ---

    def _job(self, job_id: int) -> dict[str, Any]:
        if job_id not in self.jobs:
            raise WhisperdError("not_found", f"there is no job {job_id}")
        return self.jobs[job_id]

    def _submit(self, request: Request, channel: Channel, descriptors: list[int]) -> Mapping[str, Any]:
        params: Any = request.params
        for fd in descriptors:
            self.submitted.append(os.pread(fd, os.fstat(fd).st_size, 0))
        known = self.keys.get(params.key)
        job_id = known or self.add_job(
            source=source_to_wire(params.source), priority=str(params.priority), options=dict(params.options)
        )
        with self.changed:
            if params.key:
                self.keys[params.key] = job_id
            if params.attached:
                self.attached.setdefault(job_id, set()).add(channel)
            self.changed.notify_all()
        if not known:
            self.on_submit(job_id)
        return {"job": self.jobs[job_id], "reused": bool(known)}

    def _result(self, request: Request, channel: Channel, descriptors: list[int]) -> Mapping[str, Any]:
        params: Any = request.params
        job = self._job(params.job)
        with self.changed:
            self.changed.wait_for(lambda: job["state"] in ENDED, params.wait_s)
        return {"job": job, "transcript": self.transcripts.get(params.job)}

    def _jobs(self, request: Request, channel: Channel, descriptors: list[int]) -> Mapping[str, Any]:
        params: Any = request.params
        found = [
            job
            for job in reversed(self.jobs.values())
            if params.state in (None, job["state"]) and (params.before is None or job["id"] < params.before)
        ]
        return {"jobs": found[: params.limit], "more": len(found) > params.limit}

    def _cancel(self, request: Request, channel: Channel, descriptors: list[int]) -> Mapping[str, Any]:
        params: Any = request.params
        if self._job(params.job)["state"] not in ENDED:
            self.say(params.job, "end", state="cancelled", error=None)
        return {"job": self.jobs[params.job]}

    def _forget(self, request: Request, channel: Channel, descriptors: list[int]) -> Mapping[str, Any]:
        params: Any = request.params
        self._job(params.job)
        return {"job": self.jobs.pop(params.job)}

    def _retry(self, request: Request, channel: Channel, descriptors: list[int]) -> Mapping[str, Any]:
        params: Any = request.params
        return {"job": self.jobs[self.add_job(source=self._job(params.job)["source"])]}

    def _subscribe(self, request: Request, channel: Channel, descriptors: list[int]) -> None:
        params: Any = request.params
        job = self._job(params.job)
        with self.changed:
            channel.send(ok_reply(request.id, {"job": job, "last_seq": len(self.events[params.job])}))
            self._subscribers.append((channel, request.id, params.job, params.after_seq))
            self._push()
            self.changed.notify_all()

    def _status(self, request: Request, channel: Channel, descriptors: list[int]) -> Mapping[str, Any]:
        self.health["status"] = "paused" if request.op == "pause" else "ready"
        return {"status": self.health["status"]}


_OPERATIONS: Mapping[str, Callable[[Peer, Request, Channel, list[int]], Mapping[str, Any] | None]] = {
    "hello": lambda peer, *_: peer.hello,
    "health": lambda peer, *_: peer.health,
    "stats": lambda peer, *_: peer.stats,
    "model": lambda peer, *_: {"model": peer.health["model"]},
    "submit": Peer._submit,
    "result": Peer._result,
    "jobs": Peer._jobs,
    "cancel": Peer._cancel,
    "forget": Peer._forget,
    "retry": Peer._retry,
    "subscribe": Peer._subscribe,
    "pause": Peer._status,
    "resume": Peer._status,
}


def segment(index: int, text: str) -> dict[str, Any]:
    """Return a Segment map of two seconds."""
    return {
        "id": index, "start": 2.0 * index, "end": 2.0 * index + 2, "text": f" {text}", "tokens": [1, 2],
        "temperature": 0.0, "avg_logprob": -0.2, "compression_ratio": 1.1, "no_speech_prob": 0.01,
    }  # fmt: skip


def transcript(*texts: str) -> dict[str, Any]:
    """Return a Transcript map."""
    return {
        "text": "".join(f" {text}" for text in texts), "language": "en", "duration_s": 2.0 * len(texts),
        "segments": [segment(index, text) for index, text in enumerate(texts)], "model": "micro", "versions": {},
    }  # fmt: skip
