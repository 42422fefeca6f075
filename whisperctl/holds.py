"""Attached jobs: submitted again, by their keys, on every new connection, so that the daemon keeps them."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from whisperctl.connection import Connection
from whisperctl.sources import OpenSource
from whisperd.protocol.channel import Channel


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

    def submit_all(self, connection: Connection) -> None:
        """Hold them by a new connection as well. Raises `ConnectionLost`, and `OSError` without a descriptor."""
        with self._lock:
            job_ids = list(self._held)
        for job_id in job_ids:
            with self._lock:
                if (hold := self._held.get(job_id)) is None:
                    continue
                descriptors = [os.dup(fd) for fd in hold.descriptors]  # the job may end, and its file be closed
            try:
                connection.post("submit", hold.params, descriptors)  # waits for a place where many are open
            finally:
                for fd in descriptors:
                    os.close(fd)

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
