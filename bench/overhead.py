"""The whole path, submit to result, against `whisper.transcribe` in one process on the same files."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from bench.children import Child
from bench.daemon import THREADS, running_daemon
from bench.recordings import length_s, speak
from bench.report import Bench, Row
from whisperctl import Client

GOAL_PERCENT = 5
NICE = 10  # what the model's helper has by default: beside other programs both give way alike


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one way made of one file: the times of all rounds, the tokens of the last."""

    times_s: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)


def measure(bench: Bench) -> Iterator[Row]:
    rounds = bench.pick(7, 2)
    files = speak(bench.folder)[: bench.pick(3, 1)]
    with (
        closing(_upstream(bench.folder)) as upstream,
        running_daemon(bench.folder / "d", helper_nice=NICE) as daemon,
        Client(daemon.socket) as client,
    ):
        for file in files:
            ways = {"upstream": _Outcome(), "whisperd": _Outcome()}
            for number in range(-1, rounds):  # one to warm up
                for name in ways if number % 2 else reversed(ways):
                    wall_s, tokens = _ask_upstream(upstream, file) if name == "upstream" else _ask_daemon(client, file)
                    if number >= 0:
                        ways[name].times_s.append(wall_s)
                    ways[name].tokens[:] = tokens
            yield _row(file, ways["upstream"], ways["whisperd"])


def _row(file: Path, upstream: _Outcome, whisperd: _Outcome) -> Row:
    ours_s, theirs_s = statistics.median(whisperd.times_s), statistics.median(upstream.times_s)
    pairs = [ours / theirs for ours, theirs in zip(whisperd.times_s, upstream.times_s, strict=True)]
    over = 100 * (ours_s / theirs_s - 1)
    if whisperd.tokens == upstream.tokens:
        same = f"the same {len(whisperd.tokens)} segments, {sum(map(len, whisperd.tokens))} tokens"
    else:
        same = f"OTHER TOKENS: {len(whisperd.tokens)} and {len(upstream.tokens)} segments"
    return Row(
        what=f"speech of {length_s(file):.0f} s, submit to result, against `whisper.transcribe`",
        goal=f"at most {GOAL_PERCENT} % more",
        measured=f"{ours_s:.2f} s against {theirs_s:.2f} s: {over:+.1f} % "
        f"(minima {min(whisperd.times_s):.2f} and {min(upstream.times_s):.2f} s, "
        f"median of the pairs {100 * (statistics.median(pairs) - 1):+.1f} %); {same}",
        met=over <= GOAL_PERCENT and whisperd.tokens == upstream.tokens,
        runs=f"{len(pairs)} of each, alternating",
    )


def _ask_daemon(client: Client, file: Path) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    job = client.submit(file, fresh=True)
    transcript = client.result(job.id, wait=True).require()
    wall_s = time.perf_counter() - started
    return wall_s, [list(segment.tokens) for segment in transcript.segments]


def _ask_upstream(upstream: Child, file: Path) -> tuple[float, list[list[int]]]:
    answer = upstream.ask(files=[str(file)], options={})
    return answer["wall_s"], answer["said"][0]


def _upstream(folder: Path) -> Child:
    """Start openai-whisper in a process of its own, and show it at its best.

    Its OpenMP threads would spin while they wait for each other, as they do in a program's main thread by default:
    whatever else then runs on the machine makes it several times slower. In the model's helper they wait asleep.
    """
    command = [sys.executable, "-m", "bench.upstream", str(THREADS), str(NICE), str(folder)]
    return Child(command, {"OMP_WAIT_POLICY": "passive"})
