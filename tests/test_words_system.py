"""Words through the whole house on real weights: equal to `whisper.transcribe`, token for token, at temperature 0."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import whisper

import whisperd
from bench.weights import base_folder
from bench.words import word_error_rate
from tests.support import Daemon, RawClient, requires_program, running_daemon, speak, speak_apart
from whisperd.model.loading import demo_folder, load

ASSETS = Path(whisperd.__file__).parent / "assets"
TEXT = (
    "The harbour was quiet in the morning. A small boat came in with the tide, and two men carried baskets of fish up "
    "to the market. Nobody spoke, because there was nothing to say. Later in the day the wind changed, and the boats "
    "that were still outside began to come home one after the other. The old man at the window counted them, as he did "
    "every evening, and when the last one was in he closed the shutters and lit his lamp. Then it was night. The sea "
    "went on with its work, and in the houses people slept until the first bell called them back to the water."
)
# Longer than a window too, with fewer words: what is about other things takes half the time.
FEW = (
    "The harbour was quiet in the morning. Nobody spoke, because there was nothing to say. Then it was night. "
    "A small boat came in with the tide"
)


# Fixtures that are functions of the model: as parameters of the module they would be made anew for every test.


@pytest.fixture(scope="module")
def weights_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Real weights, the same for the daemon and for openai-whisper."""
    return cache(
        lambda model: str(demo_folder() if model == "tiny.en" else base_folder(tmp_path_factory.mktemp(model)))
    )


@pytest.fixture(scope="module")
def daemon_of(weights_of: Callable[[str], str]) -> Iterator[Callable[[str], Daemon]]:
    with ExitStack() as stack:

        def start(model: str) -> Daemon:
            # One thread here and one below: two that wait for each other on busy cores take ten times as long.
            return stack.enter_context(running_daemon(model=weights_of(model), ready=True, threads=1))

        yield cache(start)


@pytest.fixture(scope="module")
def upstream_of(weights_of: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """openai-whisper's own objects of these weights."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cache")

    def loaded(model: str) -> Any:
        return load(
            weights_of(model), cache_dir=folder, device="cpu", dtype="auto", on_step=lambda: None, environ={}
        ).whisper

    return cache(loaded)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """What users have: 44.1 kHz stereo AAC in MP4."""
    folder = tmp_path_factory.mktemp("speech")
    spoken = {
        "harbour": speak(TEXT, folder / "harbour.wav", voice="rms"),
        "few words": speak_apart(FEW, folder / "few.wav", every_s=10),
    }
    aac = ("-ar", "44100", "-ac", "2", "-c:a", "aac", "-b:a", "128k")
    for wav in spoken.values():
        subprocess.run(["ffmpeg", "-v", "error", "-i", wav, *aac, wav.with_suffix(".m4a")], check=True)
    return {name: wav.with_suffix(".m4a") for name, wav in spoken.items()}


def tokens(transcript: dict[str, Any]) -> list[list[int]]:
    return [segment["tokens"] for segment in transcript["segments"]]


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "as it comes": ("tiny.en", "harbour", {}),
    "language given, word times": ("tiny.en", "few words", {"language": "en", "word_timestamps": True}),
    "beams": ("tiny.en", "few words", {"beam_size": 3, "clip_timestamps": [0.0, 14.0]}),
    "prompt and clips": (
        "tiny.en", "harbour", {"initial_prompt": "A story of the sea.", "clip_timestamps": [3.0, 12.0]},
    ),
    "translation": ("base", "harbour", {"language": "de", "task": "translate", "clip_timestamps": [0.0, 8.0]}),
}  # fmt: skip


@requires_program("flite")
@requires_program("ffmpeg")
@pytest.mark.parametrize(("model", "recording", "options"), CASES.values(), ids=CASES.keys())
def test_tokens_are_upstreams(
    daemon_of: Callable[[str], Daemon],
    upstream_of: Callable[[str], Any],
    recordings: Mapping[str, Path],
    model: str,
    recording: str,
    options: dict[str, Any],
) -> None:
    options = {"temperature": 0.0} | options
    with daemon_of(model).client() as client:
        ours = client.result(client.submit(recordings[recording], options=options)["id"])["transcript"]
    check_upstreams(ours, upstream_of(model), recordings[recording], options)


@requires_program("flite")
@requires_program("ffmpeg")
def test_base_detects_the_language_and_goes_on_where_its_process_was_killed(
    daemon_of: Callable[[str], Daemon], upstream_of: Callable[[str], Any], recordings: Mapping[str, Path]
) -> None:
    daemon, options = daemon_of("base"), {"temperature": 0.0}
    with daemon.client() as client:
        job = client.submit(recordings["few words"], options=options)["id"]
        client.send("subscribe", job=job)
        first = client.receive_until(lambda message: message.get("event") == "segment", 240)
        (process,) = daemon.helpers("whisperd.model.main")
        process.kill()
        client.receive_until(lambda message: message.get("state") == "queued" and message["seq"] > first["seq"])
        ours = client.result(job)["transcript"]
    check_upstreams(ours, upstream_of("base"), recordings["few words"], options)


def check_upstreams(ours: dict[str, Any], model: Any, path: Path, options: dict[str, Any]) -> None:
    """A transcript is openai-whisper's. The file was decoded there by us and is here by openai-whisper."""
    theirs = whisper.transcribe(model, whisper.load_audio(str(path)), fp16=False, verbose=None, **options)
    assert tokens(ours) == tokens(theirs)
    assert ours["text"] == theirs["text"]
    assert ours["language"] == theirs["language"]
    for mine, other in zip(ours["segments"], theirs["segments"], strict=True):
        assert (mine["start"], mine["end"]) == pytest.approx((other["start"], other["end"]), abs=1e-6)
        assert mine["avg_logprob"] == pytest.approx(other["avg_logprob"], abs=1e-4)
        assert mine["no_speech_prob"] == pytest.approx(other["no_speech_prob"], abs=1e-4)
        if options.get("word_timestamps"):
            assert [word["word"] for word in mine["words"]] == [word["word"] for word in other["words"]]
            assert [word["start"] for word in mine["words"]] == pytest.approx(
                [word["start"] for word in other["words"]], abs=1e-6
            )


@pytest.fixture
def client(daemon_of: Callable[[str], Daemon]) -> Iterator[RawClient]:
    with daemon_of("tiny.en").client() as client:
        yield client


@requires_program("flite")
def test_the_words_are_the_spoken_ones_and_runs_beside_each_other_are_not_mixed_up(
    client: RawClient, tmp_path: Path
) -> None:
    sentences = [sentence for sentence in TEXT.split(". ") if len(sentence) > 40]
    options = {"language": "en", "temperature": 0.0}
    jobs = {
        sentence: client.submit(speak(sentence, tmp_path / f"{n}.wav"), options=options)["id"]
        for n, sentence in enumerate(sentences)
    }
    for sentence, job in jobs.items():
        assert word_error_rate(sentence, client.result(job)["transcript"]["text"]) < 0.25


def test_the_shipped_sample_is_heard_word_for_word(client: RawClient) -> None:
    job = client.submit(ASSETS / "sample.flac", priority="interactive")
    text = client.result(job["id"])["transcript"]["text"]
    assert word_error_rate((ASSETS / "sample.txt").read_text(), text) == 0
