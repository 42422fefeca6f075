"""Where in a recording somebody speaks: silero-vad's weights and rules, run a block of 30 s at a time.

The package runs its network chunk by chunk (0.29 ms for 32 ms of audio on one core, measured), because it is made for
live audio. Here the recording lies on disk, so all chunks of a block go through the convolutions together and only
the LSTM walks from one to the next: the same numbers (a test compares), 13 times less work.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from whisper.audio import SAMPLE_RATE

from whisperd.model.worker import Turn, Worker

CHUNK = 512  # samples that one probability is about: 32 ms
_CONTEXT = 64  # samples of the chunk before that the network sees too
_BLOCK_CHUNKS = 960  # about 30 s
THRESHOLD = 0.5  # the probability from which the package takes a chunk for speech
_BINS = 129
_STRIDES = (1, 2, 2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """From `start_s` to `end_s` of the recording, in seconds."""

    start_s: float
    end_s: float


class SpeechDetector:
    """silero-vad's network for 16 kHz, on the CPU. Loaded once, for any number of `SpeechTrack`s."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("silero_vad")
        assert spec is not None, "silero-vad comes with whisperd[server]"
        assert spec.submodule_search_locations
        path = Path(spec.submodule_search_locations[0], "data", "silero_vad.jit")
        self._weights = {
            name.removeprefix("_model."): value
            for name, value in torch.jit.load(path, map_location="cpu").state_dict().items()  # type: ignore[no-untyped-call]
            if name.startswith("_model.")
        }
        self._lstm = torch.nn.LSTM(128, 128)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        self._lstm.load_state_dict({f"{name}_l0": self._weights[f"decoder.rnn.{name}"] for name in names})

    @torch.no_grad()
    def block(
        self, samples: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[NDArray[np.float32], tuple[torch.Tensor, torch.Tensor]]:
        """Return the probabilities of the chunks in `samples`, which begin with the context, and the LSTM's state."""
        weights = self._weights
        x = F.pad(samples.unfold(0, _CONTEXT + CHUNK, CHUNK)[:, None], (0, _CONTEXT), "reflect")
        x = F.conv1d(x, weights["stft.forward_basis_buffer"], stride=128)
        x = (x[:, :_BINS] ** 2 + x[:, _BINS:] ** 2).sqrt()
        for number, stride in enumerate(_STRIDES):
            place = f"encoder.{number}.reparam_conv"
            x = F.conv1d(x, weights[f"{place}.weight"], weights[f"{place}.bias"], stride=stride, padding=1).relu()
        x, state = self._lstm(x.squeeze(-1), state)
        x = x.relu() @ weights["decoder.decoder.2.weight"][0, :, 0] + weights["decoder.decoder.2.bias"]
        return x.sigmoid().numpy(), state


class SpeechTrack:
    """The probability of speech in each chunk of one recording of `samples` samples at 16 kHz, as far as was asked for.

    `read(start, count)` gives samples in -1 to 1. All computing is done on `worker`, a block a piece. What was said
    about a stretch does not change with what comes after it.
    """

    def __init__(
        self,
        detector: SpeechDetector,
        samples: int,
        read: Callable[[int, int], NDArray[np.float32]],
        *,
        worker: Worker,
        turn: Turn,
        on_step: Callable[[], None],
    ) -> None:
        self._detector = detector
        self._samples = samples
        self._read = read
        self._worker = worker
        self._turn = turn
        self._on_step = on_step
        self._done = 0  # samples
        self._context = np.zeros(_CONTEXT, np.float32)
        self._state: tuple[torch.Tensor, torch.Tensor] | None = None
        self._found: list[NDArray[np.float32]] = []

    def probabilities(self, until: int | None = None) -> NDArray[np.float32]:
        """Return the chunks' probabilities up to sample `until` at least, or of the whole recording."""
        stop = self._samples if until is None else min(until, self._samples)
        while self._done < stop:
            self._worker.call(self._turn, self._next_block)
        if len(self._found) > 1:
            self._found = [np.concatenate(self._found)]
        return self._found[0] if self._found else np.zeros(0, np.float32)

    def speaks_between(self, start_s: float, end_s: float) -> bool:
        """Return whether any chunk between these times, or around them, is more likely speech than not."""
        first, last = (int(time_s * SAMPLE_RATE) // CHUNK for time_s in (start_s, end_s))
        chunks = self.probabilities((last + 1) * CHUNK)[first : last + 1]
        return bool(len(chunks)) and bool(chunks.max() >= THRESHOLD)

    def _next_block(self) -> None:
        self._on_step()
        block = self._read(self._done, min(_BLOCK_CHUNKS * CHUNK, self._samples - self._done))
        self._done += len(block)
        block = np.concatenate([self._context, block, np.zeros(-len(block) % CHUNK, np.float32)])
        self._context = block[-_CONTEXT:].copy()
        probabilities, self._state = self._detector.block(torch.from_numpy(block), self._state)
        self._found.append(probabilities)


def speech_in(
    probabilities: NDArray[np.float32],
    samples: int,
    *,
    min_silence_ms: int = 100,
    pad_ms: int = 30,
    max_speech_s: float = float("inf"),
    check: Callable[[], None] = lambda: None,
) -> list[Stretch]:
    """Return the stretches of speech that silero-vad's own rule finds in the chunks' probabilities, in order.

    A stretch ends at `min_silence_ms` of silence and is widened by `pad_ms` on both sides; one that is longer than
    `max_speech_s` is cut at a silence in it. `check` is called for each 30 s, and ends the work with what it raises:
    ten hours take half a second.
    """

    def blocks() -> Iterator[list[float]]:
        for start in range(0, len(probabilities), _BLOCK_CHUNKS):
            check()
            yield probabilities[start : start + _BLOCK_CHUNKS].tolist()

    threads = torch.get_num_threads()
    try:
        from silero_vad.utils_vad import get_speech_timestamps_from_probs
    finally:
        torch.set_num_threads(threads)  # importing the package sets it to one, for the whole process
    found = get_speech_timestamps_from_probs(
        itertools.chain.from_iterable(blocks()),
        sampling_rate=SAMPLE_RATE,
        audio_length_samples=samples,
        min_silence_duration_ms=min_silence_ms,
        speech_pad_ms=pad_ms,
        threshold=THRESHOLD,
        max_speech_duration_s=max_speech_s,
    )
    return [Stretch(start_s=one["start"] / SAMPLE_RATE, end_s=one["end"] / SAMPLE_RATE) for one in found]
