"""The spool: a folder a run, deleted in a thread of its own (unlinking a large file can take a while).

Downloads are made in a folder beside it and moved in when they are complete: a fetcher with a user of its own can reach
that folder alone.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import stat
import threading
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from whisperd.daemon.store.rows import pack
from whisperd.protocol.spoolfolder import PARTIAL, storage_errors, sync_folder

log = logging.getLogger("whisperd.spool")


class Spool:
    """Hands out names of folders and deletes folders that no row names any more."""

    def __init__(self, path: Path, *, again_s: float = 60.0) -> None:
        """What cannot be deleted is tried again every `again_s` seconds."""
        self.path = path
        self._again_s = again_s
        self.downloads = path.with_name("downloads")
        self._doomed: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._delete, name="spool", daemon=True)

    def start(self, named: Collection[str]) -> None:
        """Make the spool, doom every folder that is not in `named`, and start deleting."""
        self.make()
        for entry in os.scandir(self.path):
            if entry.name not in named:
                log.info("swept folder=%s", entry.name)
                self.remove(entry.name)
        for entry in os.scandir(self.downloads):
            self.remove(entry.name)
        self._thread.start()

    def make(self) -> None:
        """Make the spool where it is not there (any more): who deletes it loses what is queued, not what comes."""
        for folder in (self.path, self.downloads):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, parents=True)
                sync_folder(folder.parent)  # what is made durable in it must not go with its own name

    def adopt(self, folder: str) -> None:
        """Move a complete download into the spool, durable; once more does no harm. Not for the loop.

        The file alone, into a folder of ours, and no link is followed: who downloaded it may be somebody else by now.
        Raises `OSError`, also for what is no plain file, and `WhisperdError` (`storage_full`).
        """
        target = self.path / folder / "source"
        with storage_errors():
            target.parent.mkdir(mode=0o700, exist_ok=True)
            if not os.path.lexists(target):
                origin = os.open(self.downloads / folder, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    os.rename("source", target, src_dir_fd=origin)
                finally:
                    os.close(origin)
            if not stat.S_ISREG(target.lstat().st_mode):
                raise OSError("it is no plain file")
            sync_folder(target.parent)
            sync_folder(self.path)
        _delete(self.downloads / folder)

    @staticmethod
    def new_folder() -> str:
        """Return a name that no folder has had."""
        return uuid.uuid4().hex

    def remove(self, folder: str) -> None:
        """Delete a folder soon, with its unfinished twin. One that is not there is no error."""
        self._doomed.put(folder)

    def lay_out_journal(self, folder: str, entries: Sequence[bytes]) -> None:
        """Write a run's journal, if it has one, where the model helper reads it. Not for the loop.

        It is a copy of what the database has, so nothing is synced. Raises `WhisperdError` (`storage_full`), `OSError`.
        """
        if not entries:
            return
        # Where the folder is gone the audio is too: the run fails for that, in the helper.
        with storage_errors(), suppress(FileNotFoundError), (self.path / folder / "journal").open("wb") as file:
            for entry in entries:
                file.write(pack(entry))

    def used_bytes(self) -> int:
        """Return what the spool's files and downloads take on disk. Walks the folders: not for the loop."""
        total = 0
        for root in (self.path, self.downloads):
            for folder, _, names in os.walk(root):
                for name in names:
                    with suppress(OSError):  # deleted while we looked
                        total += os.lstat(os.path.join(folder, name)).st_blocks * 512
        return total

    def stop(self) -> None:
        """Finish the deletions asked for; what a hanging disk keeps us from is swept at the next start."""
        self._doomed.put(None)
        self._thread.join(timeout=2)

    def _delete(self) -> None:
        left: list[str] = []  # what could not be deleted: no descriptor was free, or a disk was out of order
        while True:
            try:
                folder = self._doomed.get(timeout=self._again_s if left else None)
            except queue.Empty:
                left = [folder for folder in left if not self._erased(folder)]
                continue
            if folder is None:
                return
            if not self._erased(folder):
                log.warning("cannot delete folder=%s; trying again every %g s", folder, self._again_s)
                left.append(folder)

    def _erased(self, folder: str) -> bool:
        names = {folder, folder.removesuffix(PARTIAL) + PARTIAL}
        gone = [_delete(root / name) for root in (self.path, self.downloads) for name in names]
        return all(gone)


def _delete(path: Path) -> bool:
    """Delete a folder or a file; return False, having said why, where that is not possible now."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except OSError as error:
        log.debug("cannot delete folder=%s error=%r", path.name, error)
        return False
    return True
