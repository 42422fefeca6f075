"""What a service manager hears of a daemon, on a socket that stands for systemd's."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

from tests.support import NO_MODEL, Daemon, submit


def test_it_hears_of_the_start_of_what_changes_and_of_the_stop(
    make_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = make_daemon(model=NO_MODEL)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(daemon.folder / "notify"))
        manager.settimeout(30)

        def hear(words: str) -> str:
            while words not in (heard := manager.recv(4096).decode()):
                assert heard.startswith("STATUS="), heard
            return heard

        daemon.variables["NOTIFY_SOCKET"] = str(daemon.folder / "notify")
        daemon.start()
        assert hear("READY=1").endswith("0 waiting, 0 running")
        with daemon.client() as client:
            submit(client, recording())
            assert "the model is not loaded" in hear("1 waiting, 0 running")
            client.call("pause")
            client.call("model", action="unload")
            assert hear("STATUS=paused")
        daemon.stop()
        assert hear("STOPPING=1")
