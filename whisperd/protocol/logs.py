"""One way to log for the daemon and its helpers: a line an event, `key=value`, to stderr.

Under systemd each line carries a `<N>` prefix, which the journal turns into a priority.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping

_SYSLOG = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
LEVELS = ("debug", "info", "warning", "error")


class _Formatter(logging.Formatter):
    def __init__(self, *, journal: bool) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        # A name that a client chose may hold anything: no control character reaches a log or a terminal.
        text = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
        if self._journal:
            prefix = f"<{_SYSLOG.get(record.levelno, 6)}>"
            return prefix + text.replace("\n", "\n" + prefix)
        return text


def stderr_is_journal(environ: Mapping[str, str] = os.environ) -> bool:
    """True when stderr is the very stream that systemd named in $JOURNAL_STREAM."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def configure(level: str = "info") -> None:
    """Send all loggers to stderr at `level` (one of `LEVELS`) and above."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(journal=stderr_is_journal()))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
