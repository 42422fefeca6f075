"""Thousands of idle connections and hundreds of slow ones, while a second client asks for its health."""

from __future__ import annotations

import resource
import socket
import time
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

from bench.daemon import rss_mb
from torture.machine import victim
from torture.pinging import pinging
from torture.report import Report
from whisperd.protocol.frames import encode_frame

_ROUND_S = 1.0
_LONG_FRAME = encode_frame({"id": 1, "op": "cancel", "params": {"job": 1, "x": "y" * 3000}})
_MANY_QUESTIONS = b"".join(encode_frame({"id": number, "op": "stats", "params": {}}) for number in range(1, 60))


class _Slow:
    """Sends a byte a round, or asks much and reads nothing; comes back when it is cut off."""

    def __init__(self, path: Path, report: Report, *, reads_nothing: bool) -> None:
        self._path, self._report, self._reads_nothing = path, report, reads_nothing
        self._bytes = cycle(_LONG_FRAME)
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(self._path))
        self._socket.setblocking(False)
        if self._reads_nothing:
            self._socket.send(_MANY_QUESTIONS)

    def step(self) -> None:
        """Do a little."""
        try:
            if not self._reads_nothing:
                self._socket.send(bytes([next(self._bytes)]))
            elif not self._socket.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError
        except BlockingIOError:
            return
        except OSError:
            self._report.count("slow clients cut off")
            self.close()
            self._connect()

    def close(self) -> None:
        """Leave."""
        self._socket.close()


def crowd(idle: int, slow: int, seconds: float) -> Report:
    """Keep `idle` silent and `slow` slow clients connected for so long."""
    report = Report("a crowd")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    settings: dict[str, Any] = {"frame_timeout_s": 10, "send_timeout_s": 10, "log_level": "error"}
    with victim(report, model="/nowhere/model.pt", **settings) as target, ExitStack() as stack:
        target.start()
        path = target.daemon.socket
        with pinging(path, report):
            for _ in range(idle):
                connection = stack.enter_context(socket.socket(socket.AF_UNIX))
                connection.connect(str(path))
            crawlers = [_Slow(path, report, reads_nothing=bool(number % 2)) for number in range(slow)]
            for crawler in crawlers:
                stack.callback(crawler.close)
            report.count("idle connections", idle)
            report.count("slow connections", slow)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                for crawler in crawlers:
                    crawler.step()
                time.sleep(_ROUND_S)
        with target.daemon.client() as client:
            seen = client.call("stats")["connections"]
            report.facts["connections that the daemon counts"] = str(seen)
        report.facts["MB: the daemon's memory"] = f"{rss_mb(target.daemon.pid):.0f}"
        target.check_alive()
    report.end()
    return report
