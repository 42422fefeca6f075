"""The decoder: any recording to 16 kHz mono, as the ffmpeg command does it; what is no recording, said plainly."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import av
import numpy as np
import pytest

from tests.audio_files import LEFT_HZ, RIGHT_HZ, wav_with_length, with_cover, write_audio, write_silence
from tests.helper_process import HelperProcess
from tests.support import requires_program, requires_root, small_disk
from whisperd.protocol.helper_messages import Cancel, Decode, Decoded, Failed, NoRoom, Progress

SETTINGS = {"max_audio_s": 7200.0, "decode_cpu_s": 600, "decode_memory_mb": 1024, "min_free_bytes": 0}


class Decoder:
    """A decoder with a spool; `decode` gives it a file and returns its answer."""

    def __init__(self, spool: Path, helper: HelperProcess) -> None:
        self.helper = helper
        self._spool = spool
        self._runs = count(1)
        self.folder = spool

    def begin(self, content: bytes | Path) -> Decode:
        run = next(self._runs)
        self.folder = self._spool / f"run{run}"
        self.folder.mkdir()
        content = content.read_bytes() if isinstance(content, Path) else content
        (self.folder / "source").write_bytes(content)
        order = Decode(run=run, generation=1, folder=self.folder.name)
        self.helper.send(order)
        return order

    def decode(self, content: bytes | Path) -> Decoded | Failed:
        order = self.begin(content)
        answer = self.helper.answer(Decoded, Failed)
        assert (answer.run, answer.generation) == (order.run, order.generation)
        kept = {"source", "audio.pcm"} if isinstance(answer, Decoded) else {"source"}
        assert {entry.name for entry in self.folder.iterdir()} == kept
        return answer

    def decoded(self, content: bytes | Path) -> Decoded:
        answer = self.decode(content)
        assert isinstance(answer, Decoded), answer
        assert answer.audio_s == len(self.samples) / 16000
        return answer

    def failed(self, content: bytes | Path) -> Failed:
        answer = self.decode(content)
        assert isinstance(answer, Failed), answer
        return answer

    @property
    def samples(self) -> np.ndarray:
        return np.fromfile(self.folder / "audio.pcm", "<i2")


@contextmanager
def run_decoder(spool: Path, **settings: float) -> Iterator[Decoder]:
    spool.mkdir(exist_ok=True)
    with HelperProcess("whisperd.audio.decoder", SETTINGS | {"spool": str(spool)} | settings) as helper:
        yield Decoder(spool, helper)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    """One decoder for all tests of this file, as in life: what one file did to it must not hurt the next."""
    with run_decoder(tmp_path_factory.mktemp("spool")) as decoder:
        yield decoder
        # Hostile files and all: nothing piles up.
        assert decoder.helper.peak_memory_mb < 150


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One hour in 250 kB: a decompression bomb."""
    return write_silence(tmp_path_factory.mktemp("hour") / "hour.flac", 3600)


# --- recordings ---

