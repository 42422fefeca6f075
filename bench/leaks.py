"""What the model's process grows by over many jobs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import torch

from bench import planted
from bench.daemon import rss_mb, running_daemon
from bench.recordings import write_noise
from bench.report import Bench, Row

GOAL_MB = 1.0
EVERY = 100
_AT_ONCE = 8


def measure(bench: Bench) -> Iterator[Row]:
    """Submit short recordings, eight at a time, and fit a line to the least memory in each hundred but the first.

    The least, because what a piece of work takes comes and goes by tens of MB; what leaks never comes back.
    """
    jobs = bench.pick(1000, 200)
    model = planted.planted(planted.TINY)
    weights = {name: value.half() for name, value in model.state_dict().items()}
    checkpoint = bench.folder / "planted.pt"
    torch.save({"dims": vars(model.dims), "model_state_dict": weights}, checkpoint)
    sizes_mb: list[float] = []  # the least of each hundred
    with running_daemon(bench.folder / "d", model=str(checkpoint)) as daemon, daemon.client() as client:
        (helper,) = daemon.helpers("whisperd.model.main")
        least_mb = math.inf
        for number in range(0, jobs, _AT_ONCE):
            files = [write_noise(bench.folder / f"noise-{each}.wav", 176_400 * 5) for each in range(_AT_ONCE)]
            submitted = [client.submit(file, options={"word_timestamps": number % 5 == 0}) for file in files]
            for job in submitted:
                client.call("result", job=job, wait_s=None)
            least_mb = min(least_mb, rss_mb(helper))
            if (number + _AT_ONCE) % EVERY < _AT_ONCE:
                sizes_mb.append(least_mb)
                least_mb = math.inf
    # The first hundred fill caches and pools.
    settled = sizes_mb[1:]
    slope_mb = statistics.linear_regression(range(len(settled)), settled).slope if len(settled) > 1 else 0.0
    yield Row(
        what=f"the model's process over {jobs} jobs (planted weights, every fifth eight with word timestamps)",
        goal=f"under {GOAL_MB:g} MB for {EVERY} jobs",
        measured=f"{slope_mb:+.2f} MB for {EVERY} jobs ({', '.join(f'{each:.0f}' for each in sizes_mb)} MB)",
        met=slope_mb < GOAL_MB,
        runs="1",
    )
