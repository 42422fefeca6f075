"""Recordings of known sound, encoded with PyAV: every format that a test of decoding needs, without a program."""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.video.stream import VideoStream

LEFT_HZ, RIGHT_HZ = 440, 1000


def tones(seconds: float, rate: int, channels: int) -> np.ndarray:
    """Return int16 samples [channels, time]: a tone on the left, a higher one on the right, both in one of mono."""
    time = np.arange(int(seconds * rate)) / rate
    left, right = (np.sin(2 * np.pi * hertz * time) * 8000 for hertz in (LEFT_HZ, RIGHT_HZ))
    mixed = [left, right] if channels == 2 else [(left + right) / 2] * channels
    return np.array(mixed).astype(np.int16)


def write_audio(
    path: Path,
    codec: str | None = "pcm_s16le",
    *,
    seconds: float = 2,
    rate: int = 16000,
    channels: int = 1,
    video: bool = False,
    container: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write tones (and a moving picture) to `path` and return it; `codec=None` leaves the sound out."""
    with av.open(str(path), "w", format=container, options=options or {}) as target:
        # All streams before the first packet: the header names them.
        picture = _add_video(target) if video else None
        sound = _add_audio(target, codec, rate, channels) if codec else None
        if picture is not None:
            for number in range(int(seconds * 10)):
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), number % 255, np.uint8), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                target.mux(picture.encode(frame))
            target.mux(picture.encode(None))
        if sound is not None:
            samples = tones(seconds, rate, channels).T.reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "s16", _layout(channels))
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            target.mux(sound.encode(frame))
            target.mux(sound.encode(None))
    return path


def write_silence(path: Path, seconds: int) -> Path:
    """Write a FLAC of silence: 4 kB a minute."""
    with av.open(str(path), "w", format="flac") as target:
        stream = target.add_stream("flac", rate=16000)
        assert isinstance(stream, AudioStream)
        stream.layout, stream.format = "mono", "s16"
        second = np.zeros((1, 16000), np.int16)
        for number in range(seconds):
            frame = av.AudioFrame.from_ndarray(second, "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, number * 16000, Fraction(1, 16000)
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return path


def with_cover(mp3: bytes) -> bytes:
    """Return the MP3 with a picture in an ID3 tag before it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(3 * 16) for _ in range(16))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    picture = b"\0image/png\0\x03\0" + png
    frame = b"APIC" + struct.pack(">IH", len(picture), 0) + picture
    size = bytes(len(frame) >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x03\0\0" + size + frame + mp3


def wav_with_length(wav: bytes, data_bytes: int) -> bytes:
    """Return the WAV with another length in the header of its samples."""
    at = wav.index(b"data") + 4
    return wav[:at] + struct.pack("<I", data_bytes) + wav[at + 4 :]


def _layout(channels: int) -> str:
    return {1: "mono", 2: "stereo", 6: "5.1"}[channels]


def _add_audio(target: av.container.OutputContainer, codec: str, rate: int, channels: int) -> AudioStream:
    stream = target.add_stream(codec, rate=rate)
    assert isinstance(stream, AudioStream)
    stream.layout = _layout(channels)
    return stream


def _add_video(target: av.container.OutputContainer) -> VideoStream:
    stream = target.add_stream("mpeg4" if target.format.name == "mp4" else "libvpx", rate=10)
    assert isinstance(stream, VideoStream)
    stream.width = stream.height = 64
    stream.pix_fmt = "yuv420p"
    return stream
