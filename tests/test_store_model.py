"""Store, board and scheduler against a plain-Python queue: any calls in any order, with crashes between and inside.

A crash is what kill -9 leaves: the database's files as they lie on disk at that moment, opened anew. Whatever was not
committed is gone, whatever was is there, and effects that had not happened yet (a folder to delete, an event to push)
are made up for by the restart. Each call is run twice, the first time in vain: a commit may meet a full disk.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.reference_queue import Order, Reference, Refused, Work
from tests.rehearsed.sitecustomize import rehearsed
from whisperd.daemon.scheduler import Turns, pick
from whisperd.daemon.state.board import Board
from whisperd.daemon.store import Retention, Store
from whisperd.daemon.store.database import Database
from whisperd.daemon.store.rows import Change, Event, JobRow, NewJob, RunRow, pack
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.jobs import ENDED, WAITING, JobState, Priority
from whisperd.protocol.options import parse_options

OPTIONS = parse_options({})
RETENTION = {"jobs_s": 1000.0, "keys_s": 1000.0, "failed_audio_s": 300.0}
SIZE_BYTES = 100
CAPACITY = 3

users = st.integers(1, 2)
priorities = st.sampled_from(Priority)
recordings = st.sampled_from(["talk", "song"])
addresses = st.sampled_from(["a", "b"])
keys = st.none() | st.sampled_from(["k1", "k2"])
# Drawn at random, a chain of steps that need each other is rare: "get on" is decoding, starting and speaking at once.
STEPS = [
    "begin a download",
    "end a download",
    "end a download badly",
    "end a download by no fault of its own",
    "decode",
    "start",
    "say",
    "get on",
    "get on",
    "get on",
    "get on",
    "finish",
    "fail",
    "lose the model",
    "unload the model",
    "lose a helper",
    "take another model",
    "find the journal unusable",
    "count a death",
]
numbers = st.integers(0, 50)  # one of what there is, counted around


class Queue(RuleBasedStateMachine):
    """The daemon's own order of things: commit, apply to the board, delete folders, tell events."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(Retention(**RETENTION))
        self.reference = Reference(**RETENTION, size_bytes=SIZE_BYTES)
        self.root = Path(tempfile.mkdtemp(prefix="queue-"))
        self.board = Board(Turns(16))
        self.disk: set[str] = set()
        self.told: dict[int, list[Event]] = {}
        self.folders = self.crashes = 0
        self.served: list[tuple[Priority, int]] = []
        self.model = "small"
        self.database = self.open(self.root / "0")

    def teardown(self) -> None:
        self.database.connection.close()
        shutil.rmtree(self.root)

    # --- the two sides ---

    def open(self, folder: Path) -> Database:
        folder.mkdir(exist_ok=True)
        database = Database(folder / "queue.sqlite3", deliver=lambda call: call(), failed=pytest.fail)
        database.connection.execute("PRAGMA synchronous = OFF")  # a crash of ours keeps the page cache
        return database

    def both(self, wanted: Callable[[], Any], call: Callable[[sqlite3.Connection], Change]) -> Change | None:
        """Do it on both sides: the same error, or the effects of the change."""
        change = self.commit(wanted, call)
        if change is not None:
            self.take_effect(change)
        return change

    def commit(self, wanted: Callable[[], Any], call: Callable[[sqlite3.Connection], Change]) -> Change | None:
        refused = ""
        try:
            wanted()
        except Refused as error:
            refused = error.code
        try:
            change: Change = self.database.run(rehearsed(call))
        except WhisperdError as error:
            assert error.code == refused
            return None
        assert not refused, f"it should have been refused: {refused}"
        return change

    def take_effect(self, change: Change) -> None:
        self.board.apply(change)
        for folder in change.folders:
            self.disk.remove(folder)  # KeyError: told twice, or never made
        new = {event.job_id for event in change.events} - set(self.told)
        for event in change.events:
            self.told.setdefault(event.job_id, []).append(event)
        for job_id in new:
            # Nobody follows a job before he has its id: who then asks reads what its run has said until now.
            past = self.events(job_id)
            assert self.told[job_id] == [event for event in past if event.kind != "segment"]
            self.told[job_id] = past
        for job_id in change.gone_jobs:
            del self.told[job_id]

    def restart(self, copy_from: Path) -> None:
        """Start on what a killed daemon left."""
        self.crashes += 1
        folder = self.root / str(self.crashes)
        shutil.copytree(copy_from, folder)
        self.database.connection.close()
        shutil.rmtree(copy_from)
        self.database = self.open(folder)
        live, named = self.database.run(rehearsed(lambda db: self.store.recover(db, self.now)))
        self.reference.restart()
        self.disk &= named  # the sweep
        self.board, self.served = Board(Turns(16)), []
        self.board.apply(live)
        for job_id in self.reference.jobs:
            past = self.told.setdefault(job_id, [])
            past += self.events(job_id, after_seq=len(past))  # as a subscriber asks who comes back
        self.told = {job_id: past for job_id, past in self.told.items() if job_id in self.reference.jobs}

    @property
    def now(self) -> float:
        return self.reference.now

    @property
    def here(self) -> Path:
        return self.database.path.parent

    def new_folder(self) -> str:
        self.folders += 1
        folder = f"folder-{self.folders}"
        self.disk.add(folder)
        return folder

    def events(self, job_id: int, after_seq: int = 0) -> list[Event]:
        events: list[Event] = self.database.run(
            lambda db: self.store.events(db, job_id, after_seq=after_seq, limit=10_000)
        )
        return events

    # --- which one ---

    def some_job(self, number: int) -> tuple[int, int]:
        """Return a job's id, perhaps of one that is gone, and its user."""
        job_id = number % self.reference.last_job + 1
        job = self.reference.jobs.get(job_id)
        return job_id, job.uid if job else 1

    def some_run(self, number: int, *states: JobState) -> Work | None:
        found = [work for work in self.reference.runs.values() if work.state in states]
        return found[number % len(found)] if found else None

    @property
    def any_job(self) -> bool:
        return self.reference.last_job > 0

    # --- users ---

    @rule(uid=users, priority=priorities, audio=recordings, key=keys, fresh=st.booleans())
    def submit(self, uid: int, priority: Priority, audio: str, key: str | None, fresh: bool) -> None:
        self.hand_in(uid, audio, priority, key, fresh)

    def hand_in(
        self,
        uid: int,
        audio: str,
        priority: Priority = Priority.BACKGROUND,
        key: str | None = None,
        fresh: bool = False,
    ) -> Change | None:
        folder = self.new_folder()
        new = file_job(uid, priority, audio, key, fresh, folder)
        change = self.both(
            lambda: self.reference.submit(uid, priority, audio=audio, folder=folder, key=key, fresh=fresh),
            lambda db: self.store.accept(db, new, self.now),
        )
        if change is None:
            self.disk.remove(folder)  # the caller's own part of a refusal
        return change

    @rule(uid=users, priority=priorities, address=addresses, key=keys, fresh=st.booleans())
    def submit_address(self, uid: int, priority: Priority, address: str, key: str | None, fresh: bool) -> None:
        self.ask_for(uid, address, priority, key, fresh)

    def ask_for(
        self,
        uid: int,
        address: str,
        priority: Priority = Priority.BACKGROUND,
        key: str | None = None,
        fresh: bool = False,
    ) -> None:
        new = fetch_job(uid, priority, address, key, fresh)
        self.both(
            lambda: self.reference.submit(uid, priority, address=address, key=key, fresh=fresh),
            lambda db: self.store.accept(db, new, self.now),
        )

    @precondition(lambda self: self.any_job)
    @rule(what=st.sampled_from(["cancel", "retry", "forget", "cancel a stranger's"]), number=numbers)
    def user(self, what: str, number: int) -> None:
        job_id, uid = self.some_job(number)
        match what:
            case "cancel":
                self.cancel(job_id, uid)
            case "cancel a stranger's":
                self.cancel(job_id, uid + 10)
            case "retry":
                self.retry(job_id, uid)
            case "forget":
                self.both(lambda: self.reference.forget(job_id, uid), lambda db: self.store.forget(db, job_id, uid=uid))

    def retry(self, job_id: int, uid: int) -> None:
        self.both(
            lambda: self.reference.retry(job_id, uid),
            lambda db: self.store.retry(db, job_id, self.now, uid=uid, model_key=work_key),
        )

    def cancel(self, job_id: int, uid: int) -> None:
        self.both(
            lambda: self.reference.cancel(job_id, uid), lambda db: self.store.cancel(db, job_id, self.now, uid=uid)
        )

    # Drawn step by step, these chains would be rare.

    @rule(uid=users, file_first=st.booleans())
    def a_file_and_its_download_fail_and_are_tried_again(self, uid: int, file_first: bool) -> None:
        """Whichever comes first, the other joins its run."""
        audio = f"recording-{self.reference.last_job}"
        if file_first:
            self.hand_in(uid, audio)
        self.ask_for(uid, f"of {audio}")
        work = self.last_work()
        self.begin_download_of(work)
        self.both(lambda: self.reference.fetched(work, audio), lambda db: self.fetched(db, work, audio))
        if not file_first:
            self.hand_in(uid, audio)
        self.fail_work(self.last_work())
        last = self.reference.last_job
        for job_id in (last - 1, last):
            self.retry(job_id, uid)

    @rule(uid=users, key=st.sampled_from(["k1", "k2"]))
    def a_job_fails_and_is_past_its_retention_before_its_key_is_used_again(self, uid: int, key: str) -> None:
        audio = f"recording-{self.reference.last_job}"
        change = self.hand_in(uid, audio, key=key)
        if change is not None and not change.reused:
            self.fail_work(self.last_work())
            self.pass_time(RETENTION["jobs_s"] + 1)
            self.hand_in(uid, audio, key=key)

    def last_work(self) -> Work:
        return self.reference.jobs[self.reference.last_job].work

    # --- the lanes ---

    @rule(steps=st.lists(st.sampled_from(STEPS), min_size=3, max_size=12), number=numbers)
    def lanes(self, steps: list[str], number: int) -> None:
        """One rule for all that the lanes do: each needs another before it, and rules are switched off at random."""
        for step in steps:
            match step:
                case "begin a download":
                    self.begin_download(number)
                case "end a download" | "end a download badly" | "end a download by no fault of its own":
                    self.end_download(number, "talk" if number % 2 else "song", step.removeprefix("end a download"))
                case "decode":
                    self.decode(number)
                case "start":
                    self.pump()
                case "say":
                    self.say(number, ["one", "two"][: number % 3], [b"a", b"b"][: number % 2 + 1])
                case "get on":
                    for each in range(len(self.reference.runs)):
                        self.decode(each)
                    self.pump()
                    self.say(number, ["one"], [b"a"])
                case "finish":
                    self.finish(number)
                case "fail":
                    self.fail(number)
                case "lose the model" | "unload the model":
                    self.lose_the_model(suspect=step == "lose the model")
                case "take another model":
                    self.model = "large" if number % 2 else "small"
                case "find the journal unusable":
                    self.find_the_journal_unusable(number)
                case "count a death":
                    self.condemn(number)
                case "lose a helper":
                    self.lose_a_helper(number)

    def begin_download(self, number: int) -> None:
        if (work := self.some_run(number, JobState.PENDING)) is not None:
            self.begin_download_of(work)

    def begin_download_of(self, work: Work) -> None:
        folder = self.new_folder()
        self.both(
            lambda: self.reference.fetch_started(work, folder),
            lambda db: self.store.fetch_started(db, work.id, folder, self.now),
        )

    def end_download(self, number: int, audio: str, ends: str) -> None:
        work = self.some_run(number, JobState.FETCHING, JobState.CANCELLED)
        if work is None:
            return
        if not ends:
            self.both(lambda: self.reference.fetched(work, audio), lambda db: self.fetched(db, work, audio))
            return
        counts = ends == " badly"
        error = WhisperdError("fetch_failed", "no")
        self.both(
            lambda: self.reference.fetch_failed(work, counts=counts),
            lambda db: self.store.fetch_failed(db, work.id, error, self.now, counts=counts),
        )

    def fetched(self, db: sqlite3.Connection, work: Work, audio: str) -> Change:
        return self.store.fetched(
            db,
            work.id,
            self.now,
            sha256=audio,
            size_bytes=SIZE_BYTES,
            title=None,
            share_key=key_of(work.uid, audio),
        )

    def decode(self, number: int) -> None:
        if (work := self.some_run(number, JobState.QUEUED, JobState.FAILED)) is not None:
            self.both(
                lambda: self.reference.decoded(work, 2.5),
                lambda db: self.store.decoded(db, work.id, audio_s=2.5, truncated=False),
            )

    def pump(self) -> None:
        """Start all that may start: who is next, the scheduler says, and the reference must agree."""
        while self.start_next():
            pass

    def start_next(self) -> bool:
        wanted = self.next_by_hand()
        waiting = self.board.to_transcribe.heads(Priority, lambda run_id: True)
        busy = Counter({Priority.INTERACTIVE: 0, Priority.BACKGROUND: 0})
        busy.update(self.priority(work) for work in self.running())
        chosen = pick(waiting, self.board.turns, capacity=CAPACITY, busy=busy)
        assert (chosen.id if chosen else None) == (wanted.id if wanted else None)
        if chosen is None or wanted is None:
            return False
        self.board.served(chosen.id)
        self.served.append((self.priority(wanted), wanted.uid))
        model = self.model
        self.both(
            lambda: self.reference.start(wanted, model), lambda db: self.store.start(db, wanted.id, self.now, model)
        )
        return True

    def say(self, number: int, texts: list[str], answers: list[bytes]) -> None:
        if (work := self.some_run(number, JobState.RUNNING) or self.some_run(number, JobState.CANCELLED)) is not None:
            segments = [{"text": text} for text in texts]
            self.both(
                lambda: self.reference.say(work, texts, answers),
                lambda db: self.store.add_segments(db, work.id, segments, entries=answers),
            )

    def find_the_journal_unusable(self, number: int) -> None:
        if (work := self.some_run(number, JobState.RUNNING, JobState.QUEUED)) is not None:
            self.both(lambda: self.reference.void_journal(work), lambda db: self.store.void_journal(db, work.id))

    def condemn(self, number: int) -> None:
        if (work := self.some_run(number, JobState.QUEUED, JobState.CANCELLED)) is not None:
            self.both(
                lambda: self.reference.count_death(work), lambda db: self.store.count_death(db, work.id, self.now)
            )

    def finish(self, number: int) -> None:
        if (work := self.some_run(number, JobState.RUNNING, JobState.CANCELLED)) is not None:
            transcript = pack({"text": " ".join(work.said)})
            self.both(
                lambda: self.reference.finish(work), lambda db: self.store.finish(db, work.id, transcript, self.now)
            )

    def fail(self, number: int) -> None:
        if (work := self.some_run(number, JobState.QUEUED, JobState.RUNNING, JobState.DONE)) is not None:
            self.fail_work(work)

    def fail_work(self, work: Work) -> None:
        error = WhisperdError("bad_audio", "no")
        self.both(
            lambda: self.reference.fail(work, "bad_audio"),
            lambda db: self.store.fail(db, work.id, error, self.now),
        )

    def lose_the_model(self, *, suspect: bool) -> None:
        """All that it worked on goes back to the queue."""
        for work in self.running():
            self.lose(work, suspect=suspect)

    def lose_a_helper(self, number: int) -> None:
        if (work := self.some_run(number, JobState.FETCHING, JobState.DONE)) is not None:
            self.lose(work, died=True)

    def lose(self, work: Work, *, died: bool = False, suspect: bool = False) -> None:
        self.both(
            lambda: self.reference.put_back(work, died=died),
            lambda db: self.store.put_back(db, work.id, self.now, died=died, suspect=suspect),
        )

    # --- time and accidents ---

    @rule(seconds=st.sampled_from([10.0, 400.0, 1100.0]))
    def wait(self, seconds: float) -> None:
        self.pass_time(seconds)

    def pass_time(self, seconds: float) -> None:
        self.reference.now += seconds
        self.both(self.reference.housekeep, lambda db: self.store.housekeep(db, self.now))

    @rule()
    def crash(self) -> None:
        self.restart(self.here)

    @rule(uid=users, audio=recordings)
    def crash_inside_a_submit(self, uid: int, audio: str) -> None:
        """Nothing was acknowledged, and nothing is there."""
        new = file_job(uid, Priority.BACKGROUND, audio, "k1", False, self.new_folder())
        db = self.database.connection
        db.execute("BEGIN IMMEDIATE")
        with contextlib.suppress(WhisperdError):
            self.store.accept(db, new, self.now)
        self.restart(self.here)

    @rule(number=numbers, uid=users, audio=recordings)
    def crash_before_the_effects(self, number: int, uid: int, audio: str) -> None:
        """Committed, but no folder was deleted, no event pushed and no reply sent."""
        folder = self.new_folder()
        new = file_job(uid, Priority.BACKGROUND, audio, None, False, folder)
        self.commit(
            lambda: self.reference.submit(uid, Priority.BACKGROUND, audio=audio, folder=folder),
            lambda db: self.store.accept(db, new, self.now),
        )
        job_id, owner = self.some_job(number)
        self.commit(
            lambda: self.reference.cancel(job_id, owner),
            lambda db: self.store.cancel(db, job_id, self.now, uid=owner),
        )
        self.restart(self.here)

    # --- who is next, by hand ---

    def running(self) -> list[Work]:
        return [work for work in self.reference.runs.values() if work.state is JobState.RUNNING]

    def priority(self, work: Work) -> Priority:
        kinds = {job.priority for job in self.reference.holders(work)}
        return Priority.INTERACTIVE if Priority.INTERACTIVE in kinds else Priority.BACKGROUND

    def next_by_hand(self) -> Work | None:
        ready = [
            work
            for work in self.reference.runs.values()
            if work.state is JobState.QUEUED and work.decoded_s is not None
        ]
        kinds = [self.priority(work) for work in self.running()]
        free, background = CAPACITY - len(kinds), kinds.count(Priority.BACKGROUND)
        urgent = [work for work in ready if self.priority(work) is Priority.INTERACTIVE]
        others = [work for work in ready if work not in urgent]
        kept_for_background = bool(others) and background == 0
        if urgent and free > kept_for_background:
            return min(urgent, key=self.turn)
        return min(others, key=self.turn) if others and free and background < CAPACITY - 1 else None

    def turn(self, work: Work) -> tuple[int, int]:
        """The user served longest ago, with his oldest run; of those never served, who has the oldest."""
        place = (self.priority(work), work.uid)
        last = max((index for index, served in enumerate(self.served, start=1) if served == place), default=0)
        return last, work.id

    # --- what holds at any time ---

    @invariant()
    def jobs_are_what_they_must_be(self) -> None:
        rows = self.database.run(lambda db: self.store.jobs(db, uid=None, state=None, before=None, limit=10_000))
        assert {job.id for job, _ in rows} == set(self.reference.jobs)
        for row, run in rows:
            job = self.reference.jobs[row.id]
            assert (row.state, row.run_id, row.uid, row.priority) == (job.state, job.work.id, job.uid, job.priority)
            assert (row.error_code, row.ended_at, run.state) == (job.error, job.ended_at, job.work.state)
        assert self.database.run(self.store.totals) == Counter(str(job.state) for job in self.reference.jobs.values())

    @invariant()
    def events_have_no_gap_and_tell_what_happened(self) -> None:
        for job in self.reference.jobs.values():
            events = self.events(job.id)
            assert events == self.told[job.id], "who follows live and who reads later see the same"
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            assert [in_words(event) for event in events] == job.story
            assert [event.kind for event in events].count("end") == job.ended, "one end, once it has ended"

    @invariant()
    def each_folder_is_named_once_and_none_is_left(self) -> None:
        named = self.database.run(
            lambda db: sorted(row[0] for row in db.execute("SELECT folder FROM runs WHERE folder IS NOT NULL"))
        )
        assert named == self.reference.folders()
        assert sorted(self.disk) == named
        for uid in (1, 2):
            assert self.database.run(lambda db, uid=uid: self.store.spool_bytes(db, uid)) == pytest.approx(
                self.reference.spool_bytes(uid)
            )

    @invariant()
    def journals_are_kept_for_as_long_as_their_runs_live(self) -> None:
        rows = self.database.run(lambda db: db.execute("SELECT run_id, entry FROM journal ORDER BY id").fetchall())
        wanted = [(work.id, entry) for work in self.reference.runs.values() for entry in work.answers]
        assert sorted(rows, key=lambda row: row[0]) == sorted(wanted, key=lambda row: row[0])

    @invariant()
    def the_board_is_the_disk(self) -> None:
        live, _ = self.database.run(lambda db: (self.live_rows(db), None))
        assert {run_id: run.row for run_id, run in self.board.runs.items()} == live
        wanted = {job.id for job in self.reference.jobs.values() if not job.ended}
        assert set(self.board.jobs) == wanted
        for job_id, row in self.board.jobs.items():
            assert row == self.database.run(lambda db, job_id=job_id: self.store.job(db, job_id, uid=None))
        places = [self.board.position(run_id) for run_id, run in live.items() if run.state in WAITING]
        assert sorted(place for place in places if place is not None) == list(range(1, len(places) + 1))
        assert self.board.fetched_bytes == sum(
            run.size_bytes for run in live.values() if run.state is JobState.QUEUED and run.source is not None
        )
        lines = {
            JobState.PENDING: self.board.to_fetch,
            JobState.FETCHING: self.board.fetching,
            False: self.board.to_decode,
            True: self.board.to_transcribe,
        }
        for stage, line in lines.items():
            assert set(line) == {
                run.id for run in live.values() if stage is (run.decoded if run.state is JobState.QUEUED else run.state)
            }

    def live_rows(self, db: sqlite3.Connection) -> dict[int, RunRow]:
        rows = self.store.jobs(db, uid=None, state=None, before=None, limit=10_000)
        return {run.id: run for _, run in rows if run.state not in ENDED}

    @invariant()
    def whoever_is_done_has_the_words_that_were_said(self) -> None:
        for job in self.reference.jobs.values():
            answer = self.database.run(lambda db, job=job: self.store.answer(db, job.id, uid=job.uid))
            assert answer.transcript == (pack({"text": " ".join(job.work.said)}) if is_done(job) else None)


