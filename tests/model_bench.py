"""A real model in the test's own process, and runs on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whisper

from bench.forced import Choices, replay
from bench.runs import Runs
from tests.drawing import seeds_of_runs, upstream_draws
from tests.support import speak, wait_until
from whisperd.model.loading import LoadedModel, load
from whisperd.model.run import Run
from whisperd.model.transcript import Transcript
from whisperd.protocol.helper_messages import HelperMessage, Progress, Segments
from whisperd.protocol.options import DEFAULTS, parse_options

Job = tuple[str, dict[str, Any]]  # the folder of a recording, and options


class Bench(Runs):
    """Runs that keep what they send, and upstream's answers to compare them with."""

    def __init__(self, model: LoadedModel, spool: Path, *, release: bool = False, **engine: Any) -> None:
        self.on_step: Callable[[], None] = lambda: None
        super().__init__(model, spool, on_step=lambda: self.on_step(), release=release, fast_windows=3, **engine)
        self._upstream: dict[str, tuple[dict[str, Any], Choices]] = {}

    def begin(
        self, folder: str = "speech", *, journal: int = 0, told: int = 0, **options: Any
    ) -> tuple[Run, list[HelperMessage]]:
        """Return a run that has not begun, and the list in which what it sends will be."""
        sent: list[HelperMessage] = []
        return self.run(folder, options, journal=journal, told=told, send=sent.append), sent

    def upstream(self, folder: str = "speech", **options: Any) -> dict[str, Any]:
        """Return what `whisper.transcribe` gives for the real model and the same samples (computed once)."""
        return self._heard(folder, options)[0]

    def choices(self, folder: str = "speech", **options: Any) -> Choices:
        """Return what it answered there window by window, and every token that it chose greedily."""
        return self._heard(folder, options)[1]

    def _heard(self, folder: str, options: dict[str, Any]) -> tuple[dict[str, Any], Choices]:
        parsed = parse_options(options)
        key = f"{folder} {parsed}"
        if key not in self._upstream:
            choices = Choices()
            with choices.listening(folder):
                self._upstream[key] = self._transcribe(folder, parsed), choices
        return self._upstream[key]

    def _transcribe(self, folder: str, parsed: dict[str, Any]) -> dict[str, Any]:
        arguments = {name: parsed[name] for name in DEFAULTS}
        arguments |= {"temperature": tuple(parsed["temperature"]), "fp16": False}
        result: dict[str, Any] = whisper.transcribe(self.model.whisper, self.samples(folder), **arguments)
        return result

    def hooks(self) -> int:
        """Return how many hooks are left on the decoder."""
        return sum(len(module._forward_hooks) for module in self.model.whisper.decoder.modules())


def all_of(runs: Sequence[Run], *, arrive: Callable[[int], None] = lambda n: None) -> list[Transcript]:
    """Return the transcripts of runs beside each other, in threads `run N`: each begins once `arrive(N)` returns."""
    found: dict[int, Transcript] = {}

    def transcribe(n: int) -> None:
        found[n] = runs[n].transcribe()

    threads = [threading.Thread(target=transcribe, args=(n,), name=f"run {n}") for n in range(len(runs))]
    for n, thread in enumerate(threads):
        arrive(n)
        thread.start()
    for thread in threads:
        thread.join(240)
    return [found[n] for n in range(len(runs))]


def beside_each_other(bench: Bench, jobs: Sequence[Job], *, upstream: Bench) -> tuple[list[Transcript], float]:
    """Transcribe jobs beside each other: each says what `upstream` has openai-whisper say of it alone.

    One comes when those before it have stepped a few times. Every fourth is urgent, from the second on. What is drawn,
    openai-whisper draws with the same numbers. Returns the transcripts, and how many windows a step had on average.
    """
    runs = [bench.begin(folder, **options) for folder, options in jobs]
    for run, _ in runs[1::4]:
        run.turn.interactive = True
    counters = bench.engine.counters
    steps, window_steps = counters.steps, counters.window_steps
    beside = set[frozenset[bool]]()  # whether the windows that stepped together were urgent ones

    def look() -> None:
        beside.add(frozenset(request.turn.interactive for request in bench.engine.batcher._live.owners))

    def arrive(n: int) -> None:
        wait_until(lambda: counters.steps >= steps + 9 * n, timeout_s=120)  # a window takes more

    bench.on_step = look
    try:
        with seeds_of_runs() as seeds:
            transcripts = all_of([run for run, _ in runs], arrive=arrive)
    finally:
        bench.on_step = lambda: None
    assert len(jobs) == 1 or {True, False} in beside, "urgent ones broke in"
    for n, ((folder, options), (_, sent), transcript) in enumerate(zip(jobs, runs, transcripts, strict=True)):
        with upstream_draws(seeds[f"run {n}"]):
            theirs = upstream.upstream(folder, **options)
        check_equal(transcript, sent, theirs, words=options.get("word_timestamps", False))
    return transcripts, (counters.window_steps - window_steps) / (counters.steps - steps)


