"""An interactive clip while the batch is full, and what it costs the others."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from bench.contest import Contest
from bench.daemon import THREADS
from bench.engine import LENGTHS_S, models, spoken
from bench.report import Bench, Row
from bench.runs import Runs, at_once, load_runs

CLIP_S = 12  # and what its last sentence is longer
CLIPS = 8  # while the background works
PAUSE_S = 1.0
OPTIONS = {"language": "en"}


def measure(bench: Bench) -> Iterator[Row]:
    """Yield how long the clip takes beside others against alone, and how long the others take beyond its share."""
    recordings = spoken((*LENGTHS_S[: bench.pick(8, 3)], CLIP_S))
    for model, setting in models(bench.folder).items():
        if bench.quick and model != "tiny.en":
            continue
        (folder := bench.folder / f"{model}-spool").mkdir()
        with closing(Contest(setting, folder, recordings)) as contest:
            yield from _rows(model, contest, folder, times=bench.pick(5, 1))


def _rows(model: str, contest: Contest, folder: Path, *, times: int) -> Iterator[Row]:
    runs = load_runs(contest.setting, folder, threads=THREADS)
    *others, clip = contest.recordings
    _clip_s(runs, clip)
    alone_s, beside_s, losses = list[float](), list[float](), list[float]()
    for _ in range(times):
        clips_alone = [_clip_s(runs, clip) for _ in range(3)]
        quiet_s = at_once(runs, others, {}).wall_s
        busy_s, clips = _with_traffic(runs, others, clip)
        alone_s += clips_alone
        beside_s += clips
        share_s = len(clips) * statistics.median(clips_alone)
        losses.append((busy_s - share_s) / quiet_s - 1)
    ratio, loss = statistics.median(beside_s) / statistics.median(alone_s), statistics.median(losses)
    yield Row(
        what=f"an interactive {contest.audio_s([clip]):.0f} s clip beside {len(others)} jobs, against alone, {model}",
        goal="≤ 1.5 ×",
        measured=f"{ratio:.2f} ×: median {statistics.median(beside_s):.2f} s (most {max(beside_s):.2f}) against "
        f"{statistics.median(alone_s):.2f} s",
        met=ratio <= 1.5,
        runs=f"{len(beside_s)} and {len(alone_s)}",
    )
    yield Row(
        what=f"the jobs beside interactive clips, every {PAUSE_S:g} s one, beyond what the clips take alone, {model}",
        goal="≤ 5 %",
        measured=f"{100 * loss:+.1f} % ({100 * min(losses):+.1f} to {100 * max(losses):+.1f})",
        met=loss <= 0.05,
        runs=f"{len(losses)} of each",
    )


def _clip_s(runs: Runs, clip: str) -> float:
    started = time.perf_counter()
    runs.run(clip, OPTIONS, interactive=True).transcribe()
    return time.perf_counter() - started


def _with_traffic(runs: Runs, others: list[str], clip: str) -> tuple[float, list[float]]:
    """Return how long the others took, and each clip that ended before they did."""
    walls: list[float] = []
    background = threading.Thread(target=lambda: walls.append(at_once(runs, others, {}).wall_s))
    background.start()
    clips: list[float] = []
    while len(clips) < CLIPS:
        background.join(PAUSE_S)
        if not background.is_alive():
            break
        clips.append(_clip_s(runs, clip))
    background.join()
    return walls[0], clips