def is_done(job: Order) -> bool:
    return job.state is JobState.DONE


def in_words(event: Event) -> str:
    if event.kind == "segment":
        return str(event.payload["segment"]["text"])
    return str(event.payload["state"]) + ("!" if event.payload.get("discard") else "")


def key_of(uid: int, what: str) -> bytes:
    return f"{uid}:{what}".encode()


def work_key(job: JobRow, run: RunRow) -> bytes:
    return key_of(job.uid, f"at {job.source['url']}" if job.is_download else run.sha256)


def file_job(uid: int, priority: Priority, audio: str, key: str | None, fresh: bool, folder: str) -> NewJob:
    return NewJob(
        uid=uid,
        priority=priority,
        attached=False,
        key=key,
        source={"kind": "fd", "name": audio},
        options=OPTIONS,
        fresh=fresh,
        fingerprint=audio.encode(),
        share_key=key_of(uid, audio),
        folder=folder,
        sha256=audio,
        size_bytes=SIZE_BYTES,
    )


def fetch_job(uid: int, priority: Priority, address: str, key: str | None, fresh: bool) -> NewJob:
    return NewJob(
        uid=uid,
        priority=priority,
        attached=False,
        key=key,
        source={"kind": "url", "url": address},
        options=OPTIONS,
        fresh=fresh,
        fingerprint=f"at {address}".encode(),
        share_key=key_of(uid, f"at {address}"),
        folder=None,
        sha256="",
        size_bytes=0,
        source_key=key_of(uid, f"at {address}"),
    )


def test_any_calls_in_any_order_are_what_a_plain_queue_does() -> None:
    walks = settings(
        max_examples=40,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    run_state_machine_as_test(Queue, settings=walks)
