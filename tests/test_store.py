"""The store over a real database: jobs and runs, keys, sharing, events, retention, and what a full disk does."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support import fill, requires_root, small_disk, wait_until
from whisperd.daemon.scheduler import Turns
from whisperd.daemon.state.board import Board
from whisperd.daemon.store import Retention, Store
from whisperd.daemon.store.database import Database
from whisperd.daemon.store.migrations import MIGRATIONS
from whisperd.daemon.store.opening import StateError, open_database
from whisperd.daemon.store.rows import Change, Event, JobRow, NewJob, RunRow
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.jobs import IllegalMove, JobState, Priority
from whisperd.protocol.options import parse_options

HOUR_S = 3600.0
OPTIONS = parse_options({})
STORE = Store(Retention(jobs_s=10 * HOUR_S, keys_s=20 * HOUR_S, failed_audio_s=HOUR_S))


class Book:
    """Store calls against a database, each in a transaction of its own, at the time `now`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "queue.sqlite3"
        self.now = 1000.0
        self._folders = 0
        self.open()

    def open(self) -> None:
        self.database = Database(self.path, deliver=lambda call: call(), failed=pytest.fail)

    def run(self, call: Callable[[sqlite3.Connection], Any]) -> Any:
        return self.database.run(call)

    def accept(self, uid: int = 1, share: bytes = b"same", **fields: Any) -> Change:
        self._folders += 1
        defaults: dict[str, Any] = {
            "priority": Priority.BACKGROUND,
            "attached": False,
            "key": None,
            "source": {"kind": "fd", "name": "talk.m4a"},
            "options": OPTIONS,
            "fresh": False,
            "fingerprint": b"f",
            "folder": f"folder-{self._folders}",
            "sha256": "00",
            "size_bytes": 3,
        }
        new = NewJob(uid=uid, share_key=b"%d:%s" % (uid, share), **defaults | fields)
        change: Change = self.run(lambda db: STORE.accept(db, new, self.now))
        return change

    def running(self, **fields: Any) -> JobRow:
        job = self.accept(**fields).job
        assert job is not None
        self.run(lambda db: STORE.decoded(db, job.run_id, audio_s=2.0, truncated=False))
        self.run(lambda db: STORE.start(db, job.run_id, self.now, "model"))
        return job

    def job(self, job_id: int) -> JobRow:
        job: JobRow = self.run(lambda db: STORE.job(db, job_id, uid=None))
        return job

    def events(self, job_id: int, after_seq: int = 0) -> list[Event]:
        events: list[Event] = self.run(lambda db: STORE.events(db, job_id, after_seq=after_seq, limit=1000))
        return events

    def story(self, job_id: int) -> list[str]:
        """The job's events in words; fails if a number is missing or stands there twice."""
        events = self.events(job_id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert self.job(job_id).last_seq == len(events)
        return [
            event.payload["segment"]["text"]
            if event.kind == "segment"
            else str(event.payload["state"]) + ("!" if event.payload.get("discard") else "")
            for event in events
        ]

    def say(self, run_id: int, *texts: str, entries: Sequence[bytes] = ()) -> Change:
        segments = [{"text": text} for text in texts]
        change: Change = self.run(lambda db: STORE.add_segments(db, run_id, segments, entries=entries))
        return change

    def journal(self, run_id: int) -> list[bytes]:
        entries: list[bytes] = self.run(lambda db: STORE.journal(db, run_id))
        return entries

    def finish(self, run_id: int) -> Change:
        change: Change = self.run(lambda db: STORE.finish(db, run_id, b"\x80", self.now))
        return change


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path)


def job_of(change: Change) -> JobRow:
    assert change.job is not None
    return change.job


# --- jobs and runs ---


def test_a_job_from_its_acceptance_to_its_end(book: Book) -> None:
    job = book.running()
    book.say(job.run_id, "one", "two")
    change = book.finish(job.run_id)
    assert change.folders == ["folder-1"], "the audio is not needed any more"
    assert book.story(job.id) == ["queued", "running", "one", "two", "done"]
    answer = book.run(lambda db: STORE.answer(db, job.id, uid=1))
    assert answer.transcript == b"\x80"


def test_the_same_work_is_done_once_and_who_joins_gets_what_was_said_before(book: Book) -> None:
    first = book.running()
    book.say(first.run_id, "one")
    joined = book.accept()
    assert (job_of(joined).run_id, joined.reused, joined.folders) == (first.run_id, True, ["folder-2"])
    book.say(first.run_id, "two")
    book.finish(first.run_id)
    assert book.story(job_of(joined).id) == ["queued", "running", "one", "two", "done"]
    later = book.accept()
    assert job_of(later).state is JobState.DONE
    assert book.story(job_of(later).id) == ["queued", "one", "two", "done"]


