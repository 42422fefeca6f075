"""How the database is opened: whether we know its format, whether it is whole, a backup, and then the migrations."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from pathlib import Path

from whisperd.daemon.store.migrations import MIGRATIONS
from whisperd.protocol.spoolfolder import sync_folder

log = logging.getLogger("whisperd.database")


class StateError(Exception):
    """The state folder's database cannot be opened; the message says how to go on. The daemon ends with exit code 4."""


def open_database(path: Path, *, backups: int = 3) -> sqlite3.Connection:
    """Open or create the database and bring it to this version's shape.

    Before a migration it is copied beside itself; `backups` of these copies are kept. Raises `StateError` for a damaged
    database, one that cannot be read or written, and one of a newer version, which is left as it is.
    """
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection, path, backups)
        except BaseException:
            connection.close()
            raise
    except (sqlite3.Error, OSError) as error:
        raise StateError(
            f"the database {path} cannot be opened: {error}. Check the folder's owner and free space; if the file is "
            f"damaged, move {path.name} and its -wal and -shm away and start again: {_what_is_lost(path)}"
        ) from None
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, backups: int) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise StateError(
            f"{path} was written by a newer whisperd (format {version}, this one knows {len(MIGRATIONS)}): "
            "install that version again, or start with another --state-dir"
        )
    if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise sqlite3.DatabaseError("quick_check found damage")
    for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "wal_autocheckpoint = 0"):
        connection.execute(f"PRAGMA {setting}")
    if 0 < version < len(MIGRATIONS) and backups:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the copy is of the file alone
        _back_up(path, version, keep=backups)
    for number in range(version, len(MIGRATIONS)):
        # A transaction a step, the number in it: who is killed in the middle goes on with that step.
        connection.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;")
        log.info("database migrated to=%d", number + 1)


def _back_up(path: Path, version: int, *, keep: int) -> None:
    """Copy the database to `NAME.before-N`, N the format it is about to get; on the disk before anything is changed."""
    backup = path.with_name(f"{path.name}.before-{version + 1}")
    partial = path.with_name(f"{path.name}.backup.partial")
    try:
        with path.open("rb") as source, partial.open("wb") as target:
            os.fchmod(target.fileno(), 0o600)
            shutil.copyfileobj(source, target, 2**20)
            target.flush()
            os.fsync(target.fileno())
        partial.rename(backup)
        sync_folder(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    log.info("database backup=%s", backup)
    for old in _backups(path)[keep:]:
        old.unlink()


def _backups(path: Path) -> list[Path]:
    """Return the copies of earlier formats, the newest first."""
    return sorted(path.parent.glob(f"{path.name}.before-*"), key=lambda copy: copy.stat().st_mtime_ns, reverse=True)


def _what_is_lost(path: Path) -> str:
    backups = _backups(path)
    if not backups:
        return "the queue in it is lost"
    return f"the queue in it is lost, or, if you copy {backups[0].name} to {path.name} first, what came after that"
