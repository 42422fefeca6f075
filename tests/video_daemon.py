"""Daemons for whom every video id is a recording on a server on loopback, fetched by real yt-dlp.

What YouTube itself answers, and what becomes of that, is the matter of `loopback_youtube.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.media_server import MediaServer
from tests.support import Daemon

FOLDER = Path(__file__).with_name("every_video")

# Loopback is allowed; what fails for the moment is tried again soon.
SETTINGS: dict[str, Any] = {"fetch_allow_private": True, "fetch_backoff_s": 0.05}


def environment(server: MediaServer) -> dict[str, str]:
    """Return the variables with which yt-dlp finds `ID` as `/ID.wav` on the server."""
    return {"PYTHONPATH": str(FOLDER), "TEST_YOUTUBE": server.url("").rstrip("/")}


class VideoDaemon(Daemon):
    """A daemon whose videos come from a server on loopback."""

    def __init__(self, server: MediaServer, **settings: Any) -> None:
        super().__init__(**SETTINGS | settings)
        self._server = server

    def environment(self) -> dict[str, str]:
        return super().environment() | environment(self._server)
