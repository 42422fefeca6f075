"""Runs on real weights say what openai-whisper says about the same samples: tokens, words and times are equal."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import whisper

from bench.fidelity import NEAR_TIE
from bench.recordings import TEXT as STORY
from bench.recordings import speak_sentences
from bench.weights import base_folder
from bench.words import word_error_rate
from tests.held_batcher import CountsBlocks
from tests.model_bench import (
    Bench,
    Job,
    beside_each_other,
    check_equal,
    check_same,
    fed_the_same,
    hard_to_hear,
    open_bench,
    speak_into,
    write_folders,
)
from tests.support import requires_program, speak, speak_apart
from whisperd.model.coverage import Coverage, length_s
from whisperd.model.fast import windows_of
from whisperd.model.run import clips_of
from whisperd.model.speech import Stretch
from whisperd.model.transcript import WORST_LOGPROB, segment_of
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.helper_messages import JournalEntry, Progress, Segments
from whisperd.protocol.options import DEFAULTS

pytestmark = requires_program("flite")

# A window of speech, and the beginning of a second.
TEXT = """
Permission is granted to any person who obtains a copy of this work to use it without any restriction. The notice above
shall be included in all copies. Every morning the old man walked down to the river, sat on the same wooden bench, and
counted the boats that went by. On a good day there were more than thirty of them. In the evening he wrote the number
into a small black book, and then he went home to his wife. The children of the village thought that he was waiting for
someone. Nobody ever asked him, and so nobody ever knew. The work is provided as it is, with no warranty of any kind.
"""


# As long, with fewer words: what is about other things than many words takes half the time.
FEW = (
    "Every morning the old man walked down to the river. Nobody ever asked him. Then he went home to his wife. "
    "On a good day there were more than thirty of them"
)


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a spool with `speech` (half a minute and more), `short` and `nothing` of it.

    In `few` four sentences are spoken, ten seconds apart: the last of them in a second window.
    """
    spool = tmp_path_factory.mktemp("spool")
    speak_into(spool, TEXT, short=5, nothing=0)
    write_folders(spool, few=speak_apart(FEW, spool / "few.wav", every_s=10).read_bytes()[44:])
    write_folders(spool, noisy=hard_to_hear(speak(FEW.split(".")[0], spool / "noisy.wav", voice="rms")))
    return spool


@pytest.fixture(scope="module")
def tiny(spool: Path) -> Bench:
    return open_bench("demo", spool, kernels=CountsBlocks())


