"""What reaches the log: a line an event, whatever the names in it hold."""

from __future__ import annotations

import subprocess
import sys

HOSTILE = "talk\x1b]0;evil\x07\r\u202e\n2026-01-01 00:00:00,000 INFO    whisperd: job=1 state=done"


def test_a_name_cannot_forge_a_line() -> None:
    code = f"""
import logging
from whisperd.protocol import logs
logs.configure()
try:
    raise ValueError({HOSTILE!r})
except ValueError:
    logging.getLogger("whisperd.jobs").exception("copied name=%s", {HOSTILE!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *others = done.stderr.splitlines()
    assert first.endswith(r"ERROR   whisperd.jobs: copied name=talk\x1b]0;evil\x07\x0d\x202e")
    assert all(line.startswith("  ") for line in others)
    assert not any(character in done.stderr for character in "\x1b\x07\r\u202e")
