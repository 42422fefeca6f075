"""Which thread computes on how many cores.

libgomp gives every thread that computes in parallel a team of threads, for as long as it lives. Once a process has more
threads in teams than the machine has cores, those that wait no longer spin but sleep at once, in every team, and a
decoder step is some fifty short stretches of parallel work. So one thread has all cores at any time, the loader and
then the batcher; the others compute on one. How long that one team spins is `whisperd.model.main.SPINS`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


def compute_on(cores: int) -> None:
    """Let the calling thread compute on so many cores from now on; others keep theirs."""
    # The first question in a thread takes over what was set last, in whatever thread: what is set before it is lost.
    torch.get_num_threads()
    torch.set_num_threads(cores)


def start_thread(work: Callable[[], object], *, name: str, cores: int = 1) -> threading.Thread:
    """Start a thread that computes on so many cores and does not keep the process alive."""

    def run() -> None:
        compute_on(cores)
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
