"""A recording opened with FFmpeg: nothing but this one file is read, and damage is counted instead of raised."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av

# PyAV loads these when a file first needs them; under the limit on memory a library can no longer be mapped.
import av.subtitles.stream
import av.video.stream
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition

from whisperd.audio.completeness import has_length_header, is_cut_short, looks_like_text
from whisperd.protocol.errors import ErrorCode, WhisperdError

# Formats that name other files or addresses, or that are devices or scripts: a `talk.mp3` that is a list in truth must
# not read its neighbours. The protocol whitelist below already stops it; this is the second lock.
_FORMATS_THAT_REFER = frozenset(
    "concat concatf dash hls applehttp imf image2 image2pipe lavfi sdp rtsp rtp sap rtp_mpegts sbg vobsub tty "
    "ffmetadata alsa fbdev kmsgrab oss pulse sndio v4l2 video4linux2 x11grab xcbgrab jack".split()
)
_FORMATS = ",".join(sorted({name for names in av.formats_available for name in names.split(",")} - _FORMATS_THAT_REFER))
# Their headers (Ogg: the last page) give the audio's length, so that an earlier end is seen. Others' are guesses.
_FORMATS_WITH_LENGTH = frozenset({"mov", "matroska", "flac", "aiff", "caf", "mp3", "ogg"})
# An end this much before the promised one is an early end: less is rounding, priming and padding.
_EARLY_END_S = 0.5
# A hole between two packets. Phones and browsers leave up to 0.4 s out where nobody speaks; FLAC counts its samples.
_HOLE_S = 0.5
_HOLE_FLAC_S = 0.01


def bad_audio(what: str) -> WhisperdError:
    """Return the error that this file cannot be transcribed, saying why."""
    return WhisperdError(ErrorCode.BAD_AUDIO, what)


class Recording:
    """The audio track of a file. `damaged` becomes true when anything of it is missing or could not be decoded.

    `position_s` is how far it has been read, `length_s` how long it says it is (None where it does not).
    Raises `WhisperdError` (`bad_audio`) when it is no recording or has no audio track.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._container = _open(self._fd)
            try:
                self._stream = _choose_track(self._container)
                self._read_headers()
            except BaseException:
                self._container.close()
                raise
        except BaseException:
            os.close(self._fd)
            raise

    def _read_headers(self) -> None:
        # One thread: audio gains nothing from more, and every one of them costs memory.
        self._stream.codec_context.thread_count = 1
        self._format = self._container.format.name.split(",")[0]
        for stream in self._container.streams:
            if stream is not self._stream:
                stream.discard = Discard.all  # not even read, where the container has an index
        self.length_s = self._promised_length_s()
        self.damaged = is_cut_short(self._fd)
        self.position_s = 0.0

    def _promised_length_s(self) -> float | None:
        stream = self._stream
        if self._format not in _FORMATS_WITH_LENGTH or (self._format == "mp3" and not has_length_header(self._fd)):
            return None
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        # Matroska has a duration for the whole file; its writers put each track's own into a tag.
        tag = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
        if tag:
            return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
        alone = len(self._container.streams) == 1 and self._container.duration is not None
        return self._container.duration / av.time_base if alone and self._container.duration else None

    @property
    def estimate_s(self) -> float:
        """About how long it is, for a progress bar; 0 when nothing is known."""
        return self.length_s or (self._container.duration or 0) / av.time_base

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()
        os.close(self._fd)

    def frames(self) -> Iterator[list[AudioFrame]]:
        """Yield what each packet decodes to (perhaps nothing), to the end or to where nothing more can be read.

        A damaged packet is skipped, as the ffmpeg command does.
        """
        ticks = _Ticks(self._stream)
        hole_s = _HOLE_FLAC_S if self._format == "flac" else _HOLE_S
        try:
            for packet in self._container.demux(self._stream):
                self.damaged |= ticks.advance(packet) > hole_s
                self.position_s = ticks.position_s
                yield self._decode(packet)
        except MemoryError:
            raise
        except IndexError:
            # PyAV 18 stumbles at the end where a stream appeared on the way (MPEG-TS): after our track is flushed.
            pass
        except av.FFmpegError:
            self.damaged = True  # the container broke off; what was decoded until here stands
        if self.length_s is not None and self.position_s < self.length_s - _EARLY_END_S:
            self.damaged = True

    def _decode(self, packet: Packet[AudioStream]) -> list[AudioFrame]:
        try:
            return packet.decode()
        except MemoryError:
            raise
        except av.EOFError:  # the flushing packet of a decoder that has ended already
            return []
        except av.FFmpegError:
            self.damaged = True
            return []


class _Ticks:
    """Follows the packets' own times, in seconds from the start of the track."""

    def __init__(self, stream: AudioStream) -> None:
        self._unit = stream.time_base or Fraction(1)
        self._start = stream.start_time
        self._end: int | None = None
        self.position_s = 0.0

    def advance(self, packet: Packet[AudioStream]) -> float:
        """Take one more packet and return the seconds missing between it and those before it."""
        if packet.pts is None:
            return 0.0
        if self._start is None:
            self._start = packet.pts
        hole = 0 if self._end is None else packet.pts - self._end
        self._end = packet.pts + (packet.duration or 0)
        self.position_s = max(self.position_s, float((self._end - self._start) * self._unit))
        return float(hole * self._unit)


def _open(fd: int) -> InputContainer:
    if os.fstat(fd).st_size == 0:
        raise bad_audio("the file is empty: it has no bytes at all")
    try:
        return av.open(
            "fd:",  # seekable, unlike a pipe: an M4A with its index at the end can be read
            options={"fd": str(fd), "protocol_whitelist": "fd", "format_whitelist": _FORMATS},
            metadata_errors="replace",
        )
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError):
        raise bad_audio(_why_not_opened(fd)) from None


def _why_not_opened(fd: int) -> str:
    if looks_like_text(fd):
        return "the file is text, not audio"
    if os.pread(fd, 4, 4) == b"ftyp":
        return "the file is an MP4 or M4A without its index (moov): it was cut off or never finished, so copy it again"
    return "the file is not audio in any format that FFmpeg reads: check that it plays"


def _choose_track(container: InputContainer) -> AudioStream:
    """Return the track that the ffmpeg command takes by itself: a default one, then the one with the most channels."""
    tracks = container.streams.audio
    if not tracks:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing that can be read"
        raise bad_audio(f"the file has no audio track (it has: {kinds})")
    readable = [track for track in tracks if track.codec_context is not None]  # type: ignore[redundant-expr]
    if not readable:
        raise bad_audio("the file's audio is in a codec that FFmpeg does not decode: convert it and try again")
    # max() takes the first of equals.
    return max(readable, key=lambda track: (bool(track.disposition & Disposition.default), track.channels))
