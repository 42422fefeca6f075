"""Words through the whole house on real weights: equal to `whisper.transcribe`, token for token, at temperature 0."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import whisper

import whisperd
from bench.weights import base_folder
from bench.words import word_error_rate
from tests.support import Daemon, RawClient, requires_program, running_daemon, speak
from whisperd.model.loading import demo_folder, load

ASSETS = Path(whisperd.__file__).parent / "assets"
TEXT = (
    "The harbour was quiet in the morning. A small boat came in with the tide, and two men carried baskets of fish up "
    "to the market. Nobody spoke, because there was nothing to say. Later in the day the wind changed, and the boats "
    "that were still outside began to come home one after the other. The old man at the window counted them, as he did "
    "every evening, and when the last one was in he closed the shutters and lit his lamp. Then it was night. The sea "
    "went on with its work, and in the houses people slept until the first bell called them back to the water."
)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same real weights for the daemon and for openai-whisper."""
    folder: Path = demo_folder() if request.param == "tiny.en" else base_folder(tmp_path_factory.mktemp("base"))
    return str(folder)


@pytest.fixture(scope="module")
def daemon(model: str) -> Iterator[Daemon]:
    # One thread here and one below: two that wait for each other on busy cores take ten times as long.
    with running_daemon(model=model, ready=True, threads=1) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def upstream(model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """openai-whisper's own object of these weights."""
    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("cache")
    loaded = load(model, cache_dir=cache, device="cpu", dtype="auto", on_step=lambda: None, environ={})
    return loaded.whisper


@pytest.fixture
def client(daemon: Daemon) -> Iterator[RawClient]:
    with daemon.client() as client:
        yield client


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speak(TEXT, tmp_path_factory.mktemp("speech") / "harbour.wav", voice="rms")


def encode(source: Path, name: str, *arguments: str) -> Path:
    path = source.with_name(name)
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-i", source, *arguments, path], check=True)
    return path


def tokens(transcript: dict[str, Any]) -> list[list[int]]:
    return [segment["tokens"] for segment in transcript["segments"]]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "as it comes": ("tiny.en", {}),
    "language given, word times": ("tiny.en", {"language": "en", "word_timestamps": True}),
    "beams, no conditioning": ("tiny.en", {"beam_size": 3, "condition_on_previous_text": False}),
    "prompt and clips": ("tiny.en", {"initial_prompt": "A story of the sea.", "clip_timestamps": [3.0, 12.0]}),
    "language detected": ("base", {}),
    "translation": ("base", {"language": "de", "task": "translate", "clip_timestamps": [0.0, 8.0]}),
}


@requires_program("flite")
@requires_program("ffmpeg")
@pytest.mark.parametrize(("model", "options"), CASES.values(), ids=CASES.keys(), indirect=["model"])
def test_tokens_are_upstreams(client: RawClient, upstream: Any, speech: Path, options: dict[str, Any]) -> None:
    """The file is what users have (44.1 kHz stereo AAC in MP4), decoded here by us and there by openai-whisper."""
    path = encode(speech, "harbour.m4a", "-ar", "44100", "-ac", "2", "-c:a", "aac", "-b:a", "128k")
    options = {"temperature": 0.0} | options
    ours = client.result(client.submit(path, options=options)["id"])["transcript"]
    theirs = whisper.transcribe(upstream, whisper.load_audio(str(path)), fp16=False, verbose=None, **options)
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


@requires_program("flite")
@pytest.mark.parametrize("model", ["tiny.en"], indirect=True)
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


@pytest.mark.parametrize("model", ["tiny.en"], indirect=True)
def test_the_shipped_sample_is_heard_word_for_word(client: RawClient) -> None:
    job = client.submit(ASSETS / "sample.flac", priority="interactive")
    text = client.result(job["id"])["transcript"]["text"]
    assert word_error_rate((ASSETS / "sample.txt").read_text(), text) == 0
