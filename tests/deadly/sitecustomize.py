"""Makes helpers die of recordings, as a defect of a device or a library would: a place on PYTHONPATH.

Python imports it at its start. The model helper then kills itself when it opens audio that holds `POISON`, and so does
the decoder where no device is to be `SICK`. For as long as the file that the variable `DEADLY_SICK` names is there, the
model helper also dies of the sample that ships with whisperd.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

POISON = b"\x39\x30\xc7\xcf" * 8  # samples 12345, -12345, ...
_SAMPLE = "/assets/sample/audio.pcm"
_sick = os.environ.get("DEADLY_SICK")
_looking = False


def _look(event: str, args: tuple[Any, ...]) -> None:
    global _looking
    if event != "open" or _looking or not isinstance(args[0], str | os.PathLike):
        return
    path = os.fspath(args[0])
    if not path.endswith("/audio.pcm" if _sick else "/source"):
        return
    _looking = True  # what follows opens files too
    deadly = os.path.exists(_sick) if _sick and path.endswith(_SAMPLE) else _is_poison(path)
    _looking = False
    if deadly:
        os.kill(os.getpid(), signal.SIGKILL)


def _is_poison(path: str) -> bool:
    with open(path, "rb") as file:
        return POISON in file.read(4096)


if ("whisperd.model.main" if _sick else "whisperd.audio.decoder") in sys.orig_argv:
    sys.addaudithook(_look)
