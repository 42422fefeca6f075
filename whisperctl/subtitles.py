"""Transcripts in the formats that players and spreadsheets read."""

from __future__ import annotations

from collections.abc import Sequence

from whisperctl.results import Segment, Transcript


def to_text(transcript: Transcript) -> str:
    """Return the words, a segment a line, as openai-whisper's `.txt` has them."""
    lines = [segment.text.strip() for segment in transcript.segments] or [transcript.text.strip()]
    return "".join(f"{line}\n" for line in lines if line)


def to_tsv(transcript: Transcript) -> str:
    """Return `start`, `end` (milliseconds) and `text`, tab-separated, as openai-whisper writes its `.tsv`."""
    rows = [
        f"{round(1000 * segment.start)}\t{round(1000 * segment.end)}\t{_one_line(segment.text).replace(chr(9), ' ')}\n"
        for segment in transcript.segments
    ]
    return "".join(["start\tend\ttext\n", *rows])


def to_srt(transcript: Transcript) -> str:
    """Return SubRip subtitles."""
    return _subtitles(transcript.segments, "srt")


def to_vtt(transcript: Transcript) -> str:
    """Return WebVTT subtitles."""
    return _subtitles(transcript.segments, "vtt")


def _subtitles(segments: Sequence[Segment], kind: str) -> str:
    import pysubs2  # 20 ms that only subtitles are worth

    file = pysubs2.SSAFile()
    for segment in segments:
        event = pysubs2.SSAEvent(start=round(1000 * segment.start), end=round(1000 * segment.end))
        event.plaintext = _one_line(segment.text)
        file.append(event)
    text: str = file.to_string(kind)
    return text if not text or text.endswith("\n") else text + "\n"


def _one_line(text: str) -> str:
    # An empty line ends a subtitle, and "-->" is how the next one begins: both formats have no way to quote it.
    return " ".join(text.split()).replace("-->", "->")
