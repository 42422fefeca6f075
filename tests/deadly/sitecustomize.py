"""Makes the model's process die of recordings, as a defect of the device or a library would: a place on PYTHONPATH.

Python imports it at its start. The model helper then kills itself when it opens audio that begins with `POISON`; and,
for as long as the file `sick` lies beside the spool, also when it opens the sample that ships with whisperd.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

POISON = b"\x39\x30\xc7\xcf" * 8  # samples 12345, -12345, ...


def _look(event: str, args: tuple[Any, ...]) -> None:
    path = str(args[0]) if event == "open" else ""
    if not path.endswith("/audio.pcm") or "r" not in str(args[1] or ""):
        return
    if path.endswith("/assets/sample/audio.pcm"):
        deadly = os.path.exists(os.environ["DEADLY_SICK"])
    else:
        fd = os.open(path, os.O_RDONLY)  # this is an event too, without a mode
        deadly = os.read(fd, len(POISON)) == POISON
        os.close(fd)
    if deadly:
        os.kill(os.getpid(), signal.SIGKILL)


if "whisperd.model.main" in sys.orig_argv:
    sys.addaudithook(_look)
