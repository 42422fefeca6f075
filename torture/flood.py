"""One user's thousand connections that ask as fast as they can, while another user asks for his health.

Run as a program with a socket's path, it is the flood: a process of its own, under a uid of its own.
"""

from __future__ import annotations

import os
import resource
import selectors
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

from torture.machine import victim
from torture.pinging import pinging
from torture.report import Report
from whisperd.protocol.frames import encode_frame

_UID = 20_001  # nobody's
_AT_ONCE = 59  # requests that a connection has open, short of where it is read no more
# They cost the daemon different things: memory alone, a refusal, a read in turn, a store call that fails, a count.
_ASKED: dict[str, dict[str, Any]] = {
    "health": {},
    "unknown": {},
    "jobs": {"limit": 1},
    "cancel": {"job": 1_000_000},
    "stats": {},
}


def flood(connections: int, seconds: float) -> Report:
    """Have each kind of request come in floods, for so long in all; needs root, for the other user."""
    report = Report("a flood of requests")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for op in _ASKED:
        part = Report(op)
        with victim(part, model="/nowhere/model.pt", log_level="error") as target:
            target.start()
            target.daemon.folder.chmod(0o755)
            target.daemon.socket.chmod(0o666)
            command = [sys.executable, "-m", "torture.flood", str(target.daemon.socket), op, str(connections)]
            with pinging(target.daemon.socket, part):
                flooding = subprocess.Popen(command, stdin=subprocess.PIPE)
                with suppress(subprocess.TimeoutExpired):
                    flooding.wait(seconds / len(_ASKED))
                    part.violate("the flood ended by itself")
                flooding.communicate()
            target.check_alive()
        for what, fact in part.facts.items():
            report.facts[f"{what}, beside {op}"] = fact
        report.counts.update(part.counts)
        report.violations += [f"{violation}, beside {op}" for violation in part.violations]
    report.end()
    return report


def main() -> None:
    """Ask, throw the answers away, ask on, until told to stop."""
    path, op, connections = sys.argv[1], sys.argv[2], int(sys.argv[3])
    questions = memoryview(
        b"".join(encode_frame({"id": n, "op": op, "params": _ASKED[op]}) for n in range(1, _AT_ONCE + 1))
    )
    os.seteuid(_UID)
    sent: dict[socket.socket, int] = {}
    with selectors.DefaultSelector() as selector:
        for _ in range(connections):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
            sock.setblocking(False)
            sent[sock] = 0
            selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, events in selector.select():
                if not isinstance(key.fileobj, socket.socket):
                    return
                with suppress(BlockingIOError):
                    if events & selectors.EVENT_READ:
                        key.fileobj.recv(2**18)
                    if events & selectors.EVENT_WRITE:
                        count = key.fileobj.send(questions[sent[key.fileobj] :])
                        sent[key.fileobj] = (sent[key.fileobj] + count) % len(questions)


if __name__ == "__main__":
    main()
