"""The log-Mel spectrogram of a recording on disk, computed in blocks when it is asked for.

openai-whisper computes it of the whole file at once: 1.5 GB of samples, spectra and mel for three hours. Here a first
pass finds the one number that the whole file decides (its loudest bin, from which the floor is taken), and blocks
are computed again when their windows are asked for. Every value is bit for bit what
`whisper.audio.log_mel_spectrogram(samples, n_mels, padding=N_SAMPLES)` gives on the CPU.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from whisper.audio import HOP_LENGTH, N_FFT, N_FRAMES, N_SAMPLES, SAMPLE_RATE, mel_filters

from whisperd.model.worker import Turn, Worker

BLOCK_FRAMES = N_FRAMES
_HALF = N_FFT // 2  # a frame reaches so many samples to both sides of its middle
# Files of up to 15 minutes keep every block of the first pass (29 MB at 80 bins), longer ones the last two:
# a window that begins anywhere lies in two blocks, and the next window begins in the second of them.
KEEP_ALL_BLOCKS = 15 * 60 * SAMPLE_RATE // HOP_LENGTH // BLOCK_FRAMES
KEEP_LAST_BLOCKS = 2


class MelWindow:
    """Frames `start` to `stop` of a recording's mel, not computed yet. Stands where transcribe expects a tensor.

    It is computed only when the model wants it: a run that is resumed passes over what it has had already.
    """

    __slots__ = ("_length", "_mel", "_tensor", "start", "stop")

    def __init__(self, mel: FileMel, start: int, stop: int, length: int = 0) -> None:
        self._mel = mel
        self.start = start
        self.stop = stop
        self._length = length or stop - start
        self._tensor: torch.Tensor | None = None

    def padded(self, length: int) -> MelWindow:
        """Return what `pad_or_trim` makes of these frames (trimmed, or zeros behind)."""
        return MelWindow(self._mel, self.start, min(self.stop, self.start + length), length)

    def to(self, *where: object) -> MelWindow:
        """Stay as it is: where it is computed with, and in which type, is for the engine to say."""
        return self

    def tensor(self) -> torch.Tensor:
        """Return `(n_mels, length)` float32, computed once."""
        if self._tensor is None:
            self._tensor = self._mel.frames(self.start, self.stop, self._length)
        return self._tensor


class FileMel:
    """The mel of one PCM file (16 kHz mono s16le), with 30 s of silence behind it as `transcribe` adds them.

    `on_window` is told the first frame of each window that is asked for. All computing happens on `worker`; samples are
    for any thread.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_mels: int,
        worker: Worker,
        turn: Turn,
        on_window: Callable[[int, int], None],
        on_step: Callable[[], None],
    ) -> None:
        self._file = path.open("rb")  # held open: the folder may be swept once the run is given up
        self._worker = worker
        self._turn = turn
        self._on_window = on_window
        self._on_step = on_step
        self._n_mels = n_mels
        self.samples = os.fstat(self._file.fileno()).st_size // 2
        self.content_frames = self.samples // HOP_LENGTH
        self.shape = (n_mels, (self.samples + N_SAMPLES) // HOP_LENGTH)
        self._blocks: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._block_count = -(-self.shape[1] // BLOCK_FRAMES)
        self._keep = self._block_count if self._block_count <= KEEP_ALL_BLOCKS else KEEP_LAST_BLOCKS
        # One tensor for what is kept: a small one left between the large ones that come and go with every block
        # keeps the allocator from giving those back (measured with six files of 13 minutes: 1,560 instead of 890 MB).
        self._kept = torch.empty(self.shape) if self._keep == self._block_count else None
        self._floor: torch.Tensor | None = None
        self._scanning = threading.Lock()

    @property
    def duration_s(self) -> float:
        return float(self.samples / SAMPLE_RATE)

    def close(self) -> None:
        self._file.close()
        self._blocks.clear()
        self._kept = None

    def _scan(self) -> None:
        """First pass: find the loudest bin of the file, a block at a time (others get their turn in between)."""
        loudest = -math.inf
        for index in range(self._block_count):
            # A plain number: a tensor kept of each block would lie between the blocks' memory and hold all of it.
            value = self._worker.call(self._turn, lambda index=index: self._block(index).max().item())  # type: ignore[misc]
            loudest = max(loudest, value)
        self._floor = torch.tensor(loudest) - 8.0

    def __getitem__(self, key: tuple[slice, slice]) -> MelWindow:
        start, stop, _ = key[1].indices(self.shape[1])
        self._on_window(start, stop)
        return MelWindow(self, start, stop)

    def padded(self, length: int) -> MelWindow:
        """Return the first `length` frames (for language detection)."""
        return MelWindow(self, 0, length)

    def frames(self, start: int, stop: int, length: int) -> torch.Tensor:
        """Return frames `start` to `stop`, zeros behind them up to `length`: `(n_mels, length)` float32."""
        with self._scanning:
            if self._floor is None:
                self._scan()
        return self._worker.call(self._turn, lambda: self._frames(start, stop, length))

    def _frames(self, start: int, stop: int, length: int) -> torch.Tensor:
        assert self._floor is not None, "the first pass is over"
        window = torch.zeros(self._n_mels, length)
        for index in range(start // BLOCK_FRAMES, -(-stop // BLOCK_FRAMES)):
            first = index * BLOCK_FRAMES
            low, high = max(start, first), min(stop, first + BLOCK_FRAMES)
            part = self._block(index)[:, low - first : high - first]
            # The end of log_mel_spectrogram, in its own order of operations.
            window[:, low - start : high - start] = (torch.maximum(part, self._floor) + 4.0) / 4.0
        return window

    def _block(self, index: int) -> torch.Tensor:
        """Return the log10 mel of one block, before the floor: `(n_mels, at most BLOCK_FRAMES)`."""
        block = self._blocks.get(index)
        if block is None:
            self._on_step()
            width = min(BLOCK_FRAMES, self.shape[1] - index * BLOCK_FRAMES)
            block = _log10_mel(self._samples_around(index), self._n_mels)[:, :width]
            if self._kept is not None:
                first = index * BLOCK_FRAMES
                block = self._kept[:, first : first + width].copy_(block)
            self._blocks[index] = block
            while len(self._blocks) > self._keep:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(index)
        return block

    def _samples_around(self, index: int) -> NDArray[np.float32] | None:
        """Return a block's samples and `_HALF` more on both sides, or None where all of them are silence behind."""
        start = index * BLOCK_FRAMES * HOP_LENGTH - _HALF
        count = (BLOCK_FRAMES - 1) * HOP_LENGTH + N_FFT
        if start >= self.samples:
            return None
        block = np.zeros(count, np.float32)
        skip = max(0, -start)
        read = self.samples_at(start + skip, count - skip)
        block[skip : skip + len(read)] = read
        if skip:  # torch.stft's centre padding mirrors the beginning (the end mirrors the silence behind)
            block[:skip] = block[2 * skip : skip : -1]
        return block

    def samples_at(self, start: int, count: int) -> NDArray[np.float32]:
        """Return up to `count` samples from `start` on, -1 to 1, read on the thread that calls.

        Raises OSError when the file became shorter.
        """
        # Read and not mapped: a file that became shorter fails one run, where a mapping would end the process.
        count = min(count, self.samples - start)
        samples = np.frombuffer(os.pread(self._file.fileno(), 2 * count, 2 * start), dtype="<i2")
        if len(samples) < count:
            raise OSError(f"{self._file.name} became shorter while it was read")
        return samples.astype(np.float32) / 32768.0


def _log10_mel(samples: NDArray[np.float32] | None, n_mels: int) -> torch.Tensor:
    # Always a whole block: a narrow matrix product takes another path through the library and rounds otherwise.
    if samples is None:
        energies = torch.zeros(n_mels, BLOCK_FRAMES)
    else:
        window = torch.hann_window(N_FFT)
        spectrum = torch.stft(
            torch.from_numpy(samples), N_FFT, HOP_LENGTH, window=window, center=False, return_complex=True
        )
        energies = mel_filters(torch.device("cpu"), n_mels) @ (spectrum.abs() ** 2)
    return torch.clamp(energies, min=1e-10).log10()
