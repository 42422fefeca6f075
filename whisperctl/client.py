"""The Python client: hand a recording over, get the words back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from whisperctl.connection import seconds_left
from whisperctl.errors import BadRequest, JobTimeout, refusal
from whisperctl.holds import Hold, Holds
from whisperctl.link import Link
from whisperctl.results import Event, Result, Segment, Transcript
from whisperctl.sources import OpenSource, Source, open_source
from whisperctl.uploading import Progress, upload, upload_source
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.jobs import Job, Priority
from whisperd.protocol.messages import MAX_JOBS_LIMIT

_RECONNECT_S = 60.0
_ANSWER_S = 10.0  # for a reply to travel, on top of what the daemon was asked to wait


class Client:
    """Talks to the daemon; one may be shared by threads, and waiting in one does not hold up the others.

    `socket` is the daemon's path; without it $WHISPERD_SOCKET, else the first usual place that answers. `timeout_s`
    bounds short requests. A daemon that goes away is tried again for `reconnect_s`: requests are then repeated, a
    submit under its key, so that nothing happens twice. Every method may raise `WhisperdError` and its children,
    `DaemonUnreachable` among them, and `RuntimeError` in a forked child, which needs a Client of its own.
    `notify` is told in a few words when the daemon has gone, and "" when it is back.
    """

    def __init__(
        self,
        socket: str | os.PathLike[str] | None = None,
        timeout_s: float = 30.0,
        *,
        reconnect_s: float = _RECONNECT_S,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self._holds = Holds()
        self._link = Link(
            socket,
            timeout_s=timeout_s,
            reconnect_s=reconnect_s,
            greet=self._holds.submit_all,
            needed=lambda: bool(self._holds),
            notify=notify or (lambda words: None),
        )

    def transcribe(
        self,
        source: Source,
        *,
        timeout_s: float | None = None,
        on_segment: Callable[[Segment], None] | None = None,
        **options: Any,
    ) -> Transcript:
        """Hand over a recording before all background work and return its transcript.

        `source` is a path, a file object or a descriptor; `options` are openai-whisper's. `on_segment` is called with
        each segment as it is decoded (at once where the transcript was there); should the work begin anew, with those
        again. Raises `JobFailed`, `JobCancelled`, and `JobTimeout` after `timeout_s`: the job then goes on under its
        `job_id`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        job = self.submit(source, priority=Priority.INTERACTIVE, timeout_s=timeout_s, **options)
        if on_segment is not None and not job.ended:
            for event in self.follow(job.id, timeout_s=seconds_left(deadline)):
                if event.segment is not None:
                    on_segment(event.segment)
        transcript = self.result(job.id, wait=True, timeout_s=seconds_left(deadline)).require()
        if on_segment is not None and job.ended:
            for segment in transcript.segments:
                on_segment(segment)
        return transcript

    def submit(
        self,
        source: Source,
        *,
        priority: str = Priority.BACKGROUND,
        key: str | None = None,
        attached: bool = False,
        fresh: bool = False,
        name: str | None = None,
        timeout_s: float | None = None,
        on_upload: Progress = lambda sent_bytes, size_bytes: None,
        options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Job:
        """Hand over a recording and return its job, once the daemon has it safe on its own disk.

        `key` makes a repeated submit the same job (without one, a random key serves this call). `attached` ties the
        job to this client: it is cancelled when the client goes. `fresh` computes anew what is known already.
        openai-whisper's options are given by their names, or as a mapping where those come from elsewhere: `options`.
        Where no descriptor gets through to the daemon (a forwarded socket) the bytes are sent, and `on_upload` is
        called with how many have arrived, and of how many (None: not known).
        Raises `SourceUnreadable`, `QueueFull`, `StorageFull`, `BadRequest`, and `JobTimeout` after `timeout_s`.
        """
        opened = open_source(source, name=name)
        wire = {"kind": "fd", "name": opened.name}
        params = _submit_params(wire, priority, key, attached, fresh, {**(options or {}), **more})
        return self._submit(params, opened, timeout_s, on_upload)

    def submit_video(
        self,
        video_id: str,
        *,
        priority: str = Priority.BACKGROUND,
        key: str | None = None,
        attached: bool = False,
        fresh: bool = False,
        timeout_s: float | None = None,
        options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Job:
        """Have the daemon fetch a YouTube video by its id; otherwise as `submit`."""
        source = {"kind": "video", "id": video_id}
        params = _submit_params(source, priority, key, attached, fresh, {**(options or {}), **more})
        return self._submit(params, None, timeout_s)

    def submit_url(
        self,
        url: str,
        *,
        priority: str = Priority.BACKGROUND,
        key: str | None = None,
        attached: bool = False,
        fresh: bool = False,
        timeout_s: float | None = None,
        options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Job:
        """Have the daemon fetch an http(s) address; otherwise as `submit`."""
        source = {"kind": "url", "url": url}
        params = _submit_params(source, priority, key, attached, fresh, {**(options or {}), **more})
        return self._submit(params, None, timeout_s)

    def result(self, job_id: int, wait: bool = False, timeout_s: float | None = None) -> Result:
        """Return a job with its transcript, None unless it is done; with `wait` once it has ended.

        A failed job is a result as well: `Result.text` and `Result.require` raise what it failed of. Raises
        `NotFound`, and `JobTimeout` when it has not ended after `timeout_s`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            wait_s = seconds_left(deadline) if wait else 0
            limit_s = None if wait_s is None else wait_s + _ANSWER_S
            try:
                reply = self._link.call("result", {"job": job_id, "wait_s": wait_s}, waits=wait, timeout_s=limit_s)
            except TimeoutError:
                raise _not_in_time(job_id) from None
            result = _read_result(reply)
            if result.job.ended:
                self._holds.release(job_id)
                return result
            if not wait:
                return result
            if deadline is not None and not seconds_left(deadline):
                raise _not_in_time(job_id)

    def follow(self, job_id: int, after_seq: int = 0, *, timeout_s: float | None = None) -> Iterator[Event]:
        """Yield a job's events, from its first or after `after_seq`, until its `end`; across restarts of the daemon.

        No event with a `seq` is missed or repeated; `progress` may be skipped. Raises `NotFound`, and `JobTimeout`
        when the job has not ended after `timeout_s`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            for message, is_event in self._link.events(job_id, after_seq, deadline=deadline):
                if is_event:
                    event = Event.from_wire(message)
                    after_seq = max(after_seq, event.seq or 0)
                else:
                    job = Job.from_wire(message["job"])
                    if not job.ended or message.get("last_seq", 0) > after_seq:
                        continue  # its events come by themselves
                    event = Event(kind="end", job_id=job.id, state=job.state, error=job.error)
                if event.kind == "end":
                    self._holds.release(job_id)
                yield event
                if event.kind == "end":
                    return
        except TimeoutError:
            raise _not_in_time(job_id) from None

    def job(self, job_id: int) -> Job:
        """Return one job. Raises `NotFound`."""
        return self.result(job_id).job

    def jobs(
        self,
        *,
        state: str | None = None,
        limit: int = 50,
        before: int | None = None,
        all_users: bool = False,
    ) -> list[Job]:
        """Return up to `limit` jobs, newest first: one's own, or everybody's (`all_users`, for admins)."""
        jobs: list[Job] = []
        while len(jobs) < limit:
            params: dict[str, Any] = {"limit": min(limit - len(jobs), MAX_JOBS_LIMIT), "all": all_users}
            if state is not None:
                params["state"] = str(state)
            if before is not None:
                params["before"] = before
            reply = self._link.call("jobs", params)
            jobs += map(Job.from_wire, reply["jobs"])
            if not reply.get("more") or not jobs:
                break
            before = jobs[-1].id
        return jobs

    def cancel(self, job_id: int) -> Job:
        """Cancel a job and return it; one that has ended comes back unchanged. Raises `NotFound`."""
        job = Job.from_wire(self._link.call("cancel", {"job": job_id})["job"])
        self._holds.release(job_id)
        return job

    def retry(self, job_id: int) -> Job:
        """Return a new job for the recording of a failed or cancelled one, while its audio is kept."""
        return Job.from_wire(self._link.call("retry", {"job": job_id}, resend=False)["job"])

    def forget(self, job_id: int) -> Job:
        """Delete an ended job, with its audio, transcript and key; return what it was."""
        return Job.from_wire(self._link.call("forget", {"job": job_id})["job"])

    def hello(self) -> dict[str, Any]:
        """Return who answers, `server` and `version`, and whom it takes us for, `uid` and `admin`."""
        return self._link.call("hello", {}, patient=False)

    def stats(self, *, inspect: bool = False) -> dict[str, Any]:
        """Return the daemon's counters and gauges, as docs/protocol.md names them.

        With `inspect` it first waits until its helpers have told the versions of their libraries.
        """
        return self._link.call("stats", {"inspect": True} if inspect else {})

    def health(self) -> dict[str, Any]:
        """Return how the daemon is; a daemon that is gone is told of at once, not waited for."""
        return self._link.call("health", {}, patient=False)

    def model(self, action: str) -> dict[str, Any]:
        """`load` or `unload` the model (admins) and return its state, as in `health`."""
        model: dict[str, Any] = self._link.call("model", {"action": action})["model"]
        return model

    def pull_model(
        self,
        name: str,
        *,
        on_progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
        on_retry: Callable[[WhisperdError, float], None] = lambda error, wait_s: None,
    ) -> str:
        """Have a model downloaded (admins), unless it is there, and return where it lies.

        `on_progress(done_bytes, total_bytes)` is told how far it is, `on_retry(error, wait_s)` what keeps it from
        getting further and when it is tried again. It is given up when the last client that waits
        leaves; what has arrived stays for the next time. Raises `BadRequest` for a name that is none, and why it
        does not come.
        """
        for message, is_event in self._link.stream("pull", {"model": name}):
            if is_event and message["event"] == "progress":
                on_progress(message["done_bytes"], message["total_bytes"])
            elif is_event and message["event"] == "retry":
                on_retry(refusal(message["error"]), message["wait_s"])
            elif is_event and message["event"] == "end":
                if message["error"] is not None:
                    raise refusal(message["error"])
                return str(message["path"])
        raise AssertionError("a pull has an end")

    def pause(self, *, free_gpu: bool = False) -> str:
        """Let accepted jobs wait (admins), and with `free_gpu` give the device's memory back; return the status."""
        return str(self._link.call("pause", {"free_gpu": free_gpu})["status"])

    def resume(self) -> str:
        """Go on after `pause` (admins); return the status."""
        return str(self._link.call("resume", {})["status"])

    @property
    def socket_path(self) -> str:
        """The socket that answered, or the first that would be tried."""
        return self._link.path

    def close(self) -> None:
        """Leave: requests of other threads fail, attached jobs lose this holder."""
        self._link.close()
        self._holds.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _submit(
        self,
        params: dict[str, Any],
        opened: OpenSource | None,
        timeout_s: float | None,
        on_upload: Progress = lambda sent_bytes, size_bytes: None,
    ) -> Job:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        hold = Hold(params, opened, None)
        kept = False
        try:
            descriptors = [] if opened is None else [opened.fd]
            try:
                reply = self._link.call("submit", params, descriptors, waits=True, timeout_s=timeout_s)
            except BadRequest as error:
                if opened is None or error.code != ErrorCode.NO_DESCRIPTOR:
                    raise
                # What carries the bytes to the daemon carries no descriptors.
                params = params | {"source": upload_source(opened)}
                reply, channel = upload(self._link, params, opened, deadline=deadline, progress=on_upload)
                hold = Hold(params, opened, channel)
            job = Job.from_wire(reply["job"])
            if params["attached"] and not job.ended:
                kept = self._holds.keep(job.id, hold)
            return job
        except TimeoutError:
            raise JobTimeout(
                f"whisperd had not taken the recording after {timeout_s:g} s; submit it again with the same key "
                "to find its job",
                job_id=None,
                key=params["key"],
            ) from None
        finally:
            if not kept:
                hold.close()


def _submit_params(
    source: Mapping[str, Any], priority: str, key: str | None, attached: bool, fresh: bool, options: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "source": source,
        "options": options,
        "priority": str(priority),
        "key": os.urandom(16).hex() if key is None else key,
        "attached": attached,
        "fresh": fresh,
    }


def _read_result(reply: Mapping[str, Any]) -> Result:
    transcript = reply.get("transcript")
    return Result(
        job=Job.from_wire(reply["job"]),
        transcript=None if transcript is None else Transcript.from_wire(transcript),
    )


def _not_in_time(job_id: int) -> JobTimeout:
    return JobTimeout(
        f"job {job_id} has not ended in the time given and goes on; ask again with 'whisperctl result {job_id}'",
        job_id=job_id,
    )
