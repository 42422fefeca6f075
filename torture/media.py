"""Hostile media through the decoder: cut, flipped, bombs, lists of other files, headers that lie."""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import psutil

from bench.daemon import peak_rss_mb, reset_peak
from tests.audio_files import wav_with_length, write_audio, write_silence
from tests.helper_process import HelperProcess
from torture.report import Report
from whisperd.protocol.helper_messages import Decode, Decoded, Failed

MAX_AUDIO_S, MEMORY_MB, CPU_S = 600, 256, 10
_PCM_BYTES = MAX_AUDIO_S * 32_000
# What libraries, stacks and allocators take beside the cap, which counts address space.
_OVERHEAD_MB = 150
_FORMATS = {
    "a.wav": "pcm_s16le",
    "a.flac": "flac",
    "a.mp3": "mp3",
    "a.m4a": "aac",
    "a.ogg": "libopus",
    "a.mkv": "aac",
    "a.ts": "mp2",
    "a.aiff": "pcm_s16be",
}
_LISTS = (
    "ffconcat version 1.0\nfile '{victim}'\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{victim}\n#EXT-X-ENDLIST\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nconcat:{victim}|{victim}\n#EXT-X-ENDLIST\n",
    "#EXTM3U\n{victim}\n",
    "[playlist]\nFile1={victim}\nLength1=-1\n",
    "<?xml version='1.0'?><MPD><Period><AdaptationSet><BaseURL>{victim}</BaseURL></AdaptationSet></Period></MPD>",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
    "subfile,,start,0,end,100,,:{victim}",
    "https://example.org/a.mp3\n",
    "file:{victim}",
)
_FOREIGN = (
    b"%PDF-1.7\n",
    b"\x89PNG\r\n\x1a\n",
    b"PK\x03\x04",
    b"\x7fELF",
    b"GIF89a",
    b"\x1f\x8b\x08",
    b"RIFF\0\0\0\0AVI ",
)


def hostile_files(folder: Path, random: Random, count: int, bomb_s: int) -> Iterator[tuple[str, bytes]]:
    """Yield `count` files as (what it is, content)."""
    good = []
    for name, codec in _FORMATS.items():
        rate = 48_000 if codec == "libopus" else 44_100
        good.append(write_audio(folder / name, codec, seconds=3, rate=rate).read_bytes())
    wav = good[0]
    bomb = write_silence(folder / "bomb.flac", bomb_s).read_bytes()
    kinds = ["cut"] * 5 + ["flipped"] * 5 + ["list"] * 3 + ["foreign"] * 2 + ["header"] * 3 + ["noise", "bomb", "empty"]
    for number in range(count):
        kind = kinds[number % len(kinds)]
        base = random.choice(good)
        match kind:
            case "cut":
                content = base[: random.randrange(len(base))]
            case "flipped":
                content = _flipped(random, base)
            case "list":
                content = random.choice(_LISTS).format(victim=folder / "a.wav").encode()
            case "foreign":
                content = random.choice(_FOREIGN) + random.randbytes(random.randrange(20_000))
            case "header":
                content = _lying_wav(random, wav)
            case "noise":
                content = random.randbytes(random.randrange(50_000))
            case "bomb":
                content = bomb if number % 2 else _flipped(random, bomb)
            case _:
                content = b""
        yield kind, content


def _flipped(random: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 5, 50, 500))):
        changed[random.randrange(len(changed)) if random.random() < 0.6 else random.randrange(200)] ^= (
            1 << random.randrange(8)
        )
    return bytes(changed)


def _lying_wav(random: Random, wav: bytes) -> bytes:
    """Ten hours in a few seconds, rates and channels that nobody has."""
    lie = bytearray(wav_with_length(wav, random.choice((10 * 3600 * 88_200, 0, 7, 0xFFFFFFFF))))
    what = random.randrange(4)
    if what == 0:
        lie[24:28] = struct.pack("<I", random.choice((0, 1, 7, 999, 11_025, 12_345, 192_000, 2**31, 2**32 - 1)))
    elif what == 1:
        lie[22:24] = struct.pack("<H", random.choice((0, 3, 8, 64, 255, 65_535)))
    elif what == 2:
        lie[34:36] = struct.pack("<H", random.choice((0, 1, 7, 24, 64, 65_535)))
    return bytes(lie)


def media(seed: int, count: int, *, bomb_s: int = 36_000) -> Report:
    """Decode `count` hostile files, each under the caps. The bombs unpack to `bomb_s` seconds of silence."""
    report = Report(f"hostile media, seed {seed}")
    random = Random(f"{seed}:media")
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    spool = folder / "spool"
    spool.mkdir()
    worst = {"MB of memory": 0.0, "CPU seconds": 0.0, "MB written": 0.0}
    helper = _helper(spool)
    try:
        for number, (kind, content) in enumerate(hostile_files(folder, random, count, bomb_s)):
            work = spool / str(number)
            work.mkdir()
            (work / "source").write_bytes(content)
            if not _decode(helper, number, kind, work, report, worst):
                report.count("decoders that died")
                helper.__exit__()
                helper = _helper(spool)
            shutil.rmtree(work)
    finally:
        helper.__exit__()
        shutil.rmtree(folder)
        report.end()
    for what, value in worst.items():
        report.facts[f"{what}: the most that one file took"] = f"{value:.1f}"
    return report


def _helper(spool: Path) -> HelperProcess:
    settings = {
        "spool": str(spool),
        "max_audio_s": float(MAX_AUDIO_S),
        "decode_memory_mb": MEMORY_MB,
        "decode_cpu_s": CPU_S,
        "min_free_bytes": 0,
    }
    return HelperProcess("whisperd.audio.decoder", settings)


def _decode(helper: HelperProcess, number: int, kind: str, work: Path, report: Report, worst: dict[str, float]) -> bool:
    """Have one file decoded; return False when the helper died of it, which is allowed."""
    process = psutil.Process(helper.process.pid)
    reset_peak(process.pid)
    before = process.cpu_times()
    report.count(f"files: {kind}")
    helper.send(Decode(run=number + 1, generation=1, folder=work.name))
    try:
        answer: Decoded | Failed = helper.answer(Decoded, Failed, timeout_s=120)  # type: ignore[assignment]
    except EOFError:
        return False
    after = process.cpu_times()
    report.count(f"ends: {'decoded' if isinstance(answer, Decoded) else answer.code}")
    written = sum(path.stat().st_size for path in work.iterdir() if path.name != "source")
    took = {
        "MB of memory": peak_rss_mb(process.pid),
        "CPU seconds": after.user + after.system - before.user - before.system,
        "MB written": written / 1e6,
    }
    for what, value in took.items():
        worst[what] = max(worst[what], value)
    report.require(took["MB of memory"] < MEMORY_MB * 1.05 + _OVERHEAD_MB, f"{kind} {number} took {took}")
    report.require(took["CPU seconds"] < CPU_S + 2, f"{kind} {number} took {took}")
    report.require(written <= _PCM_BYTES, f"{kind} {number} wrote {written} bytes")
    names = {path.name for path in work.iterdir()}
    expected = {"source", "audio.pcm"} if isinstance(answer, Decoded) else {"source"}
    report.require(names == expected, f"{kind} {number} left {names}")
    report.require(kind not in ("list", "empty") or isinstance(answer, Failed), f"{kind} {number} was decoded")
    return True
