"""Mutated frames: through the parser and the connection by the million, and through a live socket."""

from __future__ import annotations

import socket
from pathlib import Path
from random import Random

from torture.machine import victim
from torture.mutating import mutated_frame
from torture.pinging import pinging
from torture.report import Report
from torture.targets import HELPER_MESSAGES, feed_connection, feed_helper_link

# Frames in one stream. After the first bad one the rest is dropped, so mostly one.
_IN_A_STREAM = (1, 1, 1, 3)


def fuzz_parser(seed: int, frames: int) -> Report:
    """Feed `frames` mutated frames to a connection and to the helpers' link."""
    report = Report(f"mutated frames through the parser, seed {seed}")
    random = Random(f"{seed}:parser")
    left = frames
    while left > 0:
        count = random.choice(_IN_A_STREAM)
        left -= count
        from_helper = random.random() < 0.2
        messages = {"messages": HELPER_MESSAGES} if from_helper else {}
        data = b"".join(mutated_frame(random, **messages) for _ in range(count))
        try:
            if from_helper:
                feed_helper_link(data)
            else:
                feed_connection(data, random)
        except Exception as error:
            report.violate(f"{error!r} of {data[:200]!r}")
        report.count("mutated frames", count)
    report.end()
    return report


def fuzz_socket(seed: int, frames: int) -> Report:
    """Send `frames` mutated frames to a daemon, while a second client asks for its health."""
    report = Report(f"mutated frames through a socket, seed {seed}")
    random = Random(f"{seed}:socket")
    with victim(report, model="/nowhere/model.pt", log_level="error") as target:
        target.start()
        with pinging(target.daemon.socket, report):
            left = frames
            while left > 0:
                count = random.choice((1, 2, 5))
                left -= count
                _send(target.daemon.socket, b"".join(mutated_frame(random) for _ in range(count)), report)
                report.count("mutated frames", count)
        target.check_alive()
        log = target.daemon.log()
        report.require("Traceback" not in log, f"the log has a traceback: {log[-2000:]}")
    report.end()
    return report


def _send(path: Path, data: bytes, report: Report) -> None:
    """Send and, half of the time, wait for what comes back."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        report.count("connections")
        try:
            client.sendall(data)
            if len(data) % 2:
                client.shutdown(socket.SHUT_WR)
                client.settimeout(30)
                while client.recv(65536):
                    pass
        except (BrokenPipeError, ConnectionResetError):
            report.count("connections cut off by the daemon while we spoke")