def test_other_users_other_options_and_fresh_make_runs_of_their_own(book: Book) -> None:
    runs = [job_of(book.accept(**fields)).run_id for fields in ({}, {"uid": 2}, {"share": b"other"}, {"fresh": True})]
    assert len(set(runs)) == 4


def test_a_failed_or_cancelled_run_is_not_shared(book: Book) -> None:
    first = book.running()
    book.run(lambda db: STORE.fail(db, first.run_id, WhisperdError("bad_audio", "no"), book.now))
    second = book.accept()
    assert not second.reused
    book.run(lambda db: STORE.cancel(db, job_of(second).id, book.now, uid=1))
    assert not book.accept().reused


def test_a_run_ends_with_its_last_job_and_not_before(book: Book) -> None:
    first = book.running()
    second = job_of(book.accept())
    change = book.run(lambda db: STORE.cancel(db, first.id, book.now, uid=1))
    assert job_of(change).state is JobState.CANCELLED
    assert not change.runs
    change = book.run(lambda db: STORE.cancel(db, second.id, book.now, uid=1))
    assert [run.state for run in change.runs] == [JobState.CANCELLED]
    assert book.finish(first.run_id).jobs == [], "a result that comes too late changes nothing"
    assert book.story(first.id)[-1] == "cancelled"


def test_an_ended_job_is_cancelled_in_vain(book: Book) -> None:
    job = book.running()
    book.finish(job.run_id)
    change = book.run(lambda db: STORE.cancel(db, job.id, book.now, uid=1))
    assert job_of(change).state is JobState.DONE
    assert change.events == []


def test_nobody_learns_of_anothers_job(book: Book) -> None:
    job = book.running()
    for call in (
        lambda db: STORE.job(db, job.id, uid=2),
        lambda db: STORE.answer(db, job.id, uid=2),
        lambda db: STORE.cancel(db, job.id, book.now, uid=2),
        lambda db: STORE.forget(db, job.id, uid=2),
    ):
        with pytest.raises(WhisperdError) as theirs:
            book.run(call)
        with pytest.raises(WhisperdError) as nobodys:
            book.run(lambda db: STORE.job(db, job.id + 1000, uid=2))
        assert theirs.value.code == nobodys.value.code == "not_found"
        assert theirs.value.message == nobodys.value.message.replace(str(job.id + 1000), str(job.id))
    assert book.run(lambda db: STORE.jobs(db, uid=2, state=None, before=None, limit=10)) == []


def test_an_illegal_move_raises(book: Book) -> None:
    job = book.running()
    book.finish(job.run_id)
    run = book.run(lambda db: STORE.answer(db, job.id, uid=1)).run
    with pytest.raises(IllegalMove):
        book.run(lambda db: STORE._move_run(db, Change(), run, JobState.RUNNING, book.now))


def test_ids_are_never_used_again(book: Book) -> None:
    job = book.running()
    book.finish(job.run_id)
    book.run(lambda db: STORE.forget(db, job.id, uid=1))
    assert job_of(book.accept()).id == job.id + 1


# --- deaths and restarts ---


def test_a_restart_returns_running_work_to_the_queue_with_what_it_has_come_to(book: Book) -> None:
    running, waiting = book.running(), job_of(book.accept(share=b"other"))
    book.say(running.run_id, "one", entries=[b"a"])
    book.open()  # as after kill -9: the old connection is simply left
    live, folders = book.run(lambda db: STORE.recover(db, book.now))
    assert {job.id: job.state for job in live.jobs} == {running.id: JobState.QUEUED, waiting.id: JobState.QUEUED}
    assert folders == {"folder-1", "folder-2"}
    assert book.story(running.id) == ["queued", "running", "one", "queued"]
    joined = job_of(book.accept())
    assert book.story(joined.id) == ["queued", "one"]
    book.run(lambda db: STORE.start(db, running.run_id, book.now, "model"))
    assert book.journal(running.run_id) == [b"a"]
    book.say(running.run_id, "two", entries=[b"b", b"c"])
    assert book.journal(running.run_id) == [b"a", b"b", b"c"]
    book.finish(running.run_id)
    assert book.story(running.id) == ["queued", "running", "one", "queued", "running", "two", "done"]
    assert book.story(joined.id) == ["queued", "one", "running", "two", "done"]
    assert book.journal(running.run_id) == [], "it ends with its run"
    assert book.story(job_of(book.accept()).id) == ["queued", "one", "two", "done"]


