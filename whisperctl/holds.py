"""Attached jobs: submitted again, by their keys, on every new connection, so that the daemon keeps them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from whisperctl.connection import Connection
from whisperctl.sources import OpenSource
from whisperd.protocol.channel import Channel
from whisperd.protocol.frames import FrameError

_ANSWER_S = 10.0  # the look at a key takes milliseconds


@dataclass(frozen=True, slots=True)
class Hold:
    """What keeps a job: its submit, and the recording that goes along, open.

    `channel` is the connection that an upload came by: until another one, it is the holder.
    """

    params: Mapping[str, Any]
    opened: OpenSource | None
    channel: Channel | None

    @property
    def descriptors(self) -> list[int]:
        """What goes along with the submit."""
        return [] if self.opened is None or self.channel is not None else [self.opened.fd]

    def close(self) -> None:
        """Let go: the job may end."""
        for held in (self.opened, self.channel):
            if held is not None:
                held.close()


class Holds:
    """The jobs that a client holds, by their ids. Any thread may call."""

    def __init__(self) -> None:
        self._held: dict[int, Hold] = {}
        self._lock = threading.Lock()
        self._renewing = threading.Lock()  # each connection of an upload has one successor at a time

    def __len__(self) -> int:
        return len(self._held)

    def keep(self, job_id: int, hold: Hold) -> bool:
        """Hold a job until its release; False where it is held already, and `hold` stays the caller's to close."""
        with self._lock:
            if job_id in self._held:
                return False
            # A list among the options is the caller's, who may change it while the job is held.
            self._held[job_id] = replace(hold, params=deepcopy(hold.params))
            return True

    def submit_all(self, connection: Connection, open_channel: Callable[[], Channel]) -> None:
        """Hold them by a new connection as well, the uploaded ones by new connections of their own.

        Raises `ConnectionLost`, `DaemonUnreachable`, and `OSError` without a descriptor.
        """
        try:
            self._submit_open(connection)
        finally:
            connection.greeted.set()
        with self._renewing:
            self._submit_uploaded(connection, open_channel)

    def _submit_open(self, connection: Connection) -> None:
        for job_id, _ in self._snapshot():
            with self._lock:
                hold = self._held.get(job_id)
                if hold is None or hold.channel is not None:
                    continue
                descriptors = [os.dup(fd) for fd in hold.descriptors]  # the job may end, and its file be closed
            try:
                connection.post("submit", hold.params, descriptors)  # waits for a place where many are open
            finally:
                for fd in descriptors:
                    os.close(fd)

    def _submit_uploaded(self, connection: Connection, open_channel: Callable[[], Channel]) -> None:
        """A connection has one upload at a time, and holds what it uploaded: each gets a new one in place of its old.

        No byte is sent: a known key needs none.
        """
        for job_id, hold in self._snapshot():
            if hold.channel is None:
                continue
            if connection.lost:  # and with it the daemon: the next one is greeted anew
                return
            channel = open_channel()
            useless = channel
            if _is_taken(channel, hold.params):
                with self._lock:
                    if self._held.get(job_id) is hold:
                        useless, self._held[job_id] = hold.channel, replace(hold, channel=channel)
            useless.close()

    def _snapshot(self) -> list[tuple[int, Hold]]:
        with self._lock:
            return list(self._held.items())

    def release(self, job_id: int) -> None:
        """Let go of a job that has ended, if it is held."""
        with self._lock:
            hold = self._held.pop(job_id, None)
        if hold is not None:
            hold.close()

    def close(self) -> None:
        """Let go of all: the daemon cancels whom nobody else holds."""
        with self._lock:
            held, self._held = self._held, {}
        for hold in held.values():
            hold.close()


def _is_taken(channel: Channel, params: Mapping[str, Any]) -> bool:
    """Submit; return whether the daemon knows the job. It asks for bytes, with silence, where the key is free again."""
    try:
        channel.send({"id": 1, "op": "submit", "params": params})
        reply, _ = channel.receive(_ANSWER_S)
    except (EOFError, OSError, FrameError):
        return False
    return bool(reply.get("ok"))
