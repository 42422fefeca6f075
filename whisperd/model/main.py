"""`python -m whisperd.model.main`: says that it is there, then spends seconds on importing torch, then serves."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

from whisperd.protocol.helper_messages import ModelStatus
from whisperd.protocol.helpers import start

# A thread that computes in Python keeps the interpreter for so long before others get it (5 ms is Python's own):
# a decoder step is many short calls, and each would wait that long beside a busy job thread.
SWITCH_INTERVAL_S = 0.0002
# How often a waiting thread of the team looks for work before it sleeps. libgomp's own 300,000 hold a core that another
# program wants: beside one busy program a window of tiny.en then took 4 to 18 s on two cores, with 1,000 it takes
# 2.9 s. Alone on the machine it makes no difference.
SPINS = 1000


def prepare_environment(environ: MutableMapping[str, str], *, cache_dir: Path, threads: int) -> None:
    """Set what the libraries read when they are imported, and only then. What is set already stays, but `threads`."""
    for variable, folder in (
        ("NUMBA_CACHE_DIR", "numba"),
        ("TRITON_CACHE_DIR", "triton"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
    ):
        environ.setdefault(variable, str(cache_dir / folder))
    # Word alignment has no parallel loops; numba would start a thread a core for nothing.
    environ.setdefault("NUMBA_NUM_THREADS", "1")
    environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    if threads:
        environ["OMP_NUM_THREADS"] = str(threads)


def main(argv: list[str] | None = None) -> None:
    """Run the model helper; ends with its daemon."""
    link = start("model", argv)
    prepare_environment(os.environ, cache_dir=Path(link.settings["cache_dir"]), threads=int(link.settings["threads"]))
    link.send(ModelStatus(state="loading", name=link.settings["model"]))
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    logging.getLogger("numba").setLevel(logging.WARNING)  # at debug it tells every step of its compiler
    # Only now: importing torch and whisper takes seconds, and the daemon knows already that they are under way. What
    # they make stays: to look for garbage in it takes a tenth of that time, and later 0.15 s each time.
    gc.disable()
    from whisperd.model.helper import ModelHelper, Settings

    gc.freeze()
    gc.enable()
    ModelHelper(link, Settings.of(link.settings)).serve()


if __name__ == "__main__":
    main()
