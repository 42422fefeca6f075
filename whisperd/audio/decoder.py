"""The decode helper: `<folder>/source`, any container and codec → `<folder>/audio.pcm`, 16 kHz mono s16le.

It streams: what it holds at a time does not grow with the recording.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import av
import av.logging

from whisperd.audio.limits import OverMemoryLimitError, limit_job, limit_process
from whisperd.audio.pcm import SAMPLE_BYTES, SAMPLE_RATE, Resampler
from whisperd.audio.recording import Recording, bad_audio
from whisperd.audio.spoolfile import SpoolFile
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import Decode, Decoded, NoRoom
from whisperd.protocol.helpers import start
from whisperd.protocol.spoolfolder import storage_errors, sync_folder
from whisperd.protocol.tasks import Task, serve

_WRITE_BYTES = 2**18


class NoRoomError(WhisperdError):
    """The disk has no room for what a recording decodes to: `needed_bytes`, or more."""

    def __init__(self, needed_bytes: int) -> None:
        super().__init__(ErrorCode.STORAGE_FULL, f"the disk has no room for {needed_bytes} bytes of samples: make room")
        self.needed_bytes = needed_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """What decoding one recording may take; `min_free_bytes` is what it must leave free on the disk."""

    max_audio_s: float
    max_cpu_s: float
    min_free_bytes: int

    @property
    def max_bytes(self) -> int:
        """How much PCM that is."""
        return int(self.max_audio_s * SAMPLE_RATE) * SAMPLE_BYTES


def main() -> None:
    """Run the helper until its daemon ends."""
    # FFmpeg speaks of every odd byte in every file; what matters comes back as an exception.
    av.logging.set_level(None)
    link = start("decoder")
    link.gauges = lambda: {"av": av.__version__, "ffmpeg": av.ffmpeg_version_info}
    settings = link.settings
    spool, memory_mb = Path(settings["spool"]), settings["decode_memory_mb"]
    caps = Caps(
        max_audio_s=settings["max_audio_s"],
        max_cpu_s=settings["decode_cpu_s"],
        min_free_bytes=settings["min_free_bytes"],
    )
    # Twice what the longest recording takes: the cap on its length speaks first, and more clearly.
    limit_process(max_file_bytes=2 * caps.max_bytes + 2**20)

    def perform(task: Task, order: Decode, descriptors: list[int]) -> Decoded | NoRoom:
        try:
            with limit_job(memory_mb=memory_mb, cpu_s=caps.max_cpu_s):
                audio_s, truncated = decode(spool / order.folder, caps, task.checkpoint)
        except NoRoomError as error:
            return NoRoom(run=order.run, generation=order.generation, needed_bytes=error.needed_bytes)
        except OverMemoryLimitError:
            raise bad_audio(
                f"decoding needs more than {memory_mb:g} MiB of memory (setting decode_memory_mb): "
                "convert the recording to another format, or raise the setting"
            ) from None
        return Decoded(run=order.run, generation=order.generation, audio_s=audio_s, truncated=truncated)

    serve(link, {Decode: perform})


def decode(folder: Path, caps: Caps, checkpoint: Callable[[float, float], None]) -> tuple[float, bool]:
    """Decode `source` to `audio.pcm`; return its length in seconds, and whether anything of the source is missing.

    `checkpoint(done_s, total_s)` is called between packets. Raises `WhisperdError`: `bad_audio`, `too_long`,
    `timed_out` (more than `max_cpu_s` of CPU time), `storage_full` (of a disk that has room for other recordings:
    `NoRoomError`), or what `checkpoint` raises; no output is left.
    """
    partial = folder / "audio.pcm.partial"
    try:
        with Recording(folder / "source") as recording, storage_errors(), SpoolFile(partial) as pcm, _its_room(pcm):
            truncated = _decode(recording, pcm, caps, checkpoint)
            # Made again from the source if it were lost, but nothing would notice: once a commit has recorded that the
            # run is decoded, a power cut must not leave it half a file.
            pcm.sync()
        with storage_errors():
            partial.rename(folder / "audio.pcm")
            sync_folder(folder)
    except BaseException:
        with suppress(OSError):  # whatever is wrong with the disk is told already; the next decoder writes it anew
            partial.unlink(missing_ok=True)
        raise
    return pcm.size_bytes / SAMPLE_BYTES / SAMPLE_RATE, truncated


@contextmanager
def _its_room(pcm: SpoolFile) -> Iterator[None]:
    """Tell a disk, or a quota, that became full with this recording's own samples from one that was full before."""
    try:
        with storage_errors():
            yield
    except WhisperdError as error:
        if error.code != ErrorCode.STORAGE_FULL or isinstance(error, NoRoomError) or pcm.size_bytes < _WRITE_BYTES:
            raise
        raise NoRoomError(pcm.size_bytes) from None


def _decode(recording: Recording, pcm: SpoolFile, caps: Caps, checkpoint: Callable[[float, float], None]) -> bool:
    """Stream the recording's samples into `pcm`; return whether any are missing."""
    deadline_cpu_s = time.process_time() + caps.max_cpu_s
    promised_bytes = min(int((recording.length_s or 0.0) * SAMPLE_RATE) * SAMPLE_BYTES, caps.max_bytes)
    resampler = Resampler()
    ready = bytearray()
    for frames in recording.frames():
        for frame in frames:
            for samples in resampler.convert(frame):
                ready += samples
        if len(ready) >= _WRITE_BYTES:
            _append(pcm, ready, caps, promised_bytes)
        if time.process_time() > deadline_cpu_s:
            raise WhisperdError(
                ErrorCode.TIMED_OUT,
                f"decoding took more than {caps.max_cpu_s:g} CPU seconds (setting decode_cpu_s): cut it into parts",
            )
        checkpoint(recording.position_s, recording.estimate_s)
    for samples in resampler.flush():
        ready += samples
    _append(pcm, ready, caps, promised_bytes)
    if not pcm.size_bytes:
        raise bad_audio("the file has an audio track, but no sound in it could be decoded: check that it plays")
    return recording.damaged or resampler.failed


def _append(pcm: SpoolFile, ready: bytearray, caps: Caps, promised_bytes: int) -> None:
    """Write what is ready and empty it.

    Raises `too_long` where the recording has grown past the cap, and `storage_full` before the disk is: a recording
    that says how long it is (`promised_bytes`) is told at once that it does not fit.
    """
    whole_bytes = pcm.size_bytes + len(ready)
    if whole_bytes > caps.max_bytes:
        raise WhisperdError(
            ErrorCode.TOO_LONG,
            f"the recording is longer than {caps.max_audio_s:g} s (setting max_audio_s): cut it into parts",
        )
    room_bytes = pcm.free_bytes() + pcm.size_bytes - caps.min_free_bytes  # what it has taken is its own
    if room_bytes < min(whole_bytes, _WRITE_BYTES):
        raise WhisperdError(
            ErrorCode.STORAGE_FULL,
            f"the disk of the spool has no more than the {caps.min_free_bytes} bytes free that decoding leaves "
            "(half of what submits leave, setting min_free_bytes): make room",
        )
    if room_bytes < max(whole_bytes, promised_bytes):
        raise NoRoomError(max(whole_bytes, promised_bytes))
    with memoryview(ready) as view:
        pcm.write(view)
    ready.clear()


if __name__ == "__main__":
    main()
