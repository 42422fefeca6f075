"""The engine against openai-whisper and, given its interpreter, faster-whisper: the same weights, two threads each."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from bench.contest import OURS, UPSTREAM, Contest, Contestant, median_s, ratios, rounds
from bench.daemon import Failed
from bench.recordings import TEXT, Spoken, speak_sentences
from bench.report import Bench, Row
from bench.runs import Heard
from bench.weights import base_folder
from whisperd.model.loading import demo_folder

LENGTHS_S = (51, 85, 64, 72, 58, 79, 68, 60)
BATCHED, SEQUENTIAL = "faster-whisper batched", "faster-whisper sequential"
LONG_S = 300
ROUNDS = 5


def spoken(lengths_s: Sequence[float]) -> list[Spoken]:
    """Return recordings of known text of about these lengths."""
    return list(speak_sentences(TEXT.read_text(), lengths_s))


def models(folder: Path) -> dict[str, str]:
    """Return the real models that are at hand, by name."""
    return {"tiny.en": str(demo_folder()), "base": str(base_folder(folder))}


def _contests(bench: Bench, lengths_s: Sequence[float]) -> Iterator[tuple[str, Contest]]:
    recordings = spoken(lengths_s)
    for name, setting in models(bench.folder).items():
        if bench.quick and name != "tiny.en":
            continue
        (folder := bench.folder / f"{name}-spool").mkdir()
        with closing(Contest(setting, folder, recordings, peer_python=bench.peer_python)) as contest:
            yield name, contest


def measure(bench: Bench) -> Iterator[Row]:
    """Many recordings at once, greedy, in float32 against all and in bfloat16 against int8."""
    times = bench.pick(ROUNDS, 1)
    for model, contest in _contests(bench, LENGTHS_S[: bench.pick(8, 3)]):
        contestants = {OURS: contest.ours(), UPSTREAM: contest.upstream()}
        if bench.peer_python:
            contestants[BATCHED] = contest.peer("float32", batched=True)
            contestants[SEQUENTIAL] = contest.peer("float32", batched=False)
        goals = {UPSTREAM: 3.0 if model == "tiny.en" else 2.5, SEQUENTIAL: 1.3}
        goals[BATCHED] = 1.1 if model == "tiny.en" else 1.0
        yield from compare(f"{len(contest.recordings)} jobs, greedy, {model}", contest, contestants, goals, times)
        what = f"{len(contest.recordings)} jobs, greedy, {model}, bfloat16 against int8"
        if bench.peer_python:
            try:
                contestants = {OURS: contest.ours("bfloat16"), BATCHED: contest.peer("int8", batched=True)}
            except Failed as error:  # a processor without bfloat16
                yield Row(what=what, measured=f"not measured: {error}")
            else:
                yield from compare(what, contest, contestants, {BATCHED: 1.2}, times)


def measure_options(bench: Bench) -> Iterator[Row]:
    """Word timestamps, and beams."""
    for model, contest in _contests(bench, LENGTHS_S[: bench.pick(8, 3)]):
        if model != "tiny.en":
            continue  # openai-whisper's beams on base take minutes a round
        for what, options in (("word timestamps", {"word_timestamps": True}), ("beam 5", {"beam_size": 5})):
            contestants = {OURS: contest.ours(**options), UPSTREAM: contest.upstream(**options)}
            what = f"{len(contest.recordings)} jobs, {what}, {model}"
            yield from compare(what, contest, contestants, {UPSTREAM: 2.5}, bench.pick(ROUNDS, 1))


def measure_alone(bench: Bench) -> Iterator[Row]:
    """One window, and one long recording in both modes."""
    # Recordings end with a sentence: less would be none, more than half a minute a second window.
    for model, contest in _contests(bench, (12, bench.pick(LONG_S, 60))):
        english = {"language": "en"}
        contestants = {OURS: contest.ours(**english), UPSTREAM: contest.upstream(**english)}
        what = f"one job of one window, language given, {model}"
        yield from compare(what, contest, contestants, {UPSTREAM: 1.6}, bench.pick(9, 2), names=["0"])
        contestants = {OURS: contest.ours(), "mode fast": contest.ours(mode="fast"), UPSTREAM: contest.upstream()}
        heard = rounds(contestants, ["1"], bench.pick(ROUNDS, 1))
        for mode, goal in ((OURS, 1.3), ("mode fast", 2.5)):
            what = f"one recording of {contest.audio_s(['1']):.0f} s, {'exact' if mode == OURS else 'fast'}, {model}"
            yield row(what, contest, ["1"], heard[mode], UPSTREAM, heard[UPSTREAM], goal)


def measure_busy(bench: Bench) -> Iterator[Row]:
    """One window while another program computes on one core."""
    for model, contest in _contests(bench, (12,)):
        if model != "tiny.en":
            continue
        contestants = {OURS: contest.ours(language="en"), UPSTREAM: contest.upstream(language="en")}
        if bench.peer_python:
            contestants[SEQUENTIAL] = contest.peer("float32", batched=False, language="en")
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            what = f"one job of one window beside a busy program, language given, {model}"
            yield from compare(what, contest, contestants, {UPSTREAM: 1, SEQUENTIAL: 1}, bench.pick(ROUNDS, 1))
        finally:
            other.kill()
            other.wait()


def compare(
    what: str,
    contest: Contest,
    contestants: Mapping[str, Contestant],
    goals: Mapping[str, float],
    times: int,
    names: Sequence[str] = (),
) -> Iterator[Row]:
    """Let the contestants transcribe, and yield a row for each that ours is compared with."""
    names = names or list(contest.recordings)
    heard = rounds(contestants, names, times)
    for peer, goal in goals.items():
        if peer not in heard:
            yield Row(what=f"{what}: against {peer}", goal=f"≥ {goal:g} ×", measured="not measured: no --peer-python")
        else:
            yield row(what, contest, names, heard[OURS], peer, heard[peer], goal)


def row(
    what: str, contest: Contest, names: Sequence[str], ours: list[Heard], peer: str, theirs: list[Heard], goal: float
) -> Row:
    """Return how many times as fast as a peer we were, and what both did for it."""
    each, audio_s = ratios(ours, theirs), contest.audio_s(names)
    ratio = statistics.median(each)
    sides = [
        f"{audio_s / median_s(heard):.1f} s of audio a second ({heard[-1].windows} windows, "
        f"{heard[-1].tokens:,} tokens, WER {contest.error_percent(heard[-1], names):.2f} %)"
        for heard in (ours, theirs)
    ]
    same = ""
    if peer == UPSTREAM:
        differ = sum(one != other for one, other in zip(ours[-1].said, theirs[-1].said, strict=True))
        same = f"; {differ} of {len(names)} recordings differ"
    return Row(
        what=f"{what}: against {peer}",
        goal=f"≥ {goal:g} ×",
        measured=f"{ratio:.2f} × ({each[0]:.2f} to {each[-1]:.2f}): {' against '.join(sides)}{same}",
        met=ratio >= goal,
        runs=f"{len(each)} of each, alternating",
    )
