"""SQLite in a thread of its own: one connection, write-ahead log, synchronous=FULL, calls in order, shared commits.

The loop hands over functions; each runs inside a transaction against the rows themselves. Calls that wait together
share one commit (a commit beside a large copy took 138 ms). A call that raises is rolled back alone. Results come back
through the loop in commit order, never before the commit.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from whisperd.daemon.store.ballast import Ballast, refuses_for_want_of_room
from whisperd.daemon.store.opening import open_database
from whisperd.protocol.errors import ErrorCode, WhisperdError

log = logging.getLogger("whisperd.database")

T = TypeVar("T")
Outcome = Any  # what the call returned, or the exception it raised

_MAX_BATCH = 64
_STOP_S = 1.0  # what the last commits may take when the daemon stops
# What a full disk looks like: the second where the write-ahead log's index has to grow.
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE}
_NEEDED_TO_OPEN_BYTES = 2**20  # the log, its index, and what a start-up changes
# The log is folded into the database when it has about so many pages (of 4 KiB). By ourselves and not by SQLite's own
# habit, because that one passes over errors: an fsync that failed would be tried again, and succeed with the pages
# already dropped.
_CHECKPOINT_PAGES = 1000
_FIRST_CHECKPOINT, _MOST_COMMITS = 10, 100  # only a checkpoint tells how long the log was: the commits till then


@dataclass(slots=True)
class _Call:
    function: Callable[[sqlite3.Connection], Any]
    done: Callable[[Outcome], None]
    new_work: bool
    outcome: Outcome = None


class Database:
    """The store thread. `call` may be used from the loop only; `deliver` brings results back to the loop.

    `failed` is called (through `deliver`) once, when storage fails in a way that must end the daemon: a failed fsync
    is never tried again, because the kernel may have dropped the pages.
    """

    def __init__(
        self,
        path: Path,
        *,
        deliver: Callable[[Callable[[], None]], None],
        failed: Callable[[str], None],
        ballast: Ballast | None = None,
        backups: int = 3,
    ) -> None:
        self.path = path
        self._log_path = path.with_name(f"{path.name}-wal")
        self.ballast = ballast or Ballast(path.with_name("ballast"), 0)
        self.ballast.drop_if_full(_NEEDED_TO_OPEN_BYTES)
        self.connection = open_database(path, backups=backups)
        self._commits = 0  # since the last checkpoint
        self._checkpoint_after = _FIRST_CHECKPOINT  # so many
        self._deliver = deliver
        self.failed = failed
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)

    def start(self) -> None:
        """Start the thread. Before this, `run` may be used directly (recovery at start-up)."""
        self._thread.start()

    def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run one function in a transaction of its own, in the caller's thread, before `start`."""
        try:
            with self._transaction():
                return function(self.connection)
        except sqlite3.OperationalError as error:
            if not self._means_full(error):
                raise
        self._make_room()
        with self._transaction():
            return function(self.connection)

    def call(
        self, function: Callable[[sqlite3.Connection], T], done: Callable[[Outcome], None], *, new_work: bool = False
    ) -> None:
        """Run `function` in the store thread; after the commit `done` gets, in the loop, what it returned or raised.

        It may run several times, each but the last undone (a commit that met a full disk): what it leaves outside the
        rows must be the same after the second time as after the first.

        `new_work` is refused on a full disk, as `storage_full`, if it changes anything. Everything else gets the
        ballast's room: it ends work, or records what has been done.
        """
        self._calls.put(_Call(function, done, new_work))

    def stop(self) -> None:
        """Finish what was handed over, fold the log into the database and close.

        A disk that hangs keeps nobody from stopping: what was not committed was not acknowledged.
        """
        self._calls.put(None)
        if self._thread.is_alive():
            self._thread.join(_STOP_S)
            if self._thread.is_alive():
                log.error("the database does not answer: stopping without its last words path=%s", self.path)
                return
        with contextlib.suppress(sqlite3.Error):
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Any:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise

    def _work(self) -> None:
        while (first := self._calls.get()) is not None:
            batch = [first]
            stopping = False
            while len(batch) < _MAX_BATCH:
                try:
                    following = self._calls.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    stopping = True
                    break
                batch.append(following)
            try:
                while not self._commit(batch):
                    log.warning("another program holds the database: whisperd waits for it path=%s", self.path)
                for call in batch:
                    self._deliver(lambda call=call: call.done(call.outcome))  # type: ignore[misc]
                self._commits += 1
                if self._commits >= self._checkpoint_after:
                    self._checkpoint()
            except Exception as error:  # whatever it is: nothing is committed any more, and the daemon must not go on
                code = getattr(error, "sqlite_errorname", "")
                log.critical("storage failed error=%r code=%s", error, code or "?", exc_info=not code)
                self._deliver(lambda reason=str(error): self.failed(reason))  # type: ignore[misc]
                return
            if stopping:
                return

    def _commit(self, batch: list[_Call]) -> bool:
        """Run the calls under one commit; where that meets a full disk, each alone, so that reads still answer.

        Return False when nothing was done because somebody else, a person with a shell perhaps, holds the database.
        """
        try:
            with self._transaction():
                for call in batch:
                    self._run_in_savepoint(call)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                return False
            if not self._means_full(error):
                raise
            for call in batch:
                self._commit_alone(call)
        return True

    def _commit_alone(self, call: _Call) -> None:
        if self._committed(call):
            return
        if not call.new_work:
            self._make_room()
            if self._committed(call):
                return
        call.outcome = self._full()

    def _committed(self, call: _Call) -> bool:
        """Run a call in a transaction of its own; return False when the disk is too full for that."""
        try:
            with self._transaction():
                self._run_in_savepoint(call)
        except sqlite3.OperationalError as error:
            if not self._means_full(error):
                raise
            return False
        return True

    def _make_room(self) -> None:
        """Give the ballast's room to the log, at once: somebody may take every block that becomes free.

        Folded into the database the log is written from its beginning again, into blocks that it has.
        """
        self.ballast.give_to(self._log_path)
        self._checkpoint()

    def _checkpoint(self) -> None:
        """Fold the log into the database. A full disk leaves it as it is; raises other `sqlite3.Error`."""
        commits, self._commits = self._commits, 0
        try:
            _, pages, _ = self.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            expected = commits * _CHECKPOINT_PAGES // max(pages, 1)
            self._checkpoint_after = max(1, min(expected, 2 * commits, _MOST_COMMITS))
        except sqlite3.OperationalError as error:
            if not self._means_full(error):
                raise

    def _means_full(self, error: sqlite3.OperationalError) -> bool:
        """Under RLIMIT_FSIZE or a quota SQLite says what it also says of a broken disk: then a write of ours tells."""
        if error.sqlite_errorcode != sqlite3.SQLITE_IOERR_WRITE:
            return error.sqlite_errorcode in _FULL
        try:
            at_bytes = self._log_path.stat().st_size
        except OSError:  # somebody deleted it, or the disk is gone: that is worse than full
            return False
        return refuses_for_want_of_room(self.path.with_name("probe"), at_bytes=at_bytes)

    def _full(self) -> WhisperdError:
        return WhisperdError(
            ErrorCode.STORAGE_FULL, f"the disk that holds {self.path.parent} is full: make room and try again"
        )

    def _run_in_savepoint(self, call: _Call) -> None:
        execute = self.connection.execute
        execute("SAVEPOINT call")
        changes = self.connection.total_changes
        try:
            call.outcome = call.function(self.connection)
            # A submit that finds its job by its key changes nothing, and is answered also now.
            if call.new_work and self.ballast.missing and self.connection.total_changes != changes:
                raise self._full()
        except Exception as error:
            if isinstance(error, sqlite3.Error) and not _concerns_the_call_alone(error):
                raise
            if not isinstance(error, WhisperdError):
                log.exception("store call failed")
            execute("ROLLBACK TO call")
            # From here on a value. Its traceback would lead back to the call: a circle that only the collector ends,
            # and it stops the loop for that.
            call.outcome = error.with_traceback(None)
        execute("RELEASE call")


def _concerns_the_call_alone(error: sqlite3.Error) -> bool:
    """Rows that contradict each other, values that no row takes, a statement that is wrong: the storage is well."""
    kinds = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError, sqlite3.InterfaceError)
    return isinstance(error, kinds) or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