@pytest.fixture(scope="module")
def base(spool: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return open_bench(str(base_folder(tmp_path_factory.mktemp("models"))), spool)


def test_tiny_en_leaves_out_what_upstream_leaves_out_of_silence(tiny: Bench) -> None:
    """Other options: `test_batcher.py`."""
    options = {"word_timestamps": True, "hallucination_silence_threshold": 0.5, "clip_timestamps": [10]}
    run, sent = tiny.begin("speech", **options)
    check_equal(run.transcribe(), sent, tiny.upstream("speech", **options), words=True)
    assert tiny.hooks() == 0


TWICE = [0, 2.5, 2.5, 5]  # two windows of few words
RIVER = "A story of an old man and a river."
ON_BASE: dict[str, Job] = {
    "as it comes": ("few", {}),  # the language is detected, and the second window knows the first
    "words in a clip": ("short", {"word_timestamps": True, "clip_timestamps": [1, 4], "language": "en"}),
    "translated": (
        "short",
        {
            "language": "german", "task": "translate", "temperature": 0, "clip_timestamps": TWICE,
            "condition_on_previous_text": False, "initial_prompt": RIVER,
        },
    ),
    "a prompt for each window": (
        "short",
        {"initial_prompt": RIVER, "carry_initial_prompt": True, "clip_timestamps": TWICE, "language": "en"},
    ),
    "beams": ("short", {"beam_size": 5, "patience": 1.5, "temperature": 0, "language": "en"}),
    # Hard to hear, so it is tried again and drawn.
    "noisy": ("noisy", {"temperature": [0.0, 0.6], "best_of": 2, "language": "en"}),
}  # fmt: skip


def test_base_hears_detects_and_translates_beside_each_other(base: Bench) -> None:
    names = random.Random(1).sample([*ON_BASE], len(ON_BASE))
    transcripts, windows_a_step = beside_each_other(base, [ON_BASE[name] for name in names], upstream=base)
    assert windows_a_step > 1.2
    said = dict(zip(names, transcripts, strict=True))
    few, translated = said["as it comes"], said["translated"]
    assert word_error_rate(FEW, few.text) < 0.1
    assert (few.model, few.language, translated.language) == ("base", "en", "de")
    assert not few.truncated
    assert few.to_wire()["versions"].keys() == {"whisperd", "whisper", "torch"}
    assert said["words in a clip"].segments[0].words
    assert min(segment.temperature for segment in said["noisy"].segments) > 0
    changes = fed_the_same(base, [ON_BASE["as it comes"]])
    assert len(changes) > 40
    assert all(change <= NEAR_TIE for change in changes)


def test_no_audio_at_all(base: Bench) -> None:
    run, sent = base.begin("nothing", word_timestamps=True)
    transcript, upstream = run.transcribe(), base.upstream("nothing", word_timestamps=True)
    assert (transcript.segments, transcript.text) == ([], "")
    assert {type(message) for message in sent} == {JournalEntry}, "a language was found in no sound"
    assert transcript.language == upstream["language"]


# --- cancelling ---


@pytest.mark.parametrize("where", ["while encoding", "while decoding", "while aligning"])
def test_a_cancelled_run_leaves_nothing_behind(tiny: Bench, where: str) -> None:
    run, sent = tiny.begin("short", word_timestamps=True)
    counters, kernels = tiny.engine.counters, tiny.engine.kernels
    assert isinstance(kernels, CountsBlocks)
    windows, tokens, blocks = counters.windows, counters.tokens, kernels.blocks

    def cancel() -> None:
        decoded = {
            "while encoding": kernels.blocks == blocks + 2,
            "while decoding": counters.tokens >= tokens + 5,
            "while aligning": counters.windows > windows,
        }
        run.turn.cancelled = run.turn.cancelled or decoded[where]

    tiny.on_step = cancel
    try:
        with pytest.raises(WhisperdError) as raised:
            run.transcribe()
    finally:
        tiny.on_step = lambda: None
    assert raised.value.code == "cancelled"
    assert kernels.blocks - blocks == (2 if where == "while encoding" else tiny.model.whisper.dims.n_audio_layer)
    assert counters.windows == windows + (where == "while aligning")
    assert counters.tokens - tokens <= (0 if where == "while encoding" else 448)
    assert not any(isinstance(message, Segments) for message in sent)
    assert tiny.hooks() == 0
    assert whisper.model.MultiHeadAttention.use_sdpa
    again, sent = tiny.begin("short", word_timestamps=True)
    check_equal(again.transcribe(), sent, tiny.upstream("short", word_timestamps=True), words=True)


# --- options that upstream cannot stand, or this model ---


@pytest.mark.parametrize("clips", [[100], [100, 200], [4.9, 1e6], [0, 100]])
def test_clips_beyond_the_end_end(tiny: Bench, clips: list[float]) -> None:
    run, sent = tiny.begin("short", clip_timestamps=clips)
    transcript = run.transcribe()
    if clips[0] >= 100:
        assert (transcript.text, transcript.segments) == ("", [])
    if clips == [0, 100]:
        check_equal(transcript, sent, tiny.upstream("short"), words=False)


@pytest.mark.parametrize(("words", "advice"), [(True, "without word_timestamps$"), (False, "with clip_timestamps")])
def test_a_run_that_does_not_move_on_is_failed(tiny: Bench, words: bool, advice: str) -> None:
    """Upstream's loop stays at the end of the recording when a clip ends after it: we give it no such clip."""
    run, _ = tiny.begin("short", temperature=0, word_timestamps=words)
    run.order = replace(run.order, options={**run.order.options, "clip_timestamps": "0,100"})  # not parsed: not clamped
    with pytest.raises(WhisperdError, match=f"does not get past second [45].*{advice}") as raised:
        run.transcribe()
    assert raised.value.code == "internal"


@pytest.mark.parametrize("clips", [[0, 2, 0, 2, 0, 2, 0, 2], [0, 2, 0, 3, 0, 4]])
def test_a_clip_may_be_asked_for_again_and_again(tiny: Bench, clips: list[float]) -> None:
    run, sent = tiny.begin("short", temperature=0, clip_timestamps=clips)
    upstream = tiny.upstream("short", temperature=0, clip_timestamps=clips)
    check_equal(run.transcribe(), sent, upstream, words=False)
    assert len(upstream["segments"]) >= 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"language": "de"}, "knows English only, not German"),
        ({"task": "translate"}, "cannot translate: it knows English only"),
        ({"suppress_tokens": "1,60000"}, "60000 is beyond the vocabulary"),
    ],
)
def test_what_tiny_en_cannot_do(tiny: Bench, options: dict[str, Any], words: str) -> None:
    run, _ = tiny.begin(**options)
    with pytest.raises(WhisperdError, match=words) as raised:
        run.transcribe()
    assert raised.value.code == "bad_request"


def test_what_base_cannot_do(base: Bench) -> None:
    run, _ = base.begin("short", language="yue")
    with pytest.raises(WhisperdError, match="does not know Cantonese") as raised:
        run.transcribe()
    assert raised.value.code == "bad_request"


