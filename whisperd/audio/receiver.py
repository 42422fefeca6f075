"""The receiving helper: the chunks of an upload → `<folder>/source` in the spool, hashed on the way and durable.

The copier's twin for clients that cannot pass a descriptor. What a chunk may hold, and how much of them, the daemon has
checked; here they are only written, one after the other, each answered by a `Progress` that lets its client go on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from whisperd.audio.spoolfile import SpoolFile, new_source
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import Cancel, Copied, Progress, UploadBegin, UploadData
from whisperd.protocol.helpers import HelperLink, start
from whisperd.protocol.tasks import Task, serve


def main() -> None:
    """Run the helper until its daemon ends."""
    link = start("receiver")
    spool, min_free_bytes = Path(link.settings["spool"]), int(link.settings["min_free_bytes"])

    def perform(task: Task, order: UploadBegin, descriptors: list[int]) -> Copied:
        digest = hashlib.sha256()
        with new_source(spool, order.folder, min_free_bytes=min_free_bytes) as target:
            for data in _chunks(link, order, target):
                target.write(memoryview(data))
                digest.update(data)
        return Copied(
            run=order.run, generation=order.generation, sha256=digest.hexdigest(), size_bytes=target.size_bytes
        )

    serve(link, {UploadBegin: perform})


def _chunks(link: HelperLink, order: UploadBegin, target: SpoolFile) -> Iterator[bytes]:
    """Yield the data of each chunk, and answer it once it is written. Raises `cancelled`."""
    own = (order.run, order.generation)
    while True:
        message, _ = link.next()
        if isinstance(message, Cancel) and (message.run, message.generation) == own:
            raise WhisperdError(ErrorCode.CANCELLED, "cancelled")
        if isinstance(message, UploadData) and (message.run, message.generation) == own:
            yield message.data
            link.step()
            done = float(target.size_bytes)
            link.send(Progress(run=order.run, generation=order.generation, done=done, total=done))
            if message.last:
                return


if __name__ == "__main__":
    main()
