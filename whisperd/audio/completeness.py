"""Does a file end before its own headers say it does?

FFmpeg decodes half a recording without a word in several formats. Where its duration tells (MP4, FLAC, MP3 with a
Xing header, ...), `recording.py` compares; where FFmpeg hides the difference, the bytes are read here.
"""

from __future__ import annotations

import codecs
import os
import re
import struct

# Sloppy writers count a header in, or are off by a few samples; that is no early end.
_SLACK_BYTES = 4096
_OGG_PAGE_BYTES = 27 + 255 + 255 * 255
_TEXT_BYTES = 2048


def is_cut_short(fd: int) -> bool:
    """True for a WAV whose data, or an Ogg whose last page, goes on beyond the end of the file."""
    head = os.pread(fd, 12, 0)
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:] == b"WAVE":
        return _wav_is_cut_short(fd)
    return head[:4] == b"OggS" and _ogg_is_cut_short(fd)


def _wav_is_cut_short(fd: int) -> bool:
    size_bytes = os.fstat(fd).st_size
    offset = 12
    data_bytes_64 = None
    for _ in range(1000):  # chunks; a hostile file may have millions of empty ones
        header = os.pread(fd, 8, offset)
        if len(header) < 8:
            return True  # it ends before its data began
        name, chunk_bytes = header[:4], struct.unpack("<I", header[4:])[0]
        if name == b"ds64" and len(sizes := os.pread(fd, 16, offset + 8)) == 16:
            data_bytes_64 = struct.unpack("<Q", sizes[8:])[0]
        if name == b"data":
            if chunk_bytes == 0xFFFFFFFF and data_bytes_64 is not None:
                chunk_bytes = data_bytes_64
            return not _is_placeholder(chunk_bytes) and offset + 8 + chunk_bytes > size_bytes + _SLACK_BYTES
        offset += 8 + chunk_bytes + chunk_bytes % 2
    return False


def _is_placeholder(chunk_bytes: int) -> bool:
    """Programs that write a WAV into a pipe cannot know its length: 0, or a value just under or at 2^31 or 2^32."""
    return chunk_bytes == 0 or 0x7FFF0000 <= chunk_bytes <= 0x80000100 or 0xFFFF0000 <= chunk_bytes <= 0xFFFFFFFF


def _ogg_is_cut_short(fd: int) -> bool:
    size_bytes = os.fstat(fd).st_size
    tail = os.pread(fd, 2 * _OGG_PAGE_BYTES, max(0, size_bytes - 2 * _OGG_PAGE_BYTES))
    page = tail[tail.rfind(b"OggS") :] if b"OggS" in tail else b""
    if len(page) < 27:
        return True
    lengths = page[27 : 27 + page[26]]
    return len(page) < 27 + page[26] + sum(lengths)


def has_length_header(fd: int) -> bool:
    """True for an MP3 that says how many frames it has; without that, FFmpeg's duration is a guess by bit rate."""
    head = os.pread(fd, 10, 0)
    offset = 0
    if head[:3] == b"ID3" and len(head) == 10:
        # A tag's length has seven bits a byte; https://id3.org/id3v2.4.0-structure
        offset = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    return re.search(rb"Xing|Info|VBRI", os.pread(fd, 4096, offset)) is not None


def looks_like_text(fd: int) -> bool:
    """True when the file begins as text does, for a message that says so."""
    head = os.pread(fd, _TEXT_BYTES, 0)
    try:
        # Where the look ends, a character may be cut in two; where the file ends, none may.
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _TEXT_BYTES)
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\r\n\t\ufeff" for c in text)
