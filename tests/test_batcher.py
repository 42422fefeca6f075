"""The batcher on real weights: many runs at once say what each says alone, whoever breaks in."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.words import word_error_rate
from tests.model_bench import Bench, check_same, open_bench, speak_into, write_folders
from tests.support import requires_program
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.windows import KeptWindows
from whisperd.model.loading import load
from whisperd.model.run import Run
from whisperd.model.transcript import Transcript
from whisperd.protocol.errors import WhisperdError

TEXT = (
    "The harbour was quiet in the morning. A small boat came in with the tide, and two men carried fish to the market."
)
# A few seconds each: what they are about is that they run beside each other.
JOBS: list[dict[str, Any]] = [
    {},
    {"condition_on_previous_text": False, "initial_prompt": "A story of the sea."},
    {"word_timestamps": True, "clip_timestamps": [0, 4]},
    {"beam_size": 5, "patience": 1.5, "temperature": 0, "clip_timestamps": [1, 5]},
    {"temperature": [0.0, 0.0], "logprob_threshold": 0.0, "clip_timestamps": [2, 6]},  # always tried again
    {"suppress_tokens": "", "clip_timestamps": [3]},
]


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spool = tmp_path_factory.mktemp("spool")
    speak_into(spool, TEXT)
    write_folders(spool, silence=bytes(2 * 16_000 * 65))
    return spool


@pytest.fixture(scope="module")
def tiny(spool: Path) -> Bench:
    return open_bench("demo", spool)


def at_once(bench: Bench, runs: list[Run]) -> list[Transcript]:
    """Return the transcripts of runs that all begin together; interactive ones break in after some steps of others."""
    found: dict[int, Transcript] = {}
    batcher, break_in = bench.engine._batcher, threading.Event()
    break_in_at = bench.engine.counters.steps + 5

    def look() -> None:
        if bench.engine.counters.steps >= break_in_at and batcher._live.count and not break_in.is_set():
            break_in.set()
            with batcher._changed:
                batcher._changed.wait_for(lambda: any(each.turn.interactive for each in batcher._waiting), 60)

    def work(n: int, run: Run) -> None:
        if run.turn.interactive:
            assert break_in.wait(240)
        found[n] = run.transcribe()

    bench.on_step = look
    threads = [threading.Thread(target=work, args=each) for each in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    bench.on_step = lambda: None
    return [found[n] for n in range(len(runs))]


@requires_program("flite")
@pytest.mark.parametrize("count", [2, 5, 16, "5, read late as on a GPU"])
def test_runs_beside_each_other_say_what_upstream_says(
    tiny: Bench, count: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(count, str):
        monkeypatch.setattr(Kernels, "reads_late", True)
        monkeypatch.setattr(Kernels, "encodes_beside_steps", True)
        count = 5
    jobs = [JOBS[n % len(JOBS)] for n in range(count)]
    random.Random(count).shuffle(jobs)
    runs = [tiny.begin(**options)[0] for options in jobs]
    for run in runs[::4]:
        run.turn.interactive = True
    counters = tiny.engine.counters
    steps, together = counters.steps, counters.window_steps
    for options, transcript in zip(jobs, at_once(tiny, runs), strict=True):
        segments = [segment.to_wire() for segment in transcript.segments]
        for segment in segments:
            segment.pop("speech", None)
        check_same(segments, tiny.upstream_segments(**options))
    if count > 2:
        assert counters.window_steps - together > 1.5 * (counters.steps - steps), "they stepped together"


def test_a_window_seen_before_is_not_decoded_again(tiny: Bench) -> None:
    options = {"temperature": 0, "condition_on_previous_text": False, "no_speech_threshold": None}
    counters = tiny.engine.counters
    windows, reused = counters.windows, counters.reused
    transcript = tiny.begin("silence", **options)[0].transcribe()
    assert (counters.windows - windows, counters.reused - reused) == (2, 1)
    assert [segment.tokens for segment in transcript.segments] == [
        segment["tokens"] for segment in tiny.upstream("silence", **options)["segments"]
    ]
    assert transcript.timing.windows == 2


@requires_program("flite")
def test_bfloat16_hears_the_same_words(spool: Path) -> None:
    try:
        model = load("demo", cache_dir=spool, device="cpu", dtype="bfloat16", on_step=lambda: None, environ={})
    except WhisperdError as error:
        pytest.skip(error.message)
    bench = Bench(model, spool, release=True)
    transcript = bench.begin(temperature=0, word_timestamps=True)[0].transcribe()
    assert word_error_rate(TEXT, transcript.text) < 0.15
    assert all(segment.words for segment in transcript.segments)


def test_digest_tells_windows_apart() -> None:
    kept, mel = KeptWindows(), torch.zeros(80, 3000)
    first = kept.window(mel)
    assert kept.window(mel.clone()) is first
    mel[3, 7] = np.nextafter(np.float32(0), np.float32(1)).item()
    assert kept.window(mel) is not first
