"""How long `health` takes while the model works and a large file is handed over."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

from bench.daemon import Failed, Pinger, RawClient, running_daemon
from bench.recordings import write_noise, write_talk
from bench.report import Bench, Row, milliseconds, percentile

GOAL_P50_MS, GOAL_P99_MS = 1, 10
SAMPLES = 2000
# Between two questions the asking process sleeps: it would otherwise take a core from those it measures.
PAUSE_S = 0.0005
TALK_S = 3600


def measure(bench: Bench) -> Iterator[Row]:
    size_mb = bench.pick(800, 200)
    file = write_noise(bench.folder / "large.wav", size_mb * 10**6)
    talk = write_talk(bench.folder / "talk.wav", TALK_S)
    os.sync()
    with running_daemon(bench.folder / "d") as daemon, daemon.client() as client, Pinger(daemon.socket) as pinger:
        quiet_s = _sample(pinger, SAMPLES)
        job = client.submit(talk)
        daemon.wait_for_words(job)
        model_s = _sample(pinger, SAMPLES)
        copy_s: list[float] = []
        handed_over: list[float] = []
        while len(copy_s) < SAMPLES:
            started = time.monotonic()
            copy_s += _sample_while_copying(pinger, client, file)
            handed_over.append(time.monotonic() - started)
        if client.state(job) != "running":
            raise Failed("the model was done too early: the talk must be longer")
        client.call("cancel", job=job)
    yield Row(what="`health`, nothing else going on", measured=milliseconds(quiet_s), runs=f"{len(quiet_s)}")
    yield Row(what="`health` while a job runs", measured=milliseconds(model_s), runs=f"{len(model_s)}")
    p50_ms, p99_ms = 1000 * percentile(copy_s, 50), 1000 * percentile(copy_s, 99)
    yield Row(
        what=f"`health` while a job runs and {size_mb} MB are handed over",
        goal=f"p50 under {GOAL_P50_MS} ms, p99 under {GOAL_P99_MS} ms",
        measured=milliseconds(copy_s),
        met=p50_ms < GOAL_P50_MS and p99_ms < GOAL_P99_MS,
        runs=f"{len(copy_s)}, in {len(handed_over)} copies of {min(handed_over):.1f} to {max(handed_over):.1f} s",
    )


def _sample(pinger: Pinger, count: int) -> list[float]:
    times_s = []
    for _ in range(count):
        times_s.append(pinger.ping())
        time.sleep(PAUSE_S)
    return times_s


def _sample_while_copying(pinger: Pinger, client: RawClient, file: Path) -> list[float]:
    """Hand the file over, ask until it is acknowledged, and cancel its job: what is measured is the copy."""
    client.send_submit(file, fresh=True)
    times_s = []
    while not select.select([client], [], [], PAUSE_S)[0]:
        times_s.append(pinger.ping())
    client.call("cancel", job=client.receive()["result"]["job"]["id"])
    return times_s
