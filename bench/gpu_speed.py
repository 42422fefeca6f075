"""How fast the engine is on a GPU: many jobs, one window, words and beams, a long file, urgent clips, a peer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whisper.audio import N_FRAMES

from bench import traffic
from bench.children import Child
from bench.gpu_place import PLANTED_OPTIONS, Place
from bench.gpu_sides import Sides, Timed, against, rate
from bench.recordings import repeat_sample
from bench.report import Row
from bench.runs import Heard
from whisperd.model.helper import speech_threads
from whisperd.model.mel import FileMel
from whisperd.model.speech import SpeechDetector, SpeechTrack
from whisperd.model.worker import Turn, Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    rate: float  # audio seconds a second
    window_ms: float


GOALS: Mapping[str, Goals] = {
    "turbo": Goals(rate=1500, window_ms=70),
    "large-v3": Goals(rate=600, window_ms=150),
}
_PEER_THREADS = 4


def in_turn(ours: Callable[[], Heard], theirs: Callable[[], Heard], times: int) -> tuple[list[Heard], list[Heard]]:
    """Let both work so many times, in turn."""
    heard: tuple[list[Heard], list[Heard]] = [], []
    for number in range(times):
        for side in (0, 1) if number % 2 else (1, 0):
            heard[side].append((ours, theirs)[side]())
    return heard


def jobs(place: Place, size: str) -> Iterator[Row]:
    """One window; eight jobs; and as many as fill the batch. All planted windows cost the same."""
    sides, goals, times = Sides(place, place.planted(size)), GOALS[size], place.pick(5 if size == "turbo" else 3, 1)
    clip = sides.noises("clip", 1, 20)
    sides.warm_up(clip, PLANTED_OPTIONS, upstream=clip)
    recorded = sides.recordings
    ours, theirs = in_turn(
        lambda: sides.ours(clip, PLANTED_OPTIONS),
        lambda: sides.upstream(clip, PLANTED_OPTIONS),
        place.pick(2 * times, 1),
    )
    alone_ms = 1e3 * statistics.median(heard.wall_s for heard in ours)
    yield place.timed(
        Row(
            what=f"{size}: one window, language given",
            goal=f"≤ {goals.window_ms:g} ms",
            measured=f"{alone_ms:.0f} ms",
            met=alone_ms <= goals.window_ms,
            runs=str(len(ours)),
        )
    )
    yield place.timed(against(f"{size}: one window, language given", ours, theirs, 3))
    same = ours[-1].said == theirs[-1].said
    yield Row(what=f"{size}: the tokens of that window", goal="openai-whisper's", measured=_yes(same), met=same)

    eight = sides.noises("job", place.pick(8, 2), place.pick(120, 20))
    (minute,) = sides.noises("minute", 1, place.pick(60, 20))
    sides.warm_up(eight, PLANTED_OPTIONS)
    recorded_before, recorded = sides.recordings - recorded, sides.recordings
    ours, theirs = in_turn(
        lambda: sides.ours(eight, PLANTED_OPTIONS), lambda: sides.upstream([minute], PLANTED_OPTIONS), times
    )
    what, lengths_s = (
        f"{size}: {len(eight)} jobs, greedy with timestamps",
        (sides.audio_s(eight), sides.audio_s([minute])),
    )
    yield place.timed(rate(what, ours, lengths_s[0], goals.rate))
    yield place.timed(against(what, ours, theirs, 10, audio_s=lengths_s))
    during = sides.recordings - recorded

    many = sides.noises("many", place.pick(32, 3), place.pick(60, 20))
    sides.warm_up(many, PLANTED_OPTIONS)
    counters, recorded = sides.runs.engine.counters, sides.recordings
    steps, windows = counters.steps, counters.window_steps
    ours = [sides.ours(many, PLANTED_OPTIONS) for _ in range(times)]
    yield place.timed(rate(f"{size}: {len(many)} jobs", ours, sides.audio_s(many), goals.rate))
    yield Row(
        what=f"{size}: windows in one of their steps, on average; steps recorded before and while jobs were timed",
        measured=f"{(counters.window_steps - windows) / max(1, counters.steps - steps):.1f}; {recorded_before} and "
        f"{during + sides.recordings - recorded}",
    )


def words(place: Place) -> Iterator[Row]:
    """Word timestamps, on real weights where they are at hand: planted ones align with nothing."""
    yield _spoken(place, "word timestamps", {"word_timestamps": True})


def beams(place: Place) -> Iterator[Row]:
    yield _spoken(place, "beam 5", {"beam_size": 5})


def _spoken(place: Place, kind: str, options: dict[str, Any]) -> Row:
    recordings, what = place.recordings()
    sides, options = Sides(place, place.spoken_model()), place.spoken_options(**options)
    names = [sides.record(str(number), each.pcm) for number, each in enumerate(recordings)]
    sides.warm_up(names, options, upstream=names[:1])
    ours, theirs = in_turn(lambda: sides.ours(names, options), lambda: sides.upstream(names, options), place.pick(3, 1))
    return place.timed(against(f"tiny.en: {kind}, {what}", ours, theirs, 8))


def long_file(place: Place, size: str) -> Iterator[Row]:
    """One long file in both modes. openai-whisper hears the first part: its speed is the same all along.

    Speech of 26 s, then a pause: a window of mode fast ends in it, and has room for what planted weights say.
    """
    sides = Sides(place, place.planted(size))
    length_s, part_s, block = place.pick(590, 59), place.pick(118, 29), {"rest_s": 3.5, "rest_every_s": 26.0}
    file = [sides.record("file", repeat_sample(length_s, 1, **block).pcm)]
    part = [sides.record("part", repeat_sample(part_s, 1, **block).pcm)]
    fast = {**PLANTED_OPTIONS, "mode": "fast"}
    sides.warm_up(file, PLANTED_OPTIONS, upstream=part)
    sides.warm_up(file, fast)
    for mode, options, goal in (("exact", PLANTED_OPTIONS, 3.0), ("fast", fast, 15.0)):
        ours, theirs = in_turn(
            lambda options=options: sides.ours(file, options),  # type: ignore[misc]
            lambda: sides.upstream(part, PLANTED_OPTIONS),
            place.pick(3, 1),
        )
        lengths_s = sides.audio_s(file), sides.audio_s(part)
        what = f"{size}: one recording of {lengths_s[0]:.0f} s, {mode}"
        yield place.timed(against(what, ours, theirs, goal, audio_s=lengths_s))


def urgent(place: Place, size: str) -> Iterator[Row]:
    """An interactive clip while the batch is full, when its first token is known, and what it costs the others."""
    sides = Sides(place, place.planted(size), windows=place.pick(0, 2), upstream=False)
    (clip,) = sides.noises("clip", 1, 20)
    full = sides.runs.engine.windows
    others = sides.noises("other", full, place.pick(120, 20))
    sides.warm_up([clip, *others], PLANTED_OPTIONS)
    firsts_ms: dict[bool, list[float]] = {True: [], False: []}  # by whether others stepped beside it

    def on_clip(turn: Turn, began: float) -> None:
        known, stepping = Timed.first[turn]
        firsts_ms[stepping > 1].append(1e3 * (known - began))

    figures = traffic.measure(
        sides.runs, clip, others, place.pick(3, 1), options=PLANTED_OPTIONS, pause_s=0.2, on_clip=on_clip
    )
    alone_s, beside_s, losses = (figures[name] for name in ("alone_s", "beside_s", "losses"))
    what = f"{size}: an interactive 20 s clip beside {full} jobs"
    if beside_s:
        ratio = statistics.median(beside_s) / statistics.median(alone_s)
        yield place.timed(
            Row(
                what=f"{what}, against alone",
                goal="≤ 1.3 ×",
                measured=f"{ratio:.2f} ×: {_median_ms(1e3 * each for each in beside_s)} against "
                f"{_median_ms(1e3 * each for each in alone_s)}",
                met=ratio <= 1.3,
                runs=f"{len(beside_s)} and {len(alone_s)}",
            )
        )
    if firsts_ms[True]:
        yield place.timed(
            Row(
                what=f"{what}: its first token",
                goal="≤ 50 ms",
                measured=f"{_median_ms(firsts_ms[True])}; alone {_median_ms(firsts_ms[False])}",
                met=statistics.median(firsts_ms[True]) <= 50,
                runs=str(len(firsts_ms[True])),
            )
        )
    if not (beside_s and firsts_ms[True]):
        yield Row(what=what, measured="not measured: the jobs were over before it")
    loss = statistics.median(losses)
    yield place.timed(
        Row(
            what=f"{size}: the jobs beside such clips, beyond what the clips take alone",
            goal="≤ 5 %",
            measured=f"{100 * loss:+.1f} % ({100 * min(losses):+.1f} to {100 * max(losses):+.1f})",
            met=loss <= 0.05,
            runs=str(len(losses)),
        )
    )


def host(place: Place) -> Iterator[Row]:
    """What the processor allows: each second of audio is made a mel by one thread, and listened to by another."""
    folder, turn = place.new_folder("host"), Turn()
    recording = repeat_sample(place.pick(600, 30), 1)
    (folder / "audio.pcm").write_bytes(recording.pcm)
    nothing: dict[str, Any] = {"turn": turn, "on_step": lambda: None}
    mel = FileMel(
        folder / "audio.pcm", n_mels=128, worker=Worker("mel"), on_window=lambda start, stop: None, **nothing
    )  # fmt: skip
    track = SpeechTrack(SpeechDetector(), mel.samples, mel.samples_at, worker=Worker("speech"), **nothing)
    began = time.perf_counter()
    for start in range(0, mel.content_frames, N_FRAMES):
        mel.frames(start, start + N_FRAMES, N_FRAMES)
    heard = time.perf_counter()
    track.probabilities()
    ended = time.perf_counter()
    mel.close()
    threads, goal = speech_threads(), max(each.rate for each in GOALS.values())
    mel_rate, speech_rate = recording.length_s / (heard - began), recording.length_s / (ended - heard)
    allowed = min(mel_rate, threads * speech_rate)
    yield place.timed(
        Row(
            what="the processor: seconds of audio a second that mels and speech detection allow",
            goal=f"≥ {goal:,.0f}",
            measured=f"{allowed:,.0f} (mels {mel_rate:,.0f} on a core, speech {speech_rate:,.0f} on each of {threads})",
            met=allowed >= goal,
            runs="1",
        )
    )


def peer(place: Place) -> Iterator[Row]:
    """faster-whisper's batches, on tiny.en: its kind of file is at hand of that alone."""
    what, name = "tiny.en, greedy", "faster-whisper batched"
    if not place.peer_python:
        yield Row(what=f"{what}: against {name}", goal="≥ 2 ×", measured="not measured: no peer here (--peer-python)")
        return
    recordings, spoken = place.recordings()
    setting = place.spoken_model()
    sides, options = Sides(place, setting, upstream=False), place.spoken_options()
    names = [sides.record(str(number), each.pcm) for number, each in enumerate(recordings)]
    kind = "float16" if place.on_gpu else "float32"
    script = Path(__file__).with_name("peer.py")
    child = Child([place.peer_python, str(script), setting, str(_PEER_THREADS), kind, place.device.type])
    try:

        def theirs() -> Heard:
            files = [str(sides.runs.spool / name / "audio.pcm") for name in names]
            return Heard(**child.ask(files=files, batched=True, options=options))

        sides.warm_up(names, options)
        theirs()
        ours, others = in_turn(lambda: sides.ours(names, options), theirs, place.pick(3, 1))
        yield place.timed(against(f"{what}, {spoken}", ours, others, 2, peer=name))
    finally:
        child.close()


def _median_ms(values: Any) -> str:
    times_ms = sorted(values)
    return f"{statistics.median(times_ms):.0f} ms (at most {times_ms[-1]:.0f})"


def _yes(value: bool) -> str:
    return "yes" if value else "NO"
