"""What can be handed to the daemon: files, file objects, descriptors, streams. The client opens, the daemon copies."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from whisperctl.errors import SourceUnreadable
from whisperd.protocol.messages import MAX_NAME_BYTES

Source = str | os.PathLike[str] | int | IO[Any]

_CHUNK_BYTES = 256 * 1024
_MEMFD_BYTES = 8 * 1024 * 1024  # a memfd is memory: what is longer goes to an unlinked file


class OpenSource:
    """An open, seekable descriptor that the client owns, and the name people know it by."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = _wire_name(name)

    @property
    def size_bytes(self) -> int:
        """Bytes there are now."""
        return os.fstat(self.fd).st_size

    def close(self) -> None:
        """Close the descriptor; the daemon has its own by then."""
        os.close(self.fd)


def open_source(source: Source, *, name: str | None = None) -> OpenSource:
    """Open a path, or take a copy of a descriptor or of a file object's descriptor.

    What cannot be sought (a pipe, standard input, an object without a descriptor) is read to its end first. A file is
    handed over whole, from its first byte, wherever its position is. Raises `SourceUnreadable`.
    """
    try:
        if isinstance(source, str | os.PathLike):
            label = os.fspath(source)
            fd = os.open(label, os.O_RDONLY | os.O_CLOEXEC)
        elif isinstance(source, int):
            label = f"descriptor {source}"
            fd = os.dup(source)
        else:
            return _open_object(source, name)
    except (OSError, ValueError, OverflowError) as error:  # a NUL in a name, a closed file, a number too large
        raise _unreadable(str(source), error) from None
    own_name = name or (Path(label).name if isinstance(source, str | os.PathLike) else "")
    return _seekable(fd, own_name, label)


def _open_object(stream: IO[Any], name: str | None) -> OpenSource:
    label = getattr(stream, "name", None)
    label = label if isinstance(label, str) else ""
    own_name = name or Path(label).name
    try:
        fd = os.dup(stream.fileno())
    except (AttributeError, OSError, ValueError):  # io.BytesIO and its like have no descriptor
        return _spool(stream.read, own_name, label or "the file object")
    return _seekable(fd, own_name, label or "the file object")


def _seekable(fd: int, name: str, label: str) -> OpenSource:
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return OpenSource(fd, name)
    try:
        if stat.S_ISDIR(mode):
            raise SourceUnreadable(f"{label} is a folder; name the files in it")
        if os.isatty(fd):
            raise SourceUnreadable(f"{label} is a terminal; pipe audio into it, or name a file")
        return _spool(lambda size: os.read(fd, size), name, label)
    finally:
        os.close(fd)


def _spool(read: Callable[[int], bytes], name: str, label: str) -> OpenSource:
    """Copy a stream to its end, into memory while it is small, else into a file without a name."""
    fd = os.memfd_create("whisperctl", os.MFD_CLOEXEC)
    try:
        copied = 0
        in_memory = True
        while data := read(_CHUNK_BYTES):
            if not isinstance(data, bytes | bytearray | memoryview):
                raise SourceUnreadable(f"{label} is open as text; open it in binary mode ('rb')")
            if in_memory and copied + len(data) > _MEMFD_BYTES:
                fd, in_memory = _to_file(fd), False
            _write_all(fd, data)
            copied += len(data)
    except OSError as error:
        os.close(fd)
        raise _unreadable(label, error) from None
    except BaseException:
        os.close(fd)
        raise
    return OpenSource(fd, name)


def _to_file(memory_fd: int) -> int:
    from tempfile import TemporaryFile

    with TemporaryFile(prefix="whisperctl-", buffering=0) as file:
        os.lseek(memory_fd, 0, os.SEEK_SET)
        while data := os.read(memory_fd, _CHUNK_BYTES):
            _write_all(file.fileno(), data)
        fd = os.dup(file.fileno())
    os.close(memory_fd)
    return fd


def _write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _unreadable(label: str, error: Exception) -> SourceUnreadable:
    match error:
        case FileNotFoundError():
            return SourceUnreadable(f"there is no file {label}")
        case PermissionError():
            return SourceUnreadable(f"not allowed to read {label}")
    return SourceUnreadable(f"cannot read {label}: {getattr(error, 'strerror', None) or error}")


def _wire_name(name: str) -> str:
    # Names are for people: what is no UTF-8 on disk becomes a question mark, what is too long loses its tail.
    clean = re.sub(r"[\ud800-\udfff]", "\ufffd", name).replace("\0", "")
    return clean.encode()[:MAX_NAME_BYTES].decode("utf-8", "ignore")