def test_another_model_begins_anew_and_says_so(book: Book) -> None:
    job = book.running()
    book.say(job.run_id, "void", entries=[b"a"])
    book.run(lambda db: STORE.put_back(db, job.run_id, book.now))
    joined = job_of(book.accept())
    book.run(lambda db: STORE.start(db, job.run_id, book.now, "another model"))
    assert book.journal(job.run_id) == []
    book.say(job.run_id, "one")
    book.finish(job.run_id)
    assert book.story(job.id) == ["queued", "running", "void", "queued", "running!", "one", "done"]
    assert book.story(joined.id) == ["queued", "void", "running!", "one", "done"]
    assert book.story(job_of(book.accept()).id) == ["queued", "one", "done"], "the void is not told who comes later"


def test_a_journal_that_cannot_be_used_begins_anew_too(book: Book) -> None:
    job = book.running()
    book.say(job.run_id, "void", entries=[b"a"])
    book.run(lambda db: STORE.void_journal(db, job.run_id))
    assert book.job(job.id).state is JobState.QUEUED
    book.run(lambda db: STORE.start(db, job.run_id, book.now, "model"))
    assert book.journal(job.run_id) == []
    assert book.story(job.id) == ["queued", "running", "void", "queued", "running!"]


@pytest.mark.parametrize("end", ["finish", "fail", "cancel"])
def test_a_journal_ends_with_its_run(book: Book, end: str) -> None:
    job, other = book.running(), book.running(share=b"other")
    for run_id in (job.run_id, other.run_id):
        book.say(run_id, "one", entries=[b"a"])
    calls = {
        "finish": lambda db: STORE.finish(db, job.run_id, b"\x80", book.now),
        "fail": lambda db: STORE.fail(db, job.run_id, WhisperdError("internal", "no"), book.now),
        "cancel": lambda db: STORE.cancel(db, job.id, book.now, uid=1),
    }
    book.run(calls[end])
    assert (book.journal(job.run_id), book.journal(other.run_id)) == ([], [b"a"])


def test_answers_that_come_too_late_are_not_recorded(book: Book) -> None:
    job = book.running()
    book.run(lambda db: STORE.put_back(db, job.run_id, book.now))
    book.say(job.run_id, "late", entries=[b"a"])
    assert book.journal(job.run_id) == []
    assert book.story(job.id) == ["queued", "running", "queued"]


def test_the_third_death_fails_a_run(book: Book) -> None:
    job = book.running()
    for state in (JobState.QUEUED, JobState.QUEUED, JobState.FAILED):
        book.run(lambda db: STORE.start(db, job.run_id, book.now))
        book.run(lambda db: STORE.put_back(db, job.run_id, book.now, died=True))
        assert book.job(job.id).state is state
    assert book.job(job.id).error_code == "worker_crashed"


def test_a_death_in_company_is_suspicious_and_one_alone_counts(book: Book) -> None:
    job = book.running()
    for number in range(1, 6):
        book.run(lambda db: STORE.start(db, job.run_id, book.now, "model"))
        change = book.run(lambda db: STORE.put_back(db, job.run_id, book.now, suspect=True))
        assert [(run.suspicion, run.deaths) for run in change.runs] == [(number, 0)]
    for state in (JobState.QUEUED, JobState.QUEUED, JobState.FAILED):
        change = book.run(lambda db: STORE.count_death(db, job.run_id, book.now))
        assert [run.state for run in change.runs] == [state]
    assert book.job(job.id).error_code == "worker_crashed"
    assert book.run(lambda db: STORE.count_death(db, job.run_id, book.now)) == Change(), "it has ended"


def test_decoders_that_died_are_forgiven_once_one_got_through(book: Book) -> None:
    job = job_of(book.accept())
    for _ in range(2):
        book.run(lambda db: STORE.put_back(db, job.run_id, book.now, died=True))
    change = book.run(lambda db: STORE.decoded(db, job.run_id, audio_s=2.0, truncated=False))
    assert [run.deaths for run in change.runs] == [0]


def test_an_unload_never_counts(book: Book) -> None:
    job = book.running()
    for _ in range(5):
        book.run(lambda db: STORE.put_back(db, job.run_id, book.now, died=False))
        book.run(lambda db: STORE.start(db, job.run_id, book.now))
    assert book.job(job.id).state is JobState.RUNNING


# --- keys ---


