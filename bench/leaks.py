"""What the model's process grows by over many jobs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from bench import planted
from bench.daemon import rss_mb, running_daemon
from bench.recordings import write_noise
from bench.report import Bench, Row

GOAL_MB = 1.0
EVERY = 100
_AT_ONCE = 8


def measure(bench: Bench) -> Iterator[Row]:
    """Submit short recordings, eight at a time, and fit a line to the least memory in each hundred but the first."""
    yield from measure_jobs(bench, jobs=bench.pick(1000, 200), every=EVERY)


def measure_jobs(bench: Bench, *, jobs: int, every: int) -> Iterator[Row]:
    """Submit so many jobs, and look at the memory of each `every`.

    The least, because what a piece of work takes comes and goes by tens of MB; what leaks never comes back. On a GPU
    its memory too, of which all programs together have a part.
    """
    checkpoint = planted.write_planted(planted.TINY, bench.folder / "planted.pt")
    sizes_mb, device_mb = list[float](), list[float]()  # the least of each hundred
    with (
        running_daemon(bench.folder / "d", model=str(checkpoint), device=bench.device) as daemon,
        daemon.client() as client,
    ):
        (helper,) = daemon.helpers("whisperd.model.main")
        least_mb = least_of_device_mb = math.inf
        for number in range(0, jobs, _AT_ONCE):
            files = [write_noise(bench.folder / f"noise-{each}.wav", 176_400 * 5) for each in range(_AT_ONCE)]
            submitted = [client.submit(file, options={"word_timestamps": number % 5 == 0}) for file in files]
            for job in submitted:
                client.call("result", job=job, wait_s=None)
            least_mb = min(least_mb, rss_mb(helper))
            used_bytes = client.call("stats")["model"]["device_used_bytes"] or 0  # None without a GPU
            least_of_device_mb = min(least_of_device_mb, used_bytes / 1e6)
            if (number + _AT_ONCE) % every < _AT_ONCE:
                sizes_mb.append(least_mb)
                device_mb.append(least_of_device_mb)
                least_mb = least_of_device_mb = math.inf
    what = f"the model's process over {jobs} jobs (planted weights, every fifth eight with word timestamps)"
    yield _row(what, sizes_mb, every)
    if any(device_mb):
        yield _row(f"the device's memory over those {jobs} jobs", device_mb, every)


def _row(what: str, sizes_mb: list[float], every: int) -> Row:
    settled = sizes_mb[1:]  # the first hundred fill caches and pools
    slope_mb = statistics.linear_regression(range(len(settled)), settled).slope if len(settled) > 1 else 0.0
    return Row(
        what=what,
        goal=f"under {GOAL_MB:g} MB for {every} jobs",
        measured=f"{slope_mb:+.2f} MB for {every} jobs ({', '.join(f'{each:.0f}' for each in sizes_mb)} MB)",
        met=slope_mb < GOAL_MB,
        runs="1",
    )