def test_numbers_that_are_none_become_the_worst() -> None:
    values = {"id": 0, "start": 0.0, "end": np.float64(1.5), "text": "", "tokens": [], "temperature": 0.0}
    values |= {"avg_logprob": float("nan"), "compression_ratio": 1.0, "no_speech_prob": float("nan")}
    segment = segment_of(values, words=False)
    assert (segment.avg_logprob, segment.no_speech_prob, type(segment.end)) == (WORST_LOGPROB, 0.0, float)
    assert "words" not in segment.to_wire()


def test_the_defaults_are_those_of_the_function() -> None:
    keywords = whisper.transcribe.__kwdefaults__
    for name, value in DEFAULTS.items():
        if name in keywords:
            assert keywords[name] == (tuple(value) if isinstance(value, list) else value), name


# --- mode fast, and what a transcript tells of itself ---


@pytest.fixture(scope="module")
def small(spool: Path, micro: Path) -> Bench:
    """Return one of a model that says something about any sound."""
    return open_bench(str(micro), spool)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_each_window_is_encoded_once(small: Bench, mode: str) -> None:
    """The language is found in the first one; each is tried again, and its words get their times."""
    counters = small.engine.counters
    windows, encoded = counters.windows, counters.encoded
    options = {"temperature": [0, 0.4], "compression_ratio_threshold": 0.01, "best_of": 2, "word_timestamps": True}
    run, sent = small.begin("speech", mode=mode, **options)
    transcript = run.transcribe()
    asked_for = len(run._times_seen)
    assert asked_for >= 2
    assert (counters.windows - windows, counters.encoded - encoded) == (2 * asked_for, asked_for)
    assert all(segment.words for segment in transcript.segments)
    answers = [message for message in sent if isinstance(message, JournalEntry)]
    assert len(answers) == 1 + 3 * asked_for, "the language; two tries and words of each"


@pytest.fixture(scope="module")
def with_silence(spool: Path) -> Path:
    """Add `between`: 40 s of silence and noise, speech, 35 s of noise, speech; and `noise`, 20 s: nobody speaks."""
    speech = np.fromfile(spool / "speech" / "audio.pcm", "<i2")
    noise = (np.random.default_rng(5).standard_normal(35 * 16_000) * 60).astype("<i2")
    parts = (np.zeros(5 * 16_000, "<i2"), noise, speech[: 20 * 16_000], noise, speech[20 * 16_000 :])
    write_folders(spool, between=np.concatenate(parts).tobytes(), noise=noise[: 20 * 16_000].tobytes())
    return spool


def test_fast_says_the_words_in_order_and_only_where_somebody_speaks(tiny: Bench, with_silence: Path) -> None:
    run, sent = tiny.begin("between", mode="fast")
    transcript = run.transcribe()
    assert word_error_rate(TEXT, transcript.text) < 0.15
    starts = [segment.start for segment in transcript.segments]
    assert starts == sorted(starts)
    assert [segment.id for segment in transcript.segments] == list(range(len(starts)))
    assert all(segment.speech for segment in transcript.segments)
    assert starts[0] > 39
    live = [segment for message in sent if isinstance(message, Segments) for segment in message.segments]
    assert live == transcript.to_wire()["segments"]
    progress = [message.done for message in sent if isinstance(message, Progress)]
    assert progress == sorted(progress)
    assert transcript.to_wire()["mode"] == "fast"
    assert transcript.coverage.transcribed_s > 0.9 * transcript.coverage.speech_s > 20


def test_fast_gives_the_same_however_many_windows_are_decoded_together(tiny: Bench, with_silence: Path) -> None:
    texts, windows_a_step, counters = [], [], tiny.engine.counters
    for at_once in (1, 5):
        run, _ = tiny.begin("between", mode="fast", temperature=0, initial_prompt="An old man, a river.")
        run._fast_windows = at_once
        steps, window_steps = counters.steps, counters.window_steps
        texts.append(run.transcribe().to_wire()["segments"])
        windows_a_step.append((counters.window_steps - window_steps) / (counters.steps - steps))
    check_same(*texts)
    assert windows_a_step[0] == 1 < 1.3 < windows_a_step[1]


@pytest.mark.parametrize("folder", ["noise", "nothing"])
def test_fast_gives_no_text_where_nobody_speaks(with_silence: Path, small: Bench, folder: str) -> None:
    """Not even of a model that says something about any sound."""
    assert folder == "nothing" or small.begin(folder)[0].transcribe().text
    run, _ = small.begin(folder, mode="fast")
    transcript = run.transcribe()
    assert (transcript.text, transcript.segments) == ("", [])
    assert transcript.coverage == Coverage(speech_s=0, transcribed_s=0, gaps=[])


