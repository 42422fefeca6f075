"""The copy helper: a client's descriptor → `<folder>/source` in the spool, hashed on the way and durable.

Or only hashed, where a job of its key is there already and the question is whether it is of the same recording.

It is a process of its own because reading can hang (NFS, FUSE) and because no byte is moved on the daemon's loop.
It imports nothing heavy: a new one is ready in the time that bare Python takes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from whisperd.audio.spoolfile import new_source
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import Copied, CopyIn
from whisperd.protocol.helpers import start
from whisperd.protocol.tasks import Task, serve

_CHUNK_BYTES = 2**20


def main() -> None:
    """Run the helper until its daemon ends."""
    link = start("copier")
    spool, max_bytes = Path(link.settings["spool"]), int(link.settings["max_source_bytes"])
    min_free_bytes = int(link.settings["min_free_bytes"])

    def perform(task: Task, order: CopyIn, descriptors: list[int]) -> Copied:
        (fd,) = descriptors
        total = os.fstat(fd).st_size

        def on_chunk(done: int) -> None:
            task.checkpoint(done, total)

        if order.keep:
            with new_source(spool, order.folder, min_free_bytes=min_free_bytes) as target:
                sha256, size_bytes = _read_all(fd, target.write, max_bytes, on_chunk)
        else:
            sha256, size_bytes = _read_all(fd, lambda data: None, max_bytes, on_chunk)
        return Copied(run=order.run, generation=order.generation, sha256=sha256, size_bytes=size_bytes)

    serve(link, {CopyIn: perform})


def _read_all(
    fd: int, write: Callable[[memoryview], None], max_bytes: int, on_chunk: Callable[[int], None]
) -> tuple[str, int]:
    """Read until the end of the file, wherever that is by then: what was read is what counts.

    Return its SHA-256 in hex and its size in bytes. Raises `WhisperdError`: `too_large`, `bad_audio` (it cannot be
    read), or what `write` and `on_chunk` raise.
    """
    digest, size_bytes = hashlib.sha256(), 0
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    while count := _read(fd, buffer, size_bytes):
        if size_bytes + count > max_bytes:
            raise WhisperdError(
                ErrorCode.TOO_LARGE,
                f"the recording has more than {max_bytes} bytes (setting max_source_bytes): cut it into parts",
            )
        digest.update(view[:count])
        write(view[:count])
        size_bytes += count
        on_chunk(size_bytes)
    return digest.hexdigest(), size_bytes


def _read(fd: int, buffer: bytearray, offset: int) -> int:
    """Read at `offset`: the descriptor's own offset is shared with the client, who may move it at any time."""
    try:
        return os.preadv(fd, [buffer], offset)
    except OSError as error:
        raise WhisperdError(
            ErrorCode.BAD_AUDIO,
            f"the recording cannot be read ({error.strerror}): check its disk, or copy it elsewhere",
        ) from None


if __name__ == "__main__":
    main()
