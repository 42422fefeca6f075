"""The globals of openai-whisper that this process replaces, all of them, and why.

`whisper.transcribe` stays as it is; it is given a `ProxyModel` for its model and a `FileMel` for its audio. Five
names that it looks up are replaced, for this process only. Each replacement finds its run through its arguments or
through the loop that calls it, and does what upstream does when it is not called for a run of ours.

- `transcribe.log_mel_spectrogram` computes the mel of the whole file; here it returns `FileMel`, which reads as sliced.
- `transcribe.pad_or_trim` takes tensors; here a window stays a promise until the model wants it.
- `transcribe.tqdm` draws a bar; here it sends live segments and progress, seeing the loop's own list grow.
- `timing.find_alignment` puts hooks on the model's blocks and encodes the window again; here the same function gets a
  stand-in, and what the engine read with the features it has kept (`batch/upstream.py`).
- `timing.median_filter` sorts every seven neighbours, two thirds of the time of word alignment; here the same numbers
  are found in an eighth of that (`batch/median.py`), whoever asks.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from typing import Any

import torch
from whisper import audio, timing

from whisperd.model.batch.median import WIDTH, median_of_seven
from whisperd.model.mel import FileMel, MelWindow
from whisperd.model.proxy import ProxyModel

# `whisper.transcribe` as an attribute is the function; its module is only found by name.
_transcribe = importlib.import_module("whisper.transcribe")
_upstream_progress = _transcribe.tqdm.tqdm
_upstream_find_alignment = timing.find_alignment
_upstream_median_filter = timing.median_filter


def install() -> None:
    """Replace the five names, once for the process."""
    _transcribe.log_mel_spectrogram = _log_mel_spectrogram  # type: ignore[attr-defined]
    _transcribe.pad_or_trim = _pad_or_trim  # type: ignore[attr-defined]
    _transcribe.tqdm = types.SimpleNamespace(tqdm=_progress)  # type: ignore[attr-defined]
    timing.find_alignment = _find_alignment
    timing.median_filter = _median_filter
    # The proxy says that its device is the CPU; that is not the device that computes.
    warnings.filterwarnings("ignore", message="Performing inference on CPU when CUDA is available")
    warnings.filterwarnings("ignore", message="Word-level timestamps on translations")


def _log_mel_spectrogram(samples: Any, *args: Any, **options: Any) -> Any:
    return samples if isinstance(samples, FileMel) else audio.log_mel_spectrogram(samples, *args, **options)


def _pad_or_trim(array: Any, length: int = audio.N_SAMPLES, *, axis: int = -1) -> torch.Tensor | MelWindow:
    if isinstance(array, FileMel | MelWindow):
        return array.padded(length)
    result: torch.Tensor = audio.pad_or_trim(array, length, axis=axis)
    return result


def _find_alignment(model: Any, *args: Any, **options: Any) -> Any:
    if isinstance(model, ProxyModel):
        return model.align(*args, **options)
    return _upstream_find_alignment(model, *args, **options)


def _median_filter(x: torch.Tensor, filter_width: int) -> torch.Tensor:
    if x.is_cuda or x.ndim != 3 or filter_width != WIDTH or x.shape[-1] < WIDTH or bool(x.isnan().any()):
        result: torch.Tensor = _upstream_median_filter(x, filter_width)
        return result
    return median_of_seven(x)


def _progress(*args: Any, **options: Any) -> Any:
    caller = sys._getframe(1).f_locals
    if isinstance(caller.get("model"), ProxyModel):
        return LiveSegments(caller["model"], caller["all_segments"])
    return _upstream_progress(*args, **options)


class LiveSegments:
    """Stands where transcribe holds its progress bar; sees its list of segments grow.

    Segments are in the list only after word timing and hallucination rules are done with them: they are final.
    """

    def __init__(self, model: ProxyModel, segments: list[dict[str, Any]]) -> None:
        self._listener = model.listener
        self._segments = segments
        self._sent = 0

    def __enter__(self) -> LiveSegments:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, frames: int) -> None:
        """Hear from the loop that a window has ended, `frames` after its beginning."""
        new = self._segments[self._sent :]
        self._sent += len(new)
        if new:
            self._listener.on_segments(new)
        self._listener.on_frames(frames)
