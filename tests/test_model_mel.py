"""The mel that is read from disk is bit for bit that of openai-whisper, wherever a window begins and ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from whisper.audio import N_FRAMES, N_SAMPLES, log_mel_spectrogram, pad_or_trim

from whisperd.model import mel as mel_module
from whisperd.model.mel import FileMel
from whisperd.model.worker import Turn, Worker
from whisperd.protocol.errors import WhisperdError

MINUTE = 60 * 16_000


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker("mel")


def write_pcm(path: Path, samples: int, *, silent: bool = False) -> np.ndarray:
    """Write noise that swells and fades; return it as openai-whisper would load it."""
    swell = np.sin(np.arange(samples) / 8000) + 1.1
    noise = np.random.default_rng(samples).standard_normal(samples)
    pcm = (0 * noise if silent else 3000 * noise * swell).astype("<i2")
    pcm.tofile(path)
    return pcm.astype(np.float32) / 32768


def open_mel(path: Path, worker: Worker, n_mels: int = 80, **options: Any) -> FileMel:
    on_window: Callable[[int, int], None] = options.pop("on_window", lambda start, stop: None)
    turn = options.pop("turn", Turn())
    return FileMel(path, n_mels=n_mels, worker=worker, turn=turn, on_window=on_window, on_step=lambda: None)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("samples", [0, 1, 159, 161, N_SAMPLES - 200, N_SAMPLES, N_SAMPLES + 200, 2 * MINUTE + 77])
def test_windows_are_upstreams_to_the_last_bit(
    tmp_path: Path, worker: Worker, samples: int, silent: bool, n_mels: int
) -> None:
    audio = write_pcm(tmp_path / "a.pcm", samples, silent=silent)
    upstream = log_mel_spectrogram(audio, n_mels, padding=N_SAMPLES)
    mel = open_mel(tmp_path / "a.pcm", worker, n_mels)
    assert mel.shape == tuple(upstream.shape)
    assert torch.equal(mel.padded(N_FRAMES).tensor(), pad_or_trim(upstream, N_FRAMES))
    for start in (0, 1, 1499, 2999, 3000, 3001, 11_999):
        for stop in (start + 1, start + 7, start + 2999, start + N_FRAMES):
            wanted = pad_or_trim(upstream[:, start:stop], N_FRAMES)
            assert torch.equal(mel[:, start:stop].padded(N_FRAMES).tensor(), wanted), (start, stop)


def test_a_long_file_keeps_two_blocks_and_gives_the_same(tmp_path: Path, worker: Worker) -> None:
    audio = write_pcm(tmp_path / "a.pcm", 16 * MINUTE)
    upstream = log_mel_spectrogram(audio, 80, padding=N_SAMPLES)
    mel = open_mel(tmp_path / "a.pcm", worker)
    for start in (0, 2800, 5600, 80_000, 100):
        assert torch.equal(
            mel[:, start : start + N_FRAMES].padded(N_FRAMES).tensor(), upstream[:, start : start + N_FRAMES]
        )
    assert len(mel._blocks) == mel_module.KEEP_LAST_BLOCKS


def test_a_window_is_told_and_computed_only_when_it_is_used(tmp_path: Path, worker: Worker) -> None:
    write_pcm(tmp_path / "a.pcm", MINUTE)
    told: list[tuple[int, int]] = []
    mel = open_mel(tmp_path / "a.pcm", worker, on_window=lambda start, stop: told.append((start, stop)))
    assert mel[:, 100:3100].stop == 3100
    assert told == [(100, 3100)]


def test_a_cancelled_run_computes_no_more(tmp_path: Path, worker: Worker) -> None:
    write_pcm(tmp_path / "a.pcm", MINUTE)
    turn = Turn()
    mel = open_mel(tmp_path / "a.pcm", worker, turn=turn)
    turn.cancelled = True
    with pytest.raises(WhisperdError) as raised:
        mel.frames(0, N_FRAMES, N_FRAMES)
    assert raised.value.code == "cancelled"


def test_samples_are_for_several_threads_at_once(tmp_path: Path, worker: Worker) -> None:
    audio = write_pcm(tmp_path / "a.pcm", MINUTE)
    mel = open_mel(tmp_path / "a.pcm", worker)
    wrong: list[int] = []

    def read(start: int) -> None:
        for _ in range(500):
            if not np.array_equal(mel.samples_at(start, 1600), audio[start : start + 1600]):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(start,)) for start in (0, 5 * 16_000, MINUTE - 1600)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_a_file_that_became_shorter_is_an_error_and_not_silence(tmp_path: Path, worker: Worker) -> None:
    write_pcm(tmp_path / "a.pcm", MINUTE)
    mel = open_mel(tmp_path / "a.pcm", worker)
    with (tmp_path / "a.pcm").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(OSError, match="became shorter"):
        mel.frames(0, N_FRAMES, N_FRAMES)