def test_a_key_makes_one_job(book: Book) -> None:
    first = book.accept(key="k")
    again = book.accept(key="k")
    assert job_of(again).id == job_of(first).id
    assert again.folders == ["folder-2"]
    with pytest.raises(WhisperdError) as conflict:
        book.accept(key="k", fingerprint=b"another source")
    assert conflict.value.code == "key_conflict"
    assert job_of(book.accept(key="k", uid=2)).id != job_of(first).id, "keys are a user's own"


def test_a_key_whose_job_failed_is_free_again(book: Book) -> None:
    job = book.running(key="k")
    book.run(lambda db: STORE.fail(db, job.run_id, WhisperdError("bad_audio", "no"), book.now))
    second = book.accept(key="k", fingerprint=b"another source")
    assert job_of(second).id != job.id
    assert job_of(book.accept(key="k", fingerprint=b"another source")).id == job_of(second).id


def test_a_key_outlives_its_jobs_row_for_a_while(book: Book) -> None:
    job = book.running(key="k")
    book.finish(job.run_id)
    book.now += 11 * HOUR_S
    change = book.run(lambda db: STORE.housekeep(db, book.now))
    assert (change.gone_jobs, change.gone_runs) == ([job.id], [job.run_id])
    with pytest.raises(WhisperdError) as gone:
        book.accept(key="k")
    assert gone.value.code == "not_found"
    book.now += 21 * HOUR_S
    book.run(lambda db: STORE.housekeep(db, book.now))
    assert job_of(book.accept(key="k")).id == job.id + 1


def test_a_key_whose_job_failed_is_free_also_when_the_job_is_past_its_retention(book: Book) -> None:
    first, second = (book.running(key=key, share=key.encode()) for key in ("k", "m"))
    for job in (first, second):
        book.run(lambda db, job=job: STORE.fail(db, job.run_id, WhisperdError("bad_audio", "no"), book.now))
    taken = job_of(book.accept(key="m"))
    book.now += 11 * HOUR_S
    assert book.run(lambda db: STORE.housekeep(db, book.now)).gone_jobs == [first.id, second.id]
    assert not book.accept(key="k", fingerprint=b"another source", share=b"other").reused
    assert job_of(book.accept(key="m")).id == taken.id, "the key of another job by now"


def test_keys_go_a_few_at_a_time(book: Book) -> None:
    for number in range(5):
        job = job_of(book.accept(key=f"k{number}"))
        book.run(lambda db, job=job: STORE.cancel(db, job.id, book.now, uid=1))
    book.now += 11 * HOUR_S
    book.run(lambda db: STORE.housekeep(db, book.now))
    book.now += 21 * HOUR_S
    for left in (3, 1, 0):
        book.run(lambda db: STORE.housekeep(db, book.now, limit=2))
        assert book.run(lambda db: db.execute("SELECT count(*) FROM keys").fetchone()) == (left,)


def test_forget_deletes_the_key_too(book: Book) -> None:
    job = book.running(key="k")
    with pytest.raises(WhisperdError) as alive:
        book.run(lambda db: STORE.forget(db, job.id, uid=1))
    assert alive.value.code == "bad_request"
    book.finish(job.run_id)
    book.run(lambda db: STORE.forget(db, job.id, uid=1))
    assert not book.accept(key="k").reused
    for table in ("events", "segments", "transcripts"):
        assert book.run(lambda db, table=table: db.execute(f"SELECT count(*) FROM {table}").fetchone()) in ((0,), (1,))


def test_forget_leaves_a_shared_run_to_the_others(book: Book) -> None:
    first = book.running()
    second = job_of(book.accept())
    book.finish(first.run_id)
    book.run(lambda db: STORE.forget(db, first.id, uid=1))
    assert book.run(lambda db: STORE.answer(db, second.id, uid=1)).transcript == b"\x80"


def test_failed_audio_is_kept_for_a_while(book: Book) -> None:
    job = book.running()
    failed = book.run(lambda db: STORE.fail(db, job.run_id, WhisperdError("internal", "no"), book.now))
    assert failed.folders == []
    book.now += 2 * HOUR_S
    assert book.run(lambda db: STORE.housekeep(db, book.now)).folders == ["folder-1"]


# --- lists and events ---


def test_jobs_are_listed_newest_first_in_pages(book: Book) -> None:
    ids = [job_of(book.accept(share=b"%d" % n)).id for n in range(5)]

    def page(before: int | None) -> list[int]:
        rows = book.run(lambda db: STORE.jobs(db, uid=1, state=JobState.QUEUED, before=before, limit=2))
        return [job.id for job, _ in rows]

    assert page(None) == ids[:2:-1]
    assert page(ids[3]) == [ids[2], ids[1]]


