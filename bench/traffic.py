"""`python -m bench.traffic THREADS SPOOL MODEL ROUNDS CLIP OTHER...`: an interactive clip, alone and beside others.

A process of its own, as the model helper is one. Prints JSON: how long the clip took each time `alone_s` and
`beside_s`, and of each round by which part the others took longer than without clips, less what these take alone
(`losses`).
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.ours import load_as_helper

if TYPE_CHECKING:
    from bench.runs import Runs
    from whisperd.model.worker import Turn

CLIPS = 8  # at most, while the others work
PAUSE_S = 1.0
OPTIONS = {"language": "en"}


def measure(
    runs: Runs,
    clip: str,
    others: list[str],
    rounds: int,
    *,
    options: Mapping[str, Any] = {},
    pause_s: float = PAUSE_S,
    on_clip: Callable[[Turn, float], None] = lambda turn, began: None,
) -> dict[str, Any]:
    """Return the figures of so many rounds: some clips, the others without clips, the others with clips.

    `options` are the others' and the clip's, besides its language. `on_clip` hears of each clip that was measured, and
    when on `time.perf_counter` it began.
    """
    traffic = _Traffic(runs, clip, others, options, pause_s, on_clip)
    traffic.clip_s()
    alone_s, beside_s, losses = list[float](), list[float](), list[float]()
    for _ in range(rounds):
        clips_alone = [traffic.clip_s() for _ in range(3)]
        quiet_s = traffic.others_s()
        busy_s, clips, shares = traffic.with_clips()
        alone_s += clips_alone
        beside_s += clips
        share_s = shares * statistics.median(clips_alone)
        losses.append((busy_s - share_s) / quiet_s - 1)
    return {"alone_s": alone_s, "beside_s": beside_s, "losses": losses}


class _Traffic:
    def __init__(
        self,
        runs: Runs,
        clip: str,
        others: list[str],
        options: Mapping[str, Any],
        pause_s: float,
        on_clip: Callable[[Turn, float], None],
    ) -> None:
        self._runs, self._clip, self._others, self._options = runs, clip, others, options
        self._pause_s, self._on_clip = pause_s, on_clip

    def clip_s(self) -> float:
        run = self._runs.run(self._clip, {**self._options, **OPTIONS}, interactive=True)
        started = time.perf_counter()
        run.transcribe()
        wall_s = time.perf_counter() - started
        self._on_clip(run.turn, started)
        return wall_s

    def others_s(self) -> float:
        from bench.runs import at_once

        return at_once(self._runs, self._others, self._options).wall_s

    def with_clips(self) -> tuple[float, list[float], float]:
        """Return how long the others took, each clip that ended before they did, and how many clips they bore.

        Of a clip that they did not see the end of, they bore the part that lies before theirs.
        """
        walls: list[float] = []
        background = threading.Thread(target=lambda: walls.append(self.others_s()))
        began = time.perf_counter()
        background.start()
        clips, shares = list[float](), 0.0
        while len(clips) < CLIPS:
            background.join(self._pause_s)
            if not background.is_alive():
                break
            clip_began = time.perf_counter() - began
            clip_s = self.clip_s()
            if not background.is_alive():
                shares += max(0.0, walls[0] - clip_began) / clip_s
                break
            clips.append(clip_s)
            shares += 1
        background.join()
        return walls[0], clips, shares


def main() -> None:
    """Load the model, measure, and print the figures as JSON."""
    threads, spool, setting, rounds = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    clip, *others = sys.argv[5:]
    print(json.dumps(measure(load_as_helper(setting, spool, threads=threads), clip, others, rounds)))


if __name__ == "__main__":
    main()
