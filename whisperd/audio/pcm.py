"""Any decoded audio → 16 kHz mono s16le, with the arithmetic of `ffmpeg -ac 1 -ar 16000 -acodec pcm_s16le`.

That is the command openai-whisper runs, and libswresample does the work in both. What differs comes from the decoders,
which change between versions of FFmpeg. Against 5.1, compared sample for sample: PCM, FLAC and MP3 of 32 kHz and more
not at all; AAC, Opus and Vorbis by at most 1 in the last place; MP3 of 24 kHz and less in some of its frames (6 % of
those of one recording).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import av
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler

SAMPLE_RATE = 16000
SAMPLE_BYTES = 2


class Resampler:
    """Converts frames one after the other; a track may change its rate, channels or format on the way.

    `failed` becomes true when a frame could not be converted (and was left out).
    """

    def __init__(self) -> None:
        self.failed = False
        self._shape: tuple[str, str, int] | None = None
        self._resampler: AudioResampler | None = None

    def convert(self, frame: AudioFrame) -> Iterator[memoryview]:
        """Yield the samples that `frame` makes ready."""
        shape = (frame.format.name, frame.layout.name, frame.sample_rate)
        if shape != self._shape:
            yield from self.flush()
            self._shape, self._resampler = shape, _resampler_for(frame)
        yield from self._push(frame)

    def flush(self) -> Iterator[memoryview]:
        """Yield what the filter still holds, at the end of the track."""
        if self._resampler is not None:
            yield from self._push(None)
            self._resampler = None

    def _push(self, frame: AudioFrame | None) -> Iterable[memoryview]:
        assert self._resampler is not None
        try:
            return [memoryview(out.planes[0])[: out.samples * SAMPLE_BYTES] for out in self._resampler.resample(frame)]
        except MemoryError:
            raise
        except (av.FFmpegError, ValueError):  # a layout that cannot be mixed down, a rate of 0
            self.failed = True
            return []


def _resampler_for(frame: AudioFrame) -> AudioResampler:
    # FFmpeg up to 5 resamples 16-bit audio as 16-bit, later ones through floats: 2 in the last place apart. The first
    # is said here, so that a WAV or a FLAC gives the same samples under every version.
    narrow = frame.format.bytes <= SAMPLE_BYTES
    options = {"internal_sample_fmt": "s16p"} if narrow else {}
    return AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE, options=options)