FORMATS: dict[str, Callable[[Path], Path]] = {
    "mono.wav": lambda path: write_audio(path, rate=8000),
    "stereo.wav": lambda path: write_audio(path, rate=44100, channels=2),
    "float.wav": lambda path: write_audio(path, "pcm_f32le", rate=48000, channels=2),
    "surround.wav": lambda path: write_audio(path, rate=48000, channels=6),
    "same.flac": lambda path: write_audio(path, "flac", rate=16000),
    "stereo.flac": lambda path: write_audio(path, "flac", rate=48000, channels=2),
    "mono.mp3": lambda path: write_audio(path, "mp3", rate=44100),
    "stereo.mp3": lambda path: write_audio(path, "mp3", rate=48000, channels=2),
    "trailing.m4a": lambda path: write_audio(path, "aac", rate=44100, channels=2, container="mp4"),
    "opus.ogg": lambda path: write_audio(path, "libopus", rate=48000, channels=2),
    "sound.webm": lambda path: write_audio(path, "libopus", rate=48000),
    "film.mp4": lambda path: write_audio(path, "aac", rate=48000, channels=2, video=True),
    "film.webm": lambda path: write_audio(path, "libopus", rate=48000, video=True),
    "radio.ts": lambda path: write_audio(path, "aac", rate=44100),
}
EXACT = {".wav", ".flac", ".mp3"}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the recording of that name, made once."""
    folder = tmp_path_factory.mktemp("recordings")

    def get(name: str) -> Path:
        path = folder / name
        return path if path.exists() else FORMATS[name](path)

    return get


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_sound(decoder: Decoder, make: Callable[[str], Path], name: str) -> None:
    answer = decoder.decoded(make(name))
    assert answer.audio_s == pytest.approx(2, abs=0.1)  # encoders pad their last frame
    assert not answer.truncated
    strength = np.abs(np.fft.rfft(decoder.samples[4000:20000]))  # one second: a bin a hertz
    assert sorted(np.argsort(strength)[-2:]) == [LEFT_HZ, RIGHT_HZ]


@requires_program("ffmpeg")
@pytest.mark.parametrize("name", FORMATS)
def test_samples_are_those_of_the_ffmpeg_command(decoder: Decoder, make: Callable[[str], Path], name: str) -> None:
    """openai-whisper's own command line, sample for sample."""
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", str(make(name)), "-f", "s16le", "-ac", "1"]
    command += ["-acodec", "pcm_s16le", "-ar", "16000", "-"]
    wanted = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, "<i2")
    decoder.decoded(make(name))
    assert len(decoder.samples) == len(wanted)
    difference = np.abs(decoder.samples.astype(int) - wanted).max()
    version = subprocess.run(["ffmpeg", "-version"], check=True, capture_output=True, text=True).stdout.split()[2]
    # Decoders of lossy codecs, and since FFmpeg 6 the resampling of 16-bit audio, differ in the last place.
    assert difference <= (0 if Path(name).suffix in EXACT and version.startswith("5.") else 2)


def test_a_cover_picture_is_no_track(decoder: Decoder, make: Callable[[str], Path]) -> None:
    answer = decoder.decoded(with_cover(make("mono.mp3").read_bytes()))
    assert answer.audio_s == pytest.approx(2, abs=0.1)
    assert not answer.truncated


def test_a_track_may_change_on_its_way(decoder: Decoder, make: Callable[[str], Path]) -> None:
    joined = make("mono.mp3").read_bytes() + make("stereo.mp3").read_bytes()
    assert decoder.decoded(joined).audio_s == pytest.approx(4, abs=0.2)


# --- what is no recording ---


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"Dear all,\nplease find the minutes attached.\n" * 100, "text"),
        ("Grüße aus Köln\n".encode() * 500, "text"),
        (random.Random(1).randbytes(200_000), "not audio"),
        (bytes(100_000), "not audio"),
        (b"\x89", "not audio"),
    ],
)
def test_what_is_no_audio_is_called_so(decoder: Decoder, content: bytes, why: str) -> None:
    answer = decoder.failed(content)
    assert answer.code == "bad_audio"
    assert why in answer.message


@pytest.mark.parametrize("name", ["silent.mp4", "silent.webm"])
def test_a_film_without_sound_has_no_audio_track(decoder: Decoder, tmp_path: Path, name: str) -> None:
    answer = decoder.failed(write_audio(tmp_path / name, None, video=True))
    assert answer.code == "bad_audio"
    assert "no audio track" in answer.message


def test_a_recording_without_a_sample_is_bad_audio(decoder: Decoder, make: Callable[[str], Path]) -> None:
    wav = make("mono.wav").read_bytes()
    answer = decoder.failed(wav[: wav.index(b"data") + 8])
    assert answer.code == "bad_audio"
    assert "no sound" in answer.message


