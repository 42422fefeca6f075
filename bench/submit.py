"""From submit to acknowledgement: copy, hash, fsync, commit. Once the acknowledgement is there, nothing is lost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from bench.daemon import RawClient, running_daemon
from bench.recordings import write_noise, write_talk
from bench.report import Bench, Row, milliseconds, percentile

GOAL_P50_MS = 10
SIZE_BYTES = 1_000_000
TALK_S = 1800


def measure(bench: Bench) -> Iterator[Row]:
    count = bench.pick(200, 50)
    files = [write_noise(bench.folder / f"{number}.wav", SIZE_BYTES) for number in range(2 * count)]
    talk = write_talk(bench.folder / "talk.wav", TALK_S)
    os.sync()
    # A capacity for all of them: the model is unloaded at first, so that only this is measured.
    with running_daemon(bench.folder / "d", capacity=10 * count) as daemon, daemon.client() as client:
        client.call("model", action="unload")
        quiet_s = [_acknowledged_s(client, file) for file in files[:count]]
        yield _row("submit to acknowledgement, 1 MB", quiet_s, GOAL_P50_MS)
    with running_daemon(bench.folder / "e", capacity=10 * count) as daemon, daemon.client() as client:
        daemon.wait_for_words(client.submit(talk))
        busy_s = [_acknowledged_s(client, file) for file in files[count:]]
        yield _row("the same while the model works", busy_s)


def _row(what: str, times_s: list[float], goal_ms: float | None = None) -> Row:
    return Row(
        what=what,
        goal="" if goal_ms is None else f"p50 under {goal_ms} ms",
        measured=milliseconds(times_s),
        met=None if goal_ms is None else 1000 * percentile(times_s, 50) < goal_ms,
        runs=f"{len(times_s)} different files",
    )


def _acknowledged_s(client: RawClient, file: Path) -> float:
    started = time.perf_counter()
    client.submit(file)
    return time.perf_counter() - started
