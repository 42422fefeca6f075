"""Recordings to measure with: noise of any size, speech of known text, and hours of sound without an hour's work."""

from __future__ import annotations

import io
import itertools
import math
import os
import re
import shutil
import subprocess
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream

import whisperd
from bench.daemon import Failed

SAMPLE = Path(whisperd.__file__).parent / "assets" / "sample.flac"
TEXT = Path(__file__).with_name("text.txt")
_BLOCK_BYTES = 2**20
RATE = 16_000  # of what is spoken
_WAV_HEADER = 44  # bytes
# flite's voices that tiny.en understands well.
_VOICES = ("slt", "rms", "awb")
_AAC_RATE, _AAC_FRAME = 16000, 1024  # samples a second, samples a packet


def write_noise(path: Path, size_bytes: int) -> Path:
    """Write a WAV file (44.1 kHz, stereo) of noise. Its first MiB is unlike any other's and is repeated."""
    block = os.urandom(min(_BLOCK_BYTES, size_bytes // 4 * 4))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.setnframes(size_bytes // 4)
        left = size_bytes // 4 * 4
        while left:
            file.writeframesraw(block[:left])
            left -= min(left, len(block))
    return path


def write_talk(path: Path, length_s: float) -> Path:
    """Write the shipped sample, again and again, as a WAV file (16 kHz, mono) of at least `length_s`."""
    sample = sample_pcm()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        for _ in range(int(length_s * 32000 / len(sample)) + 1):
            file.writeframesraw(sample)
    return path


def write_hours(path: Path, hours: int) -> Path:
    """Write hours of speech as AAC in Matroska: the sample is encoded once, its packets are muxed many times."""
    _mux_aac(path, hours * 3600, _encode_aac())
    return path


def write_talks(folder: Path, count: int, minutes: int) -> list[Path]:
    """Write recordings of so many minutes of speech (AAC in Matroska). No two have the same bytes."""
    encoded = _encode_aac()
    paths = [folder / f"talk-{number}.mka" for number in range(count)]
    for path in paths:
        _mux_aac(path, minutes * 60, encoded)
    return paths


def _mux_aac(path: Path, length_s: int, encoded: tuple[AudioStream, list[bytes]]) -> None:
    template, packets = encoded
    with av.open(str(path), "w", format="matroska") as target:
        target.metadata["title"] = path.stem
        stream = target.add_stream_from_template(template)
        for number in range(length_s * _AAC_RATE // _AAC_FRAME):
            packet = av.Packet(packets[number % len(packets)])
            packet.stream = stream
            packet.time_base = Fraction(1, _AAC_RATE)
            packet.pts = packet.dts = number * _AAC_FRAME
            packet.duration = _AAC_FRAME
            target.mux(packet)


def speak(folder: Path) -> list[Path]:
    """Speak the text of `text.txt` in three files: two of more than a minute, one of about three.

    Raises `Failed` without flite.
    """
    if shutil.which("flite") is None:
        raise Failed("needs the program flite (apt-get install flite)")
    paths = []
    for number, (text, voice) in enumerate(zip(TEXT.read_text().split("\n---\n"), ("slt", "rms", "slt"), strict=True)):
        path = folder / f"speech-{number}.wav"
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(path)], check=True, capture_output=True)
        paths.append(path)
    return paths


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoken:
    """A recording (16 kHz s16le, mono) and what is said in it."""

    pcm: bytes
    text: str

    @property
    def length_s(self) -> float:
        return len(self.pcm) / 2 / RATE


def speak_sentences(text: str, lengths_s: Sequence[float]) -> Iterator[Spoken]:
    """Speak recordings of these lengths or a sentence more, in turn with different voices, in whole sentences.

    They go on where the one before ended, and from the end of the text at its beginning. Raises `Failed` without flite.
    """
    if shutil.which("flite") is None:
        raise Failed("needs the program flite (apt-get install flite)")
    sentences = itertools.cycle(_sentences(text))
    for length_s, voice in zip(lengths_s, itertools.cycle(_VOICES)):
        said, pcm = list[str](), bytearray()
        while len(pcm) < 2 * RATE * length_s:
            said.append(next(sentences))
            command = ["flite", "-voice", voice, "-t", said[-1], "-o", "/dev/stdout"]
            pcm += subprocess.run(command, check=True, capture_output=True).stdout[_WAV_HEADER:]
        yield Spoken(pcm=bytes(pcm), text=" ".join(said))


def write_wav(path: Path, recording: Spoken) -> Path:
    """Write what is spoken as a WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(recording.pcm)
    return path


def write_spoken(folder: Path, recordings: Sequence[Spoken]) -> None:
    """Write recordings and what they say into a folder, for a machine that cannot speak."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(recordings):
        (folder / f"{number:02}.pcm").write_bytes(each.pcm)
        (folder / f"{number:02}.txt").write_text(each.text)


def read_spoken(folder: Path) -> list[Spoken]:
    """Return what `write_spoken` wrote. Raises `Failed` where there is nothing."""
    paths = sorted(folder.glob("*.pcm"))
    if not paths:
        raise Failed(f"no recordings in {folder}: `python -m bench.gpu --speak FOLDER` writes some, where flite is")
    return [Spoken(pcm=path.read_bytes(), text=path.with_suffix(".txt").read_text()) for path in paths]


def repeat_sample(length_s: float, seed: int, *, rest_s: float = 0.0, rest_every_s: float = math.inf) -> Spoken:
    """Return the shipped sample again and again, whole, for at least so long; faint noise makes each window another.

    Nobody speaks for `rest_s` after each `rest_every_s`, in which the sample is cut off.
    """
    said, text = np.frombuffer(sample_pcm(), "<i2"), SAMPLE.with_suffix(".txt").read_text().strip()
    times = max(1, math.ceil(min(length_s, rest_every_s) * RATE / len(said)))
    part = np.tile(said, times)
    if rest_every_s < math.inf:
        part = np.concatenate([part[: int(rest_every_s * RATE)], np.zeros(int(rest_s * RATE), "<i2")])
    parts = math.ceil(length_s * RATE / len(part))
    noise = np.random.default_rng(seed).integers(-3, 4, parts * len(part))
    pcm = (np.tile(part, parts).astype(np.int32) + noise).clip(-32768, 32767).astype("<i2")
    return Spoken(pcm=pcm.tobytes(), text=" ".join([text] * times * parts))


def _sentences(text: str) -> list[str]:
    """Return what stands between full stops. Only what has a few words: headings and numbers are read in many ways."""
    joined = re.sub(r"\s+", " ", re.sub(r"[^\w\s.,;:?!'-]|_", " ", text))
    return [each for each in re.split(r"(?<=[.?!:]) ", joined) if len(re.findall(r"[A-Za-z]{2,}", each)) > 3]


def length_s(path: Path) -> float:
    """Return the length of a WAV file in seconds."""
    with wave.open(str(path)) as file:
        return float(file.getnframes() / file.getframerate())


def sample_pcm() -> bytes:
    """Return the shipped sample, 16 kHz s16le."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=16000)
    with av.open(str(SAMPLE)) as source:
        frames = [frame for packet in source.decode(audio=0) for frame in resampler.resample(packet)]
    return b"".join(bytes(frame.planes[0])[: 2 * frame.samples] for frame in frames)


def _encode_aac() -> tuple[AudioStream, list[bytes]]:
    """Return the stream that describes the sample's AAC packets, and the packets' bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as target, av.open(str(SAMPLE)) as source:
        encoder = target.add_stream("aac", rate=_AAC_RATE, layout="mono")
        for frame in source.decode(audio=0):
            target.mux(encoder.encode(frame))
        target.mux(encoder.encode(None))
    buffer.seek(0)
    encoded = av.open(buffer, "r")
    packets = [bytes(packet) for packet in encoded.demux(audio=0) if packet.size]
    return encoded.streams.audio[0], packets