LISTS = {
    "ffconcat": "ffconcat version 1.0\nfile victim.wav\n",
    "ffconcat of itself": "ffconcat version 1.0\nfile fd:\n",
    "playlist": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{folder}/victim.wav\n#EXT-X-ENDLIST\n",
    "playlist by protocol": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{folder}/victim.wav\n#EXT-X-ENDLIST\n",
    "address": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:1/a.wav\n#EXT-X-ENDLIST\n",
    "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_other_files_reads_none_of_them(decoder: Decoder, make: Callable[[str], Path], name: str) -> None:
    # The victim lies where a relative name would find it: beside the source, and in the helper's working folder.
    content = LISTS[name].format(folder=decoder.folder)
    victim = make("mono.wav").read_bytes()
    order = decoder.begin(content.encode())
    decoder.helper.answer(Decoded, Failed)
    (decoder.folder / "victim.wav").write_bytes(victim)
    if name == "ffconcat":  # the danger is real: FFmpeg by itself does read it
        with av.open(str(decoder.folder / "source")) as container:
            assert next(container.decode(audio=0)).samples
    decoder.helper.send(order)
    answer = decoder.helper.answer(Decoded, Failed)
    assert isinstance(answer, Failed)
    assert answer.code == "bad_audio"


# --- recordings that are damaged ---


@pytest.mark.parametrize(
    "name", ["stereo.wav", "float.wav", "stereo.flac", "stereo.mp3", "opus.ogg", "sound.webm", "radio.ts"]
)
def test_half_a_recording_is_decoded_and_said_to_be_truncated(
    decoder: Decoder, make: Callable[[str], Path], name: str
) -> None:
    content = make(name).read_bytes()
    answer = decoder.decoded(content[: len(content) // 2])
    assert answer.truncated
    assert 0.3 < answer.audio_s < 1.7


def test_half_an_mp4_is_decoded_where_its_index_comes_first(decoder: Decoder, tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.mp4", "aac", rate=44100, options={"movflags": "+faststart"})
    content = path.read_bytes()
    answer = decoder.decoded(content[: len(content) * 2 // 3])
    assert answer.truncated
    assert 0.5 < answer.audio_s < 1.7


def test_half_an_mp4_is_bad_audio_where_its_index_came_last(decoder: Decoder, make: Callable[[str], Path]) -> None:
    content = make("trailing.m4a").read_bytes()
    answer = decoder.failed(content[: len(content) // 2])
    assert answer.code == "bad_audio"
    assert "index" in answer.message


@pytest.mark.parametrize("name", ["stereo.flac", "stereo.mp3", "trailing.m4a", "opus.ogg", "sound.webm"])
def test_a_broken_stretch_is_left_out_and_told(decoder: Decoder, make: Callable[[str], Path], name: str) -> None:
    content = bytearray(make(name).read_bytes())
    middle = len(content) // 2
    stretch = min(8000, len(content) // 3)
    content[middle : middle + stretch] = random.Random(2).randbytes(stretch)
    assert decoder.decoded(bytes(content)).truncated


@pytest.mark.parametrize("length", [0, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_a_wav_from_a_pipe_is_whole(decoder: Decoder, make: Callable[[str], Path], length: int) -> None:
    """Who writes into a pipe cannot know the length and puts something there."""
    answer = decoder.decoded(wav_with_length(make("stereo.wav").read_bytes(), length))
    assert answer.audio_s == pytest.approx(2)
    assert not answer.truncated


# --- limits ---


def test_an_hour_streams_in_little_memory_and_tells_its_progress(decoder: Decoder, hour: Path) -> None:
    decoder.helper.seen.clear()
    answer = decoder.decoded(hour)
    assert answer.audio_s == 3600
    assert not answer.truncated
    progress = [message for message in decoder.helper.seen if isinstance(message, Progress)]
    assert all(message.total == 3600 for message in progress)
    assert [message.done for message in progress] == sorted(message.done for message in progress)
    assert decoder.helper.peak_memory_mb < 150


def test_a_bomb_stops_at_the_cap(tmp_path: Path, hour: Path, make: Callable[[str], Path]) -> None:
    with run_decoder(tmp_path / "spool", max_audio_s=60) as decoder:
        answer = decoder.failed(hour)
        assert answer.code == "too_long"
        assert "60 s" in answer.message
        assert decoder.decoded(make("mono.wav")).audio_s == pytest.approx(2)


def test_exactly_the_cap_is_allowed(tmp_path: Path, make: Callable[[str], Path]) -> None:
    with run_decoder(tmp_path / "spool", max_audio_s=2) as decoder:
        assert decoder.decoded(make("same.flac")).audio_s == 2


def test_cpu_time_is_capped_a_job_and_not_a_process(tmp_path: Path, hour: Path, make: Callable[[str], Path]) -> None:
    with run_decoder(tmp_path / "spool", decode_cpu_s=0.2) as decoder:
        for _ in range(2):
            answer = decoder.failed(hour)
            assert answer.code == "timed_out"
            assert "decode_cpu_s" in answer.message
        decoder.decoded(make("mono.wav"))


def test_memory_is_capped(tmp_path: Path, make: Callable[[str], Path]) -> None:
    one_packet = write_audio(tmp_path / "large.mkv", seconds=600)  # 19 MB, decoded 19 more
    with run_decoder(tmp_path / "spool", decode_memory_mb=30) as decoder:
        answer = decoder.failed(one_packet)
        assert answer.code == "bad_audio"
        assert "decode_memory_mb" in answer.message
        decoder.decoded(make("mono.wav"))


def test_a_full_disk_is_told_and_the_next_file_works(tmp_path: Path, make: Callable[[str], Path]) -> None:
    with run_decoder(tmp_path / "spool") as decoder:
        decoder.decoded(make("mono.wav"))  # the helper has set its own limits by then
        _, hard = resource.prlimit(decoder.helper.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(decoder.helper.process.pid, resource.RLIMIT_FSIZE, (10_000, hard))
        assert decoder.failed(make("mono.wav")).code == "storage_full"
        resource.prlimit(decoder.helper.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        decoder.decoded(make("mono.wav"))


@requires_root
def test_a_recording_that_does_not_fit_beside_what_stays_free_is_told_from_a_full_disk(
    tmp_path: Path, make: Callable[[str], Path], hour: Path
) -> None:
    plain = write_audio(tmp_path / "plain.wav", "pcm_mulaw", seconds=300, rate=8000)  # 2.4 MB; nobody knows its length
    free_bytes = 5 * 2**20
    with small_disk(tmp_path / "spool", "12m"), run_decoder(tmp_path / "spool", min_free_bytes=free_bytes) as decoder:
        for content in (hour, plain):
            order = decoder.begin(content)
            answer = decoder.helper.answer(NoRoom, Decoded, Failed)
            assert isinstance(answer, NoRoom)
            assert [entry.name for entry in decoder.folder.iterdir()] == ["source"]
            if content == hour:
                assert answer == NoRoom(run=order.run, generation=1, needed_bytes=3600 * 32_000)
            else:
                assert 2 * 2**20 < answer.needed_bytes < 7 * 2**20, "it had all the room there was, and no more"
        decoder.decoded(make("mono.wav"))
        (tmp_path / "spool" / "others").write_bytes(b"x" * free_bytes)
        assert decoder.failed(make("mono.wav")).code == "storage_full", "nothing more fits"


def test_cancel_stops_a_decoding(decoder: Decoder, hour: Path) -> None:
    order = decoder.begin(hour)
    decoder.helper.answer(Progress)
    decoder.helper.send(Cancel(run=order.run, generation=order.generation))
    answer = decoder.helper.answer(Decoded, Failed)
    assert answer == Failed(run=order.run, generation=1, code="cancelled", message="cancelled")
    assert [entry.name for entry in decoder.folder.iterdir()] == ["source"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_decoder_that_somebody_leaves_no_memory_ends_and_blames_no_recording(
    tmp_path: Path, make: Callable[[str], Path], hour: Path, begun: bool
) -> None:
    with run_decoder(tmp_path / "spool") as decoder:
        decoder.decoded(make("mono.wav"))
        if begun:
            decoder.begin(hour)
            decoder.helper.answer(Progress)
        resource.prlimit(decoder.helper.process.pid, resource.RLIMIT_AS, (2**20, 2**20))
        if not begun:
            decoder.begin(hour)
        with pytest.raises(EOFError):
            decoder.helper.answer(Decoded, Failed)


def test_a_limit_that_an_administrator_lowers_meanwhile_stays() -> None:
    program = """
import resource
from whisperd.audio.limits import limit_job
low = 2**35
with limit_job(memory_mb=100, cpu_s=10):
    resource.setrlimit(resource.RLIMIT_AS, (2**32, low))
assert resource.getrlimit(resource.RLIMIT_AS) == (low, low), resource.getrlimit(resource.RLIMIT_AS)
with limit_job(memory_mb=100, cpu_s=10):
    assert resource.getrlimit(resource.RLIMIT_AS)[0] < low
assert resource.getrlimit(resource.RLIMIT_AS) == (low, low)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
