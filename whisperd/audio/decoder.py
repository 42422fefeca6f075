"""The decode helper: `<folder>/source`, any container and codec → `<folder>/audio.pcm`, 16 kHz mono s16le.

It streams: what it holds at a time does not grow with the recording.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import av
import av.logging

from whisperd.audio.limits import OverMemoryLimitError, limit_job, limit_process
from whisperd.audio.pcm import SAMPLE_BYTES, SAMPLE_RATE, Resampler
from whisperd.audio.recording import Recording, bad_audio
from whisperd.audio.spoolfile import SpoolFile
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import Decode, Decoded
from whisperd.protocol.helpers import start
from whisperd.protocol.spoolfolder import storage_errors, sync_folder
from whisperd.protocol.tasks import Task, serve

_WRITE_BYTES = 2**18


def main() -> None:
    """Run the helper until its daemon ends."""
    # FFmpeg speaks of every odd byte in every file; what matters comes back as an exception.
    av.logging.set_level(None)
    link = start("decoder")
    link.gauges = lambda: {"av": av.__version__, "ffmpeg": av.ffmpeg_version_info}
    settings = link.settings
    spool, max_audio_s = Path(settings["spool"]), settings["max_audio_s"]
    memory_mb, cpu_s = settings["decode_memory_mb"], settings["decode_cpu_s"]
    # Twice what the longest recording takes: the cap on its length speaks first, and more clearly.
    limit_process(max_file_bytes=2 * int(max_audio_s * SAMPLE_RATE) * SAMPLE_BYTES + 2**20)

    def perform(task: Task, order: Decode, descriptors: list[int]) -> Decoded:
        try:
            with limit_job(memory_mb=memory_mb, cpu_s=cpu_s):
                audio_s, truncated = decode(
                    spool / order.folder, max_audio_s=max_audio_s, max_cpu_s=cpu_s, checkpoint=task.checkpoint
                )
        except OverMemoryLimitError:
            raise bad_audio(
                f"decoding needs more than {memory_mb:g} MiB of memory (setting decode_memory_mb): "
                "convert the recording to another format, or raise the setting"
            ) from None
        return Decoded(run=order.run, generation=order.generation, audio_s=audio_s, truncated=truncated)

    serve(link, {Decode: perform})


def decode(
    folder: Path, *, max_audio_s: float, max_cpu_s: float, checkpoint: Callable[[float, float], None]
) -> tuple[float, bool]:
    """Decode `source` to `audio.pcm`; return its length in seconds, and whether anything of the source is missing.

    `checkpoint(done_s, total_s)` is called between packets. Raises `WhisperdError`: `bad_audio`, `too_long`,
    `timed_out` (more than `max_cpu_s` of CPU time), `storage_full`, or what `checkpoint` raises; no output is left.
    """
    partial = folder / "audio.pcm.partial"
    try:
        with Recording(folder / "source") as recording, storage_errors(), SpoolFile(partial) as pcm:
            truncated = _decode(recording, pcm, max_audio_s, max_cpu_s, checkpoint)
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


def _decode(
    recording: Recording,
    pcm: SpoolFile,
    max_audio_s: float,
    max_cpu_s: float,
    checkpoint: Callable[[float, float], None],
) -> bool:
    """Stream the recording's samples into `pcm`; return whether any are missing."""
    deadline_cpu_s = time.process_time() + max_cpu_s
    max_bytes = int(max_audio_s * SAMPLE_RATE) * SAMPLE_BYTES
    resampler = Resampler()
    ready = bytearray()
    for frames in recording.frames():
        for frame in frames:
            for samples in resampler.convert(frame):
                ready += samples
        if len(ready) >= _WRITE_BYTES:
            _append(pcm, ready, max_bytes)
        if time.process_time() > deadline_cpu_s:
            raise WhisperdError(
                ErrorCode.TIMED_OUT,
                f"decoding took more than {max_cpu_s:g} CPU seconds (setting decode_cpu_s): cut it into parts",
            )
        checkpoint(recording.position_s, recording.estimate_s)
    for samples in resampler.flush():
        ready += samples
    _append(pcm, ready, max_bytes)
    if not pcm.size_bytes:
        raise bad_audio("the file has an audio track, but no sound in it could be decoded: check that it plays")
    return recording.damaged or resampler.failed


def _append(pcm: SpoolFile, ready: bytearray, max_bytes: int) -> None:
    """Write what is ready and empty it. Raises `too_long` where the recording has grown past the cap."""
    if pcm.size_bytes + len(ready) > max_bytes:
        raise WhisperdError(
            ErrorCode.TOO_LONG,
            f"the recording is longer than {max_bytes / SAMPLE_BYTES / SAMPLE_RATE:g} s (setting max_audio_s): "
            "cut it into parts",
        )
    with memoryview(ready) as view:
        pcm.write(view)
    ready.clear()


if __name__ == "__main__":
    main()
