"""One way to log for the daemon and its helpers: a line an event, `key=value`, to stderr.

Under systemd each line carries a `<N>` prefix, which the journal turns into a priority.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import sys
import threading
from collections.abc import Mapping

_SYSLOG = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
LEVELS = ("debug", "info", "warning", "error")
_MAX_WAITING_LINES = 10_000
_LAST_LINES_S = 1.0  # what the last lines may take at the end


class _Formatter(logging.Formatter):
    def __init__(self, *, journal: bool) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        # A name that a client chose may hold anything: no control character reaches a log or a terminal, and no line
        # after the first can pass for an entry of its own.
        text = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
        text = text.replace("\n", "\n  ")
        if self._journal:
            prefix = f"<{_SYSLOG.get(record.levelno, 6)}>"
            return prefix + text.replace("\n", "\n" + prefix)
        return text


class _Background(logging.Handler):
    """Writes to stderr in a thread: a pipe or terminal that nobody reads on must not hold up who logs.

    Lines that find `_MAX_WAITING_LINES` before them are left out, and counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_WAITING_LINES)
        self._left_out = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()
        atexit.register(self._finish)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._left_out += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._left_out:
                line += f"\n({self._left_out} lines of the log were left out: stderr was not read)"
                self._left_out = 0
            # Not through sys.stderr: a thread that is stuck with its lock would crash the interpreter's end.
            data = (line + "\n").encode("utf-8", "replace")
            try:
                while data:
                    data = data[os.write(2, data) :]
            except OSError:  # closed: there is nobody to tell
                continue

    def close(self) -> None:
        """Write what waits; nothing is written after it."""
        self._finish()
        super().close()

    def _finish(self) -> None:
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(_LAST_LINES_S)


def stderr_is_journal(environ: Mapping[str, str] = os.environ) -> bool:
    """True when stderr is the very stream that systemd named in $JOURNAL_STREAM."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def configure(level: str = "info", *, background: bool = False) -> None:
    """Send all loggers to stderr at `level` (one of `LEVELS`) and above; `background`: never wait for its reader."""
    handler = _Background() if background else logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(journal=stderr_is_journal()))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
