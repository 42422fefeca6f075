"""The spool: a folder a run, deleted in a thread of its own (unlinking a large file can take a while)."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import threading
import uuid
from collections.abc import Collection
from pathlib import Path

log = logging.getLogger("whisperd.spool")

PARTIAL = ".partial"  # a copier's folder before it is complete and renamed


class Spool:
    """Hands out names of folders and deletes folders that no row names any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._doomed: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._delete, name="spool", daemon=True)

    def start(self, named: Collection[str]) -> None:
        """Make the spool, doom every folder that is not in `named`, and start deleting."""
        self.make()
        for entry in os.scandir(self.path):
            if entry.name not in named:
                log.info("swept folder=%s", entry.name)
                self.remove(entry.name)
        self._thread.start()

    def make(self) -> None:
        """Make the spool where it is not there (any more): who deletes it loses what is queued, not what comes."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    @staticmethod
    def new_folder() -> str:
        """Return a name that no folder has had."""
        return uuid.uuid4().hex

    def remove(self, folder: str) -> None:
        """Delete a folder soon, with its unfinished twin. One that is not there is no error."""
        self._doomed.put(folder)

    def used_bytes(self) -> int:
        """Return what the spool's files take on disk. Walks the folders: not for the loop."""
        total = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_blocks * 512
                except OSError:  # deleted while we looked
                    continue
        return total

    def stop(self) -> None:
        """Finish the deletions asked for; what a hanging disk keeps us from is swept at the next start."""
        self._doomed.put(None)
        self._thread.join(timeout=2)

    def _delete(self) -> None:
        while (folder := self._doomed.get()) is not None:
            for name in {folder, folder.removesuffix(PARTIAL) + PARTIAL}:
                try:
                    shutil.rmtree(self.path / name)
                except FileNotFoundError:
                    continue
                except NotADirectoryError:
                    (self.path / name).unlink(missing_ok=True)
                except OSError as error:
                    log.warning("cannot delete folder=%s error=%r", name, error)