def plain(upstream: dict[str, Any], *, words: bool) -> list[dict[str, Any]]:
    """Return upstream's segments with plain numbers, without the keys that the contract does not have."""

    def number(value: Any) -> Any:
        return float(value) if isinstance(value, float) else value

    return [
        {
            key: [{name: number(part) for name, part in word.items()} for word in value]
            if key == "words"
            else number(value)
            for key, value in segment.items()
            # Upstream gives an empty list of words to segments without text, whatever was asked for.
            if key != "seek" and (words or key != "words")
        }
        for segment in upstream["segments"]
    ]


_SCORES = ("avg_logprob", "no_speech_prob", "probability")  # sums of thousands of roundings, in another order


def exact_part(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what must be equal, to the last bit."""
    return [
        {key: exact_part(value) if key == "words" else value for key, value in each.items() if key not in _SCORES}
        for each in segments
    ]


def scores(segments: list[dict[str, Any]]) -> list[float]:
    """Return what may differ a little."""
    return [
        value
        for each in segments
        for part in (each, *each.get("words", []))
        for key, value in part.items()
        if key in _SCORES
    ]


def check_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Segments are equal, their scores within 1e-4."""
    assert exact_part(ours) == exact_part(theirs)
    assert scores(ours) == pytest.approx(scores(theirs), abs=1e-4)


def check_equal(transcript: Transcript, sent: list[HelperMessage], upstream: dict[str, Any], *, words: bool) -> None:
    """A transcript, and what its run sent on the way, are what `whisper.transcribe` gives."""
    wire = transcript.to_wire()
    wanted = plain(upstream, words=words)
    check_same(wire["segments"], wanted)
    assert (wire["text"], wire["language"]) == (upstream["text"], upstream["language"])
    live = [segment for message in sent if isinstance(message, Segments) for segment in message.segments]
    assert live == wire["segments"]
    progress = [message for message in sent if isinstance(message, Progress)]
    assert [message.done for message in progress] == sorted({message.done for message in progress})
    assert progress[-1].done == progress[-1].total == transcript.duration_s


def speak_into(spool: Path, text: str, **seconds: float) -> None:
    """Put spoken `text` into the spool's folder `speech`, and its first seconds into others."""
    speech = speak(text, spool / "speech.wav").read_bytes()[44:]
    first = {name: speech[: 2 * round(16_000 * length_s)] for name, length_s in seconds.items()}
    write_folders(spool, speech=speech, **first)


def hard_to_hear(speech: Path) -> bytes:
    """Return the samples of a WAV file in so much noise that openai-whisper tries again, warmer."""
    samples = np.frombuffer(speech.read_bytes()[44:], "<i2").astype(np.float64)
    samples += 0.7 * samples.std() * np.random.default_rng(7).standard_normal(len(samples))
    return (samples * 8000 / abs(samples).max()).astype("<i2").tobytes()


def fed_the_same(bench: Bench, jobs: Iterable[Job]) -> list[float]:
    """Return by how much our decoder, fed what openai-whisper chose greedily for jobs, sees each choice otherwise."""
    choices = Choices()
    for folder, options in jobs:
        choices.windows += bench.choices(folder, **options).windows
    return replay(choices, bench.engine)


def write_folders(spool: Path, **recordings: bytes) -> None:
    """Put recordings (16 kHz s16le) where runs of these folders find them."""
    for folder, pcm in recordings.items():
        (spool / folder).mkdir()
        (spool / folder / "audio.pcm").write_bytes(pcm)


def open_bench(setting: str, spool: Path, **engine: Any) -> Bench:
    """Return the bench of a model, which computes with one thread."""
    # Two teams of threads on cores that others use too wait for each other.
    torch.set_num_threads(1)
    return Bench(
        load(setting, cache_dir=spool, device="cpu", dtype="auto", on_step=lambda: None, environ={}), spool, **engine
    )