def test_events_after_a_number(book: Book) -> None:
    job = book.running()
    book.say(job.run_id, "one", "two")
    assert [event.seq for event in book.events(job.id, after_seq=2)] == [3, 4]


# --- downloads ---


def to_fetch(book: Book, address: bytes = b"address", **fields: Any) -> JobRow:
    source = {"kind": "url", "url": address.decode()}
    defaults = {"source": source, "source_key": address, "folder": None, "sha256": "", "size_bytes": 0}
    return job_of(book.accept(share=address, **defaults | fields))


def fetching(book: Book, address: bytes = b"address", *, folder: str = "first", **fields: Any) -> JobRow:
    job = to_fetch(book, address, **fields)
    book.run(lambda db: STORE.fetch_started(db, job.run_id, folder, book.now))
    return job


def fetched(book: Book, job: JobRow, share_key: bytes = b"audio") -> Change:
    change: Change = book.run(
        lambda db: STORE.fetched(
            db, job.run_id, book.now, sha256="ab", size_bytes=7, title="A talk", share_key=share_key
        )
    )
    return change


def run_of(book: Book, job: JobRow) -> RunRow:
    answer = book.run(lambda db: STORE.answer(db, job.id, uid=None, with_transcript=False))
    run: RunRow = answer.run
    return run


def test_whoever_asks_for_the_same_address_joins_its_run(book: Book) -> None:
    first = fetching(book)
    second = to_fetch(book)
    assert second.run_id == first.run_id
    assert book.story(second.id) == ["pending", "fetching"]
    fetched(book, first)
    assert book.story(to_fetch(book).id) == ["pending", "queued"]
    book.run(lambda db: STORE.decoded(db, first.run_id, audio_s=2.0, truncated=False))
    book.run(lambda db: STORE.start(db, first.run_id, book.now))
    book.say(first.run_id, "one")
    assert book.story(to_fetch(book).id) == ["pending", "queued", "running", "one"]
    book.finish(first.run_id)
    assert book.story(to_fetch(book).id) == ["pending", "one", "done"]
    assert book.story(first.id) == book.story(second.id) == ["pending", "fetching", "queued", "running", "one", "done"]
    assert to_fetch(book, fresh=True).run_id != first.run_id
    run = run_of(book, first)
    assert (run.sha256, run.size_bytes, run.title) == ("ab", 7, "A talk")


def test_a_download_that_turns_out_to_be_known_is_handed_over(book: Book) -> None:
    file = book.running(share=b"audio")
    book.say(file.run_id, "one")
    job, gone = fetching(book), to_fetch(book)
    book.run(lambda db: STORE.cancel(db, gone.id, book.now, uid=None))
    change = fetched(book, job, share_key=b"1:audio")
    assert change.gone_runs == [job.run_id]
    assert change.folders == ["first"]
    assert book.job(job.id).run_id == book.job(gone.id).run_id == file.run_id
    assert book.story(job.id) == ["pending", "fetching", "queued", "running", "one"]
    assert change.events == book.events(job.id, after_seq=2), "who follows it is told"
    assert book.story(gone.id) == ["pending", "fetching", "cancelled"]
    assert to_fetch(book).run_id == file.run_id, "the next one need not download"
    fresh = fetching(book, fresh=True)
    assert not fetched(book, fresh, share_key=b"1:audio").gone_runs, "computed anew"


def retried(book: Book, job: JobRow) -> tuple[JobRow, RunRow]:
    """Retry a job; return the new one and its run."""

    def key(failed: JobRow, run: RunRow) -> bytes:
        return str(failed.source["url"]).encode() if failed.is_download else b"1:audio"

    change = book.run(lambda db: STORE.retry(db, job.id, book.now, uid=None, model_key=key))
    return job_of(change), run_of(book, job_of(change))


@pytest.mark.parametrize("first", ["the file", "the download"])
def test_jobs_of_one_run_are_retried_as_what_they_are(book: Book, first: str) -> None:
    """A file's run may take over who downloaded the same, and a file may join a run that began with a download."""
    if first == "the file":
        file, video = job_of(book.accept(share=b"audio")), fetching(book)
        fetched(book, video, share_key=b"1:audio")
        folder = "folder-1"
    else:
        video = fetching(book)
        fetched(book, video, share_key=b"1:audio")
        file, folder = job_of(book.accept(share=b"audio", sha256="ab")), "first"
    run_id = book.job(file.id).run_id
    assert book.job(video.id).run_id == run_id
    book.run(lambda db: STORE.fail(db, run_id, WhisperdError("internal", "no"), book.now))
    again, run = retried(book, file)
    assert (again.state, run.folder, run.source, run.source_key) == (JobState.QUEUED, folder, None, None)
    again, run = retried(book, video)
    assert (again.state, run.folder, run.source, run.source_key) == (
        JobState.PENDING,
        None,
        {"kind": "url", "url": "address"},
        b"address",
    )


