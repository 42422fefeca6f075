"""What the processes weigh: the daemon with a loaded model, after work, with many connections; its helpers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from bench.daemon import Daemon, peak_rss_mb, rss_mb, running_daemon
from bench.recordings import SAMPLE, write_noise
from bench.report import Bench, Row

GOAL_MB = 45
CONNECTIONS = 500
HELPERS = {"copier": "whisperd.audio.copier", "decoder": "whisperd.audio.decoder", "model": "whisperd.model.main"}


def measure(bench: Bench) -> Iterator[Row]:
    jobs = bench.pick(100, 20)
    with running_daemon(bench.folder / "d") as daemon:
        started_mb = rss_mb(daemon.pid)
        _work(daemon, bench, jobs)
        worked_mb, peak_mb = rss_mb(daemon.pid), peak_rss_mb(daemon.pid)
        helpers = {name: daemon.helpers(module) for name, module in HELPERS.items()}
        helper_mb = {name: [rss_mb(pid) for pid in pids] for name, pids in helpers.items()}
        with ExitStack() as stack:
            for _ in range(CONNECTIONS):
                stack.enter_context(daemon.client()).call("health")
            connected_mb = rss_mb(daemon.pid)
    yield Row(
        what="the daemon's own process, its model loaded",
        goal=f"at most {GOAL_MB} MB",
        measured=f"{started_mb:.1f} MB",
        met=started_mb <= GOAL_MB,
        runs="1",
    )
    yield Row(
        what=f"the same after {jobs} jobs",
        goal=f"at most {GOAL_MB} MB",
        measured=f"{worked_mb:.1f} MB (peak {peak_mb:.1f})",
        met=peak_mb <= GOAL_MB,
        runs="1",
    )
    yield Row(what=f"the same with {CONNECTIONS} connections", measured=f"{connected_mb:.1f} MB", runs="1")
    for name, sizes in helper_mb.items():
        shown = ", ".join(f"{size:.0f}" for size in sizes)
        yield Row(what=f"{name} processes, after work", measured=f"{shown} MB", runs="1")


def _work(daemon: Daemon, bench: Bench, jobs: int) -> None:
    """Submit the sample, and other recordings that are cancelled; ask for everything that there is to ask."""
    with daemon.client() as client:
        spoken = [client.submit(SAMPLE, fresh=True) for _ in range(3)]
        for number in range(jobs - len(spoken)):
            client.call("cancel", job=client.submit(write_noise(bench.folder / f"noise-{number}.wav", 200_000)))
        for job in spoken:
            client.call("result", job=job, wait_s=None)
        client.call("jobs", limit=200)
        client.call("stats")
