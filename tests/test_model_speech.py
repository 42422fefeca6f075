"""Where somebody speaks is what silero-vad says; what a transcript covers of it is arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.support import requires_program, speak
from whisperd.model.coverage import Coverage, coverage_of, joined, length_s, without
from whisperd.model.fast import windows_of
from whisperd.model.speech import CHUNK, SpeechDetector, SpeechTrack, Stretch, speech_in
from whisperd.model.worker import Turn, Worker

RATE = 16_000


@pytest.fixture(scope="module")
def detector() -> SpeechDetector:
    return SpeechDetector()


def heard(detector: SpeechDetector, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    return listen(detector, samples).probabilities()


def listen(detector: SpeechDetector, samples: NDArray[np.float32]) -> SpeechTrack:
    return SpeechTrack(
        detector,
        len(samples),
        lambda start, count: samples[start : start + count],
        worker=Worker("mel"),
        turn=Turn(),
        on_step=lambda: None,
    )


def stretches(*bounds: float) -> list[Stretch]:
    return [Stretch(start_s=start, end_s=end) for start, end in zip(bounds[::2], bounds[1::2], strict=True)]


@requires_program("flite")
def test_it_hears_what_the_package_hears(tmp_path: Path, detector: SpeechDetector) -> None:
    words = speak("Every morning the old man walked down to the river.", tmp_path / "a.wav").read_bytes()[44:]
    spoken = np.frombuffer(words, "<i2").astype(np.float32) / 32768
    noise = np.random.default_rng(1).standard_normal(31 * RATE + 77).astype(np.float32) * 0.01
    samples = np.concatenate([spoken, noise, spoken])  # more than a block, and no whole number of chunks
    threads = torch.get_num_threads()
    try:
        from silero_vad import get_speech_timestamps, load_silero_vad

        package = load_silero_vad()
    finally:
        torch.set_num_threads(threads)
    padded = np.pad(samples, (0, -len(samples) % CHUNK))
    with torch.no_grad():
        wanted = [package(chunk, RATE).item() for chunk in torch.from_numpy(padded).view(-1, CHUNK)]
    found = heard(detector, samples)
    assert np.abs(found - np.array(wanted)).max() < 1e-3
    timestamps = get_speech_timestamps(torch.from_numpy(samples), package)
    speech = speech_in(found, len(samples))
    assert speech == [Stretch(start_s=one["start"] / RATE, end_s=one["end"] / RATE) for one in timestamps]
    track, spoken_s = listen(detector, samples), len(spoken) / RATE
    answers = [track.speaks_between(0, spoken_s), track.speaks_between(spoken_s + 2, spoken_s + 30)]
    assert answers == [True, False]
    assert len(listen(detector, samples).probabilities(1)) < len(found), "no more is computed than was asked for"
    assert track.speaks_between(spoken_s + 30, 1e6)
    assert not track.speaks_between(1e6, 1e6)
    assert np.array_equal(track.probabilities(), found)


def test_looking_for_speech_leaves_the_process_its_threads(detector: SpeechDetector) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        speech_in(np.zeros(4, np.float32), 4 * CHUNK)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_looking_for_speech_in_hours_can_be_given_up() -> None:
    chunks, looks = 40_000, 0
    probabilities = np.random.default_rng(2).random(chunks).astype(np.float32)
    whole = speech_in(probabilities, chunks * CHUNK)
    assert len(whole) > 100

    def check() -> None:
        nonlocal looks
        looks += 1
        if looks == most:
            raise TimeoutError

    most = 20
    with pytest.raises(TimeoutError):
        speech_in(probabilities, chunks * CHUNK, check=check)
    most = 0
    assert speech_in(probabilities, chunks * CHUNK, check=check) == whole
    from silero_vad.utils_vad import get_speech_timestamps_from_probs  # not first: it changes the process's threads

    package = get_speech_timestamps_from_probs(probabilities.tolist(), audio_length_samples=chunks * CHUNK)
    assert whole == [Stretch(start_s=one["start"] / RATE, end_s=one["end"] / RATE) for one in package]


@pytest.mark.parametrize("samples", [0, 1, CHUNK])
def test_hardly_any_audio_holds_no_speech(detector: SpeechDetector, samples: int) -> None:
    assert speech_in(heard(detector, np.zeros(samples, np.float32)), samples) == []


class Unsliced(list[Stretch]):
    """Refuses to be copied in part: for each of thousands of stretches that takes as long as there are others."""

    def __getitem__(self, place: Any) -> Any:
        assert isinstance(place, int)
        return super().__getitem__(place)


def test_each_stretch_is_compared_with_its_neighbours_alone() -> None:
    all_of_it, texts = Unsliced(stretches(*range(100))), Unsliced(stretches(*(n + 0.5 for n in range(100))))
    assert without(all_of_it, texts) == stretches(*(n / 2 for n in range(199) if n % 4 < 2))


def test_what_is_covered_and_what_is_not() -> None:
    speech = stretches(1, 4, 4.2, 6, 10, 12, 20, 20.5)
    coverage = coverage_of(speech, stretches(0, 5), asked_for=stretches(0, 30))
    assert coverage == Coverage(
        speech_s=pytest.approx(7.3), transcribed_s=pytest.approx(3.8), gaps=stretches(5, 6, 10, 12)
    )
    assert coverage.to_wire() == {"speech_s": 7.3, "transcribed_s": 3.8, "gaps": [[5, 6], [10, 12]]}
    # What was not asked for is not missing.
    assert coverage_of(speech, [], asked_for=stretches(9, 11)).to_wire() == {
        "speech_s": 1,
        "transcribed_s": 0,
        "gaps": [[10, 11]],
    }


bounds = st.lists(st.integers(0, 60), max_size=12).map(sorted)
some_stretches = bounds.map(lambda times: joined(stretches(*map(float, times[: len(times) // 2 * 2]))))


def seconds(parts: Sequence[Stretch]) -> set[int]:
    return {second for part in parts for second in range(int(part.start_s), int(part.end_s))}


@given(some_stretches, some_stretches)
def test_what_is_left_is_the_difference_of_sets(left: list[Stretch], right: list[Stretch]) -> None:
    assert seconds(without(left, right)) == seconds(left) - seconds(right)
    assert length_s(without(left, right)) == len(seconds(left) - seconds(right))


@given(some_stretches, some_stretches)
def test_windows_hold_all_speech_that_was_asked_for_and_fit(speech: list[Stretch], asked_for: list[Stretch]) -> None:
    speech = [
        Stretch(start_s=one.start_s + at, end_s=min(one.start_s + at + 29, one.end_s))
        for one in speech
        for at in range(0, int(one.end_s - one.start_s) or 1, 29)
    ]
    windows = windows_of(speech, asked_for)
    assert seconds(windows) >= seconds(speech) & seconds(asked_for)
    assert all(0 <= one.end_s - one.start_s <= 30 for one in windows)
    assert all(one.end_s <= following.start_s for one, following in pairwise(windows))