def test_the_jobs_of_a_run_are_read_once_however_many_segments_come(book: Book) -> None:
    first = book.running()
    second = job_of(book.accept())
    statements: list[str] = []
    book.run(lambda db: db.set_trace_callback(statements.append))
    change = book.say(first.run_id, "one", "two", "three")
    book.run(lambda db: db.set_trace_callback(None))
    assert sum(text.startswith("SELECT * FROM jobs") for text in statements) == 1
    assert change.jobs == [book.job(first.id), book.job(second.id)]
    assert book.story(second.id) == ["queued", "running", "one", "two", "three"]


@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.DONE])
def test_a_job_joins_its_run_in_as_few_statements_however_many_segments_there_are(book: Book, state: JobState) -> None:
    counts = []
    for name, segments in ((b"short", 1), (b"long", 50)):
        first = book.running(share=name)
        said = [f"segment {number}" for number in range(segments)]
        book.say(first.run_id, *said)
        if state is JobState.DONE:
            book.finish(first.run_id)
        statements: list[str] = []
        book.run(lambda db, seen=statements: db.set_trace_callback(seen.append))
        second = job_of(book.accept(share=name))
        book.run(lambda db: db.set_trace_callback(None))
        counts.append(len(statements))
        assert book.story(second.id) == (
            ["queued", "running", *said] if state.ended is False else ["queued", *said, "done"]
        )
        assert [event.seq for event in book.events(second.id)] == list(range(1, second.last_seq + 1))
    assert counts[0] == counts[1]


def test_a_title_is_told_to_who_asked_for_the_download_and_not_to_who_shares_its_audio(book: Book) -> None:
    ada, bob = 1, 2
    video = fetching(book, uid=ada)
    fetched(book, video, share_key=b"2:audio")  # as bob's file: `share_results` is "everyone"
    file = job_of(book.accept(uid=bob, share=b"audio"))
    run = run_of(book, video)
    assert file.run_id == run.id
    board = Board(Turns(16))
    assert board.show(book.job(video.id), run).source == {"kind": "url", "url": "address", "title": "A talk"}
    assert board.show(file, run).source == {"kind": "fd", "name": "talk.m4a"}


def test_a_download_is_tried_again_three_times(book: Book) -> None:
    job = to_fetch(book)
    error = WhisperdError("fetch_failed", "no")

    def again(counts: bool = True) -> Change:
        book.run(lambda db: STORE.fetch_started(db, job.run_id, "folder", book.now))
        change: Change = book.run(lambda db: STORE.fetch_failed(db, job.run_id, error, book.now, counts=counts))
        return change

    assert again(counts=False).folders == ["folder"]
    for _ in range(4):
        assert again().folders == ["folder"]
    assert book.story(job.id) == ["pending", "fetching"] * 5 + ["failed"]
    assert book.job(job.id).error_code == "fetch_failed"
    run = run_of(book, job)
    assert (run.folder, run.audio_expires_at) == (None, None), "there is no audio to keep"


def test_an_interrupted_download_is_pending_again_after_a_restart(book: Book) -> None:
    job = fetching(book)
    live, named = book.run(lambda db: STORE.recover(db, book.now))
    assert [row.state for row in live.runs] == [JobState.PENDING]
    assert named == set(), "what is left of it is swept"
    assert book.story(job.id) == ["pending", "fetching", "pending"]
    book.run(lambda db: STORE.fetch_started(db, job.run_id, "second", book.now))
    change = book.run(lambda db: STORE.cancel(db, job.id, book.now, uid=None))
    assert change.folders == ["second"]
    assert not fetched(book, job).runs, "it comes too late"