def test_fast_ends_where_somebody_speaks_in_the_last_half_frame(tiny: Bench) -> None:
    speech = (tiny.spool / "speech" / "audio.pcm").read_bytes()
    tiny.record("cut", speech[: 2 * (8 * 16_000 + 120)])
    run, _ = tiny.begin("cut", mode="fast", temperature=0)
    assert run.transcribe().segments


def test_fast_hears_each_window_once_and_to_its_end(tiny: Bench) -> None:
    """Left to itself tiny.en ends the second window 7 s early, and would have to hear the rest once more."""
    (recording,) = speak_sentences(STORY.read_text(), (36,))
    tiny.record("story", recording.pcm)
    run, _ = tiny.begin("story", mode="fast", temperature=0)
    transcript = run.transcribe()
    assert transcript.timing.windows == 2
    assert word_error_rate(recording.text, transcript.text) < 0.1
    assert recording.length_s - 1 < transcript.segments[-1].end < recording.length_s + 1
    assert transcript.coverage.gaps == []


def test_fast_decodes_a_window_that_comes_again_once(tiny: Bench) -> None:
    """The same speech after half a minute, both times cut alike, and the two at work at the same time."""
    speech = (tiny.spool / "few" / "audio.pcm").read_bytes()[: 2 * 30 * 16_000]
    tiny.record("again", speech * 2)
    counters = tiny.engine.counters
    windows, encoded, reused = counters.windows, counters.encoded, counters.reused
    run, _ = tiny.begin("again", mode="fast", temperature=0, clip_timestamps=[1, 2.01, 31, 32.01])
    first, second = run.transcribe().segments
    assert (counters.windows - windows, counters.encoded - encoded, counters.reused - reused) == (1, 1, 1)
    assert (first.text, round(second.start - first.start, 2)) == (second.text, 30)


def test_fast_keeps_to_the_clips(tiny: Bench, with_silence: Path) -> None:
    run, _ = tiny.begin("between", mode="fast", clip_timestamps="50,58")
    segments = run.transcribe().segments
    assert segments
    assert all(49.5 <= segment.start <= segment.end <= 58.5 for segment in segments)


def test_fast_transcribes_nothing_of_what_lies_between_two_clips(tiny: Bench) -> None:
    run, _ = tiny.begin("speech", mode="fast", temperature=0, clip_timestamps=[0, 4, 8, 12])
    starts = [segment.start for segment in run.transcribe().segments]
    assert not [start for start in starts if 4.5 < start < 7.5]
    assert (min(starts) < 4, max(starts) >= 8) == (True, True), "and something of both"


def test_windows_reach_from_no_stretch_that_was_asked_for_into_another() -> None:
    def windows(speech: list[tuple[float, float]], asked_for: list[tuple[float, float]]) -> list[tuple[float, float]]:
        parts = [[Stretch(start_s=start, end_s=end) for start, end in each] for each in (speech, asked_for)]
        return [(window.start_s, window.end_s) for window in windows_of(*parts)]

    assert windows([(0, 20)], [(0, 5), (10, 15)]) == [(0, 5), (10, 15)]
    assert windows([(1, 4), (6, 9), (11, 30), (31, 40)], [(0, 10), (12, 60)]) == [(1, 9), (12, 40)]
    assert windows([(1, 4), (6, 9), (20, 40)], [(0, 50)]) == [(1, 9), (20, 40)], "at most 30 s"
    assert windows([(1, 4)], [(2, 2), (10, 15)]) == []


def test_exact_tells_on_text_without_speech_and_leaves_it(tiny: Bench, with_silence: Path) -> None:
    # Without its threshold upstream writes something for noise.
    options = {"no_speech_threshold": None, "logprob_threshold": None, "temperature": 0}
    run, _ = tiny.begin("noise", **options)
    transcript, upstream = run.transcribe(), tiny.upstream("noise", **options)
    assert transcript.text == upstream["text"] != ""
    assert [segment["speech"] for segment in transcript.to_wire()["segments"]] == [False] * len(upstream["segments"])
    assert transcript.to_wire()["coverage"]["speech_s"] == 0


def test_exact_says_what_it_left_out(tiny: Bench, with_silence: Path) -> None:
    # Everything is taken for silence.
    run, _ = tiny.begin("speech", no_speech_threshold=-1.0, logprob_threshold=None, temperature=0)
    transcript = run.transcribe()
    assert transcript.segments == []
    assert transcript.coverage.transcribed_s == 0
    assert length_s(transcript.coverage.gaps) > 0.8 * transcript.coverage.speech_s > 20
    run, _ = tiny.begin("short")
    assert run.transcribe().coverage.gaps == []


def test_clips_as_upstream_reads_them() -> None:
    assert clips_of("0", 9) == [Stretch(start_s=0, end_s=9)]
    assert clips_of([1, 2, 8], 9) == [Stretch(start_s=1, end_s=2), Stretch(start_s=8, end_s=9)]
