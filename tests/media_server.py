"""A web server on loopback for downloads: plain media, and all that goes wrong with them, by the path asked for."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support import wait_until

_CHUNK_BYTES = 16 * 1024


class MediaServer:
    """Serves one recording under every name; what comes before the name says how.

    `/talk.wav` at once · `/slow/…` as `go_on` allows: the first 64 KiB (`slow_from`), the rest once it is set ·
    `/trickle/…` that rest at 800 kB a second until then · `/cut/…` the first half, as long as it has not been asked for
    the rest · `/always-cut/…` · `/whole/…` whatever part is asked for · `/status/404/…` · `/limited/7/…` 429 with that
    Retry-After · `/once-500/…` · `/redirect/HOST/…`. `asked` counts requests by path, `parts` says where each began.
    `by_name` holds other recordings, `refused` names that are answered with a status (0: not at all), `slow` names
    that wait for `go_on`.
    """

    def __init__(self, recording: Path, port: int = 0, *, tell: bool = False) -> None:
        self.recording = recording
        self.content = recording.read_bytes()
        self.asked: Counter[str] = Counter()
        self.parts: list[int] = []
        self.go_on = threading.Event()
        self.limited = True
        self.by_name: dict[str, bytes] = {}
        self.refused: dict[str, int] = {}
        self.slow: set[str] = set()
        self.slow_from = 4 * _CHUNK_BYTES
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with server._lock:
                    server.asked[self.path] += 1
                if tell:
                    print("asked", self.path, self.headers.get("Cookie"), flush=True)
                server._answer(self, *self.path.split("/")[1:])

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        class QuietServer(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Say nothing: clients leave when they have had enough."""

        self._http = QuietServer(("127.0.0.1", port), Handler)
        self.port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def close(self) -> None:
        self.go_on.set()
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, how: str, *rest: str) -> None:
        match how, *rest:
            case "status", code, *_:
                self._refuse(request, int(code))
            case "limited", seconds, *_ if self.limited:
                self._refuse(request, 429, ("Retry-After", seconds))
            case "once-500", *_ if self.asked[request.path] == 1:
                self._refuse(request, 500)
            case "redirect", host, *path:
                self._refuse(request, 302, ("Location", f"http://{host}:{self.port}/{'/'.join(path)}"))
            case _ if (name := request.path.rpartition("/")[2]) in self.refused:
                self._refuse(request, self.refused[name])
            case _:
                self._send(request, "slow" if name in self.slow else how, self.by_name.get(name, self.content))

    def _refuse(self, request: BaseHTTPRequestHandler, code: int, *headers: tuple[str, str]) -> None:
        if code == 0:  # not a word
            request.close_connection = True
            return
        request.send_response(code)
        for name, value in (*headers, ("Content-Length", "0")):
            request.send_header(name, value)
        request.end_headers()

    def _send(self, request: BaseHTTPRequestHandler, how: str, content: bytes) -> None:
        start = 0
        asked = request.headers.get("Range", "")
        if asked.startswith("bytes=") and how not in ("always-cut", "whole"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        self.parts.append(start)
        if start >= len(content):
            self._refuse(request, 416, ("Content-Range", f"bytes */{len(content)}"))
            return
        request.send_response(206 if start else 200)
        request.send_header("Content-Type", "text/html" if request.path.endswith(".html") else "audio/x-wav")
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(content) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.end_headers()
        end = len(content)
        if how == "always-cut" or (how == "cut" and start == 0):
            end = len(content) // 2
        try:
            for offset in range(start, end, _CHUNK_BYTES):
                if how in ("slow", "trickle") and offset >= self.slow_from:
                    self.go_on.wait(0.02 if how == "trickle" else None)
                request.wfile.write(content[offset : min(end, offset + _CHUNK_BYTES)])
        except OSError:  # it has had enough
            pass
        if end < len(content):
            request.close_connection = True


@contextmanager
def serving(recording: Path, port: int = 0) -> Iterator[MediaServer]:
    """Serve a recording for a `with` block; 0 = any free port."""
    server = MediaServer(recording, port)
    try:
        yield server
    finally:
        server.close()


def main() -> None:
    """Serve a recording to whoever is on this machine, tell each request and its cookies; `/tmp/go-on` sets `go_on`."""
    server = MediaServer(Path(sys.argv[1]), tell=True)
    print("port", server.port, flush=True)
    wait_until(lambda: os.path.exists("/tmp/go-on"), math.inf)
    server.go_on.set()
    threading.Event().wait()


if __name__ == "__main__":
    main()
