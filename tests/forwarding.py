"""What `ssh -L` does with two Unix sockets: bytes are carried both ways, descriptors get lost.

Run as `python tests/forwarding.py LISTEN TARGET [CUT_AFTER_BYTES]`: with the number, the first connection that has
carried so many bytes towards TARGET is cut, once; those after it are left alone.
"""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import suppress


class Forwarder:
    """Carries each connection to `listen` on to `target`."""

    def __init__(self, listen: str, target: str, cut_after_bytes: int | None) -> None:
        self._target, self._cut_after_bytes = target, cut_after_bytes
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(listen)
        self._listener.listen(64)

    def run(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(self._target)
            except OSError:  # as ssh does: accepted, then closed
                near.close()
                continue
            threading.Thread(target=self._carry, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near, False), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, towards_target: bool) -> None:
        carried = 0
        with suppress(OSError):
            while data := source.recv(16_384):  # a plain recv: what came as ancillary data is dropped
                sink.sendall(data)
                carried += len(data)
                if towards_target and self._cut_after_bytes is not None and carried > self._cut_after_bytes:
                    self._cut_after_bytes = None
                    break
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    _, listen, target, *cut = sys.argv
    Forwarder(listen, target, int(cut[0]) if cut else None).run()
