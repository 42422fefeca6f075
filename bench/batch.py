"""Many recordings at once through the engine, against `whisper.transcribe` one after the other on the same weights.

`python -m bench.batch [MODEL] [--minutes M] [--times N] [--threads N] [--option NAME=VALUE ...]` also serves as
`make fidelity`: it compares every token, and tells how near upstream's own choices were.
"""

from __future__ import annotations

import argparse
import ast
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import whisper
from whisper.decoding import GreedyDecoder

from bench.recordings import speak
from bench.report import Bench, Row
from bench.runs import Runs
from whisperd.model.loading import LoadedModel, load
from whisperd.protocol.options import DEFAULTS, parse_options

_RATE = 16_000
_LENGTHS_S = (51, 85, 64, 72, 58, 79, 68, 60)


@dataclass(slots=True)
class Gaps:
    """Of every token that upstream chooses greedily: how far its logit was above the next best one."""

    values: list[float] = field(default_factory=list)

    def listen(self) -> None:
        """Hear of each choice from now on."""
        update = GreedyDecoder.update

        def listening(decoder: GreedyDecoder, tokens: Any, logits: torch.Tensor, sums: Any) -> Any:
            best, second = logits[0].topk(2).values.tolist()
            self.values.append(best - second)
            return update(decoder, tokens, logits, sums)

        GreedyDecoder.update = listening


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One alternation: seconds of both, and what they said."""

    upstream_s: float
    engine_s: float
    tokens: int
    windows: int
    different: int  # recordings with another token anywhere
    score_difference: float


class Engines:
    """Both engines on one set of weights, and a spool of recordings."""

    def __init__(self, setting: str, folder: Path, *, count: int, minutes: float, dtype: str = "auto") -> None:
        self._count = count
        self._whisper = _load(setting, folder, "auto").whisper
        self._runs = Runs(_load(setting, folder, dtype), folder, release=True)
        self.engine = self._runs.engine
        self.audio_s = _write_recordings(self._runs, count, minutes)

    def compare(self, **options: Any) -> Compared:
        """Let upstream transcribe the recordings one after the other, then the engine all of them at once."""
        began = time.perf_counter()
        theirs = [self._upstream(n, options) for n in range(self._count)]
        upstream_s = time.perf_counter() - began
        windows, began = self.engine.counters.windows, time.perf_counter()
        ours = self._at_once(options)
        engine_s = time.perf_counter() - began
        different, score_difference = 0, 0.0
        for one, other in zip(ours, theirs, strict=True):
            said = [[segment["tokens"] for segment in each["segments"]] for each in (one, other)]
            if said[0] != said[1]:
                different += 1
                continue
            for mine, its in zip(one["segments"], other["segments"], strict=True):
                score_difference = max(score_difference, abs(mine["avg_logprob"] - its["avg_logprob"]))
        return Compared(
            upstream_s=upstream_s,
            engine_s=engine_s,
            tokens=sum(len(segment["tokens"]) for each in theirs for segment in each["segments"]),
            windows=self.engine.counters.windows - windows,
            different=different,
            score_difference=score_difference,
        )

    def _upstream(self, number: int, options: dict[str, Any]) -> dict[str, Any]:
        pcm, parsed = self._runs.samples(str(number)), parse_options(options)
        arguments = {name: parsed[name] for name in DEFAULTS} | {"temperature": tuple(parsed["temperature"])}
        result: dict[str, Any] = whisper.transcribe(self._whisper, pcm, fp16=False, verbose=None, **arguments)
        return result

    def _at_once(self, options: dict[str, Any]) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        threads = [
            threading.Thread(
                target=lambda n=n: found.update({n: self._runs.run(str(n), options).transcribe().to_wire()})
            )
            for n in range(self._count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[n] for n in range(self._count)]


def _load(setting: str, folder: Path, dtype: str) -> LoadedModel:
    return load(setting, cache_dir=folder, device="auto", dtype=dtype, on_step=lambda: None, environ=os.environ)


def _write_recordings(runs: Runs, count: int, minutes: float) -> float:
    """Write `count` folders with PCM of different lengths, cut from spoken text at different places."""
    speech = np.concatenate([np.frombuffer(path.read_bytes()[44:], "<i2") for path in speak(runs.spool)])
    total = 0
    for n in range(count):
        length = int(_RATE * (minutes * 60 if minutes else _LENGTHS_S[n % len(_LENGTHS_S)]))
        start = n * len(speech) // count
        runs.record(str(n), np.resize(np.roll(speech, -start), length))
        total += length
    return total / _RATE


_CASES: Sequence[tuple[str, dict[str, Any]]] = (
    ("greedy", {}),
    ("word timestamps", {"word_timestamps": True}),
    ("beam 5", {"beam_size": 5, "temperature": 0}),
)


def measure(bench: Bench) -> Iterator[Row]:
    """Compare on the demo's weights: 8 recordings, two threads."""
    torch.set_num_threads(2)
    engines = Engines("demo", bench.folder, count=bench.pick(8, 4), minutes=bench.pick(0, 1) / 2)
    for name, options in _CASES:
        compared = [engines.compare(**options) for _ in range(bench.pick(5 if name == "greedy" else 1, 1))]
        ratio = statistics.median(each.upstream_s / each.engine_s for each in compared)
        goal = 3.0 if name == "greedy" else 2.5
        yield Row(
            what=f"8 recordings at once, {name}, tiny.en, against `whisper.transcribe` one after the other",
            goal=f"at least {goal:g} times as fast",
            measured=describe(compared, engines.audio_s),
            met=ratio >= goal,
            runs=str(len(compared)),
        )


