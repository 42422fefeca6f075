"""An interactive clip while the batch is full, and what it costs the others."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from bench.contest import Contest
from bench.daemon import THREADS
from bench.engine import LENGTHS_S, models, spoken
from bench.report import Bench, Row
from bench.traffic import PAUSE_S

CLIP_S = 12  # and what its last sentence is longer


def measure(bench: Bench) -> Iterator[Row]:
    """Yield how long the clip takes beside others against alone, and how long the others take beyond its share."""
    recordings = spoken((*LENGTHS_S[: bench.pick(8, 3)], CLIP_S))
    for model, setting in models(bench.folder).items():
        if bench.quick and model != "tiny.en":
            continue
        (folder := bench.folder / f"{model}-spool").mkdir()
        with closing(Contest(setting, folder, recordings)) as contest:
            yield from _rows(model, contest, folder, rounds=bench.pick(5, 1))


def _rows(model: str, contest: Contest, folder: Path, *, rounds: int) -> Iterator[Row]:
    *others, clip = contest.recordings
    command = [sys.executable, "-m", "bench.traffic", str(THREADS), str(folder), contest.setting, str(rounds)]
    output = subprocess.run([*command, clip, *others], check=True, stdout=subprocess.PIPE).stdout
    figures: dict[str, list[float]] = json.loads(output)
    alone_s, beside_s, losses = (figures[name] for name in ("alone_s", "beside_s", "losses"))
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