# --- the database ---


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite3"
    connection = open_database(path)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StateError, match="newer"):
        open_database(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "and nothing is left beside it"


def test_a_database_is_backed_up_before_it_is_migrated(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite3"
    shutil.copyfile(Path(__file__).with_name("data") / "queue-v1.sqlite3", path)
    for age, name in enumerate(("before-07", "before-08")):
        backup = path.with_name(f"queue.sqlite3.{name}")
        backup.write_bytes(b"")
        os.utime(backup, (age, age))
    open_database(path, backups=2).close()
    kept = {found.name for found in tmp_path.glob("*.before-*")}
    assert kept == {"queue.sqlite3.before-2", "queue.sqlite3.before-08"}
    with closing(sqlite3.connect(path.with_name("queue.sqlite3.before-2"))) as backup:
        assert backup.execute("PRAGMA user_version").fetchone() == (1,)
        assert backup.execute("SELECT count(*) FROM jobs").fetchone()[0] > 0
    path.write_bytes(b"this is no database")
    with pytest.raises(StateError, match=r"copy queue\.sqlite3\.before-2 to queue\.sqlite3 first"):
        open_database(path)


@requires_root
def test_a_migration_without_room_for_a_backup_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    with small_disk(folder, "1m"):
        path = folder / "queue.sqlite3"
        shutil.copyfile(Path(__file__).with_name("data") / "queue-v1.sqlite3", path)
        before = path.read_bytes()
        fill(folder / "fill")
        # Room for the log's index of 32 KiB, and not for a copy of 56 KiB.
        os.truncate(folder / "fill", (folder / "fill").stat().st_size - 60 * 1024)
        with pytest.raises(StateError, match="No space left on device"):
            open_database(path)
        assert path.read_bytes() == before
        assert not list(folder.glob("*before*"))
        (folder / "fill").unlink()
        open_database(path).close()


def test_a_database_of_version_3_still_opens(tmp_path: Path) -> None:
    shutil.copyfile(Path(__file__).with_name("data") / "queue-v3.sqlite3", tmp_path / "queue.sqlite3")
    old = Book(tmp_path)
    old.now = 40_000.0
    live, named = old.run(lambda db: STORE.recover(db, old.now))
    assert [(job.id, job.state) for job in live.jobs] == [(3, JobState.QUEUED)]
    assert len(named) == 1
    old.run(lambda db: STORE.start(db, 3, old.now, "model"))
    assert old.journal(3) == [b"a", b"b"]
    assert old.story(3) == ["queued", "running", "half", "queued", "running"]
    assert job_of(old.accept(key="done")).id == 1
    with pytest.raises(WhisperdError) as gone:
        old.accept(key="gone")
    assert gone.value.code == "not_found"
    old.now = 200_000.0
    old.run(lambda db: STORE.housekeep(db, old.now))
    assert not old.accept(key="gone").reused
    search = "EXPLAIN QUERY PLAN SELECT uid, key FROM keys WHERE expires_at <= ? LIMIT ?"
    plan = old.run(lambda db: db.execute(search, (0, 1)).fetchall())
    assert "keys_expires" in plan[0][3], "not all keys are looked at each minute"


def test_a_database_of_version_2_still_opens(tmp_path: Path) -> None:
    shutil.copyfile(Path(__file__).with_name("data") / "queue-v2.sqlite3", tmp_path / "queue.sqlite3")
    old = Book(tmp_path)
    assert old.story(1) == ["queued", "running", "one", "two", "done"]
    assert old.story(2) == ["queued", "running", "void", "queued!", "running", "half"]
    live, _ = old.run(lambda db: STORE.recover(db, 2000.0))
    assert [(job.id, job.state) for job in live.jobs] == [(2, JobState.QUEUED), (3, JobState.PENDING)]
    old.run(lambda db: STORE.start(db, 2, 2000.0, "model"))
    old.say(2, "whole")
    story = ["queued", "running", "void", "queued!", "running", "half", "queued", "running!", "whole"]
    assert old.story(2) == story, "a run of that version has no journal"
    assert old.story(job_of(old.accept(uid=1, share=b"second")).id) == ["queued", "running", "whole"]
    assert old.story(job_of(old.accept(uid=1, share=b"first")).id) == ["queued", "one", "two", "done"]


def test_a_database_of_version_1_still_opens(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite3"
    shutil.copyfile(Path(__file__).with_name("data") / "queue-v1.sqlite3", path)
    old = Book(tmp_path)
    live, named = old.run(lambda db: STORE.recover(db, 2000.0))
    assert [(job.id, job.state) for job in live.jobs] == [(3, JobState.QUEUED), (4, JobState.QUEUED)]
    assert all(run.source is None and run.title is None and not run.fresh for run in live.runs)
    assert named == {"folder-3", "folder-4", "folder-5", "folder-6"}
    answer = old.run(lambda db: STORE.answer(db, 1, uid=1000))
    assert answer.transcript is not None
    assert old.story(1) == ["queued", "running", " Hello.", "done"]
    assert path.with_name("queue.sqlite3.before-2").exists(), "the old one is kept beside it"


@pytest.mark.parametrize("damage", [b"this is no database, whatever its name says. " * 100, None])
def test_a_damaged_database_is_refused_with_a_way_out(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "queue.sqlite3"
    if damage is None:
        connection = open_database(path)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        content = bytearray(path.read_bytes())
        content[4096:] = b"\xff" * (len(content) - 4096)
        damage = bytes(content)
    path.write_bytes(damage)
    with pytest.raises(StateError, match="move"):
        open_database(path)


@pytest.fixture
def threaded(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "queue.sqlite3", deliver=lambda call: call(), failed=lambda reason: None)
    database.start()
    yield database
    database.stop()


def test_calls_come_back_in_order_and_an_error_is_its_callers_alone(threaded: Database) -> None:
    seen: list[Any] = []

    def refuse(db: sqlite3.Connection) -> None:
        db.execute("CREATE TABLE mine (x)")
        raise WhisperdError("bad_request", "no")

    for number in range(50):
        threaded.call(lambda db, number=number: db.execute(f"CREATE TABLE t{number} (x)") and number, seen.append)
    threaded.call(refuse, seen.append)
    threaded.call(lambda db: [row[0] for row in db.execute("SELECT name FROM sqlite_master")], seen.append)
    wait_until(lambda: len(seen) == 52, 10)
    assert seen[:50] == list(range(50))
    assert isinstance(seen[50], WhisperdError)
    assert seen[50].__traceback__ is None, "else it is garbage that only a collection frees"
    assert "t49" in seen[51]
    assert "mine" not in seen[51], "what a failed call wrote is undone"


@pytest.mark.parametrize(
    "wrong", ["INSERT INTO transcripts VALUES (1, NULL)", "SELECT nothing FROM jobs", "INSERT INTO jobs VALUES (?)"]
)
def test_a_call_that_is_wrong_fails_alone(threaded: Database, wrong: str) -> None:
    seen: list[Any] = []
    for sql in ("CREATE TABLE one (x)", wrong, "CREATE TABLE two (x)", "SELECT count(*) FROM one, two"):
        threaded.call(lambda db, sql=sql: db.execute(sql).fetchall(), seen.append)
    wait_until(lambda: len(seen) == 4, 10)
    assert isinstance(seen[1], sqlite3.Error)
    assert seen[3] == [(0,)]


def test_the_log_stays_short_whatever_is_written(threaded: Database) -> None:
    seen: list[Any] = []
    threaded.call(lambda db: db.execute("CREATE TABLE big (x)") and None, seen.append)
    for number in range(60):
        threaded.call(lambda db: db.execute("INSERT INTO big VALUES (zeroblob(1000000))") and None, seen.append)
        wait_until(lambda number=number: len(seen) == number + 2, 10)  # a commit each
    assert seen == [None] * 61
    assert threaded.path.with_name(f"{threaded.path.name}-wal").stat().st_size < 15e6


def test_a_full_disk_refuses_what_writes_and_answers_what_reads(threaded: Database) -> None:
    seen: list[Any] = []
    threaded.call(lambda db: db.execute("CREATE TABLE t (x)") and "made", seen.append)
    wait_until(lambda: seen, 10)
    threaded.call(lambda db: db.execute("PRAGMA max_page_count = 1") and None, seen.append)
    wait_until(lambda: len(seen) == 2, 10)
    threaded.call(lambda db: db.execute("INSERT INTO t VALUES (zeroblob(1000000))") and None, seen.append)
    threaded.call(lambda db: db.execute("SELECT count(*) FROM t").fetchone()[0], seen.append)
    wait_until(lambda: len(seen) == 4, 10)
    assert isinstance(seen[2], WhisperdError)
    assert seen[2].code == "storage_full"
    assert seen[3] == 0


def test_a_commit_that_fails_when_the_log_is_gone_is_told(tmp_path: Path) -> None:
    """SQLite says of a full disk what it says of a broken one; where there is no log to try it out on, it is broken."""
    told: list[str] = []
    database = Database(tmp_path / "queue.sqlite3", deliver=lambda call: call(), failed=told.append)
    database.start()

    def fail(db: sqlite3.Connection) -> None:
        tmp_path.joinpath("queue.sqlite3-wal").unlink()
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
        raise error

    database.call(fail, pytest.fail)
    wait_until(lambda: told, 10)
    assert told == ["disk I/O error"]
    database.stop()


def test_the_store_threads_end_is_told_whatever_ends_it(tmp_path: Path) -> None:
    told: list[str] = []
    database = Database(tmp_path / "queue.sqlite3", deliver=lambda call: call(), failed=told.append)
    database.start()

    def done(outcome: object) -> None:
        raise ValueError("nobody thought of this")

    database.call(lambda db: None, done)
    wait_until(lambda: told, 10)
    assert told == ["nobody thought of this"]
    database.stop()