def describe(compared: Sequence[Compared], audio_s: float) -> str:
    """Return the medians of some alternations in a line."""
    ours, theirs = (
        statistics.median(audio_s / seconds for seconds in each)
        for each in ([one.engine_s for one in compared], [one.upstream_s for one in compared])
    )
    ratios = sorted(one.upstream_s / one.engine_s for one in compared)
    last = compared[-1]
    return (
        f"{statistics.median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f}): {ours:.1f} against {theirs:.1f} "
        f"seconds of audio a second; {last.windows} windows, {last.tokens} tokens, {last.different} recordings differ"
    )


def main() -> int:
    """Compare as the command line says; return 1 when anything differs."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.batch", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("model", nargs="?", default="demo", help="as in the setting `model`; demo")
    parser.add_argument("--count", type=int, default=8, help="how many recordings")
    parser.add_argument("--minutes", type=float, default=0.0, help="length of each; 0: 51 to 85 seconds")
    parser.add_argument("--times", type=int, default=1, help="how often")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto", help="the engine's; upstream computes in float32")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of a transcription")
    parser.add_argument("--gaps", action="store_true", help="tell how near upstream's choices were (greedy only)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = {name: ast.literal_eval(value) for name, _, value in (one.partition("=") for one in arguments.option)}
    gaps = Gaps()
    if arguments.gaps:
        gaps.listen()
    with tempfile.TemporaryDirectory(prefix="wb-") as folder:
        engines = Engines(
            arguments.model, Path(folder), count=arguments.count, minutes=arguments.minutes, dtype=arguments.dtype
        )
        compared = []
        for _ in range(arguments.times):
            compared.append(engines.compare(**options))
            print(describe(compared[-1:], engines.audio_s), flush=True)
        print(f"median of {len(compared)}: {describe(compared, engines.audio_s)}")
        print(f"largest difference of an avg_logprob {max(one.score_difference for one in compared):.1e}")
        if gaps.values:
            print(f"smallest gap of {len(gaps.values)} greedy choices {min(gaps.values):.1e}")
        print(engines.engine.gauges())
    return int(any(one.different for one in compared))


if __name__ == "__main__":
    sys.exit(main())
