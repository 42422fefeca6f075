"""What must be true when the dust has settled: nothing lost, nothing twice, nothing left, the same tokens."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from tests.support import RawClient, wait_until
from torture.book import Book
from torture.clients import submit
from torture.machine import Victim
from torture.report import Report
from whisperd.protocol.errors import ErrorCode, WhisperdError

# How a job may end under kills, memory limits and full disks without anything being lost.
_ALLOWED = {ErrorCode.WORKER_CRASHED, ErrorCode.STORAGE_FULL, ErrorCode.OUT_OF_MEMORY, ErrorCode.TIMED_OUT}
_SETTLE_S = 600.0
# What the state folder holds beside the spool.
_DATABASE = "whisperd.sqlite3"
_STATE_FILES = {_DATABASE, f"{_DATABASE}-wal", f"{_DATABASE}-shm", "whisperd.lock", "ballast", "spool", "downloads"}


def tokens_of(transcript: Mapping[str, Any]) -> list[list[int]]:
    """Return the tokens of each segment."""
    return [list(segment["tokens"]) for segment in transcript["segments"]]


def settle(path: Path, book: Book, report: Report) -> None:
    """Ask again for every submit whose answer got lost: what was committed is found by its key, once there is room."""
    with RawClient(path) as client:
        for request in list(book.unsure.values()):
            report.count("answers that got lost, asked for again by key")
            try:
                submit(client, book, request)
            except WhisperdError as error:
                report.count(f"of those refused ({error.code})")
                report.require(error.code in (ErrorCode.STORAGE_FULL, ErrorCode.NOT_FOUND), f"{request}: {error}")


def judge(path: Path, book: Book, report: Report) -> None:
    """Have every lost answer given again, wait until every job has ended, then look at each."""
    settle(path, book, report)
    with RawClient(path) as client:
        wait_until(lambda: client.call("health")["queue"]["depth"] == 0, _SETTLE_S, "the queue is empty")
        settle(path, book, report)
        listed = {job["id"]: job["state"] for job in _all_jobs(client)}
        for job_id in sorted(book.acknowledged):
            if job_id not in book.forgotten:
                _judge_job(client, job_id, book, report)
        for key, old, new in book.replaced:
            report.require(_may_be_replaced(client, old, book), f"key {key} made job {old} and then job {new}")
        _judge_strangers({job: state for job, state in listed.items() if job not in book.acknowledged}, book, report)


def _judge_strangers(strangers: Mapping[int, str], book: Book, report: Report) -> None:
    """Look at the jobs that nobody has an acknowledgement of.

    A retry whose answer got lost has no key to find its job by. And a job that has failed sets its key free: where the
    answer of its submit got lost, asking again made a new one, and this one stays unknown.
    """
    report.count("retries whose answer got lost", book.unanswered_retries)
    report.count("submits whose answer got lost", book.lost_answers)
    failed = sum(state == "failed" for state in strangers.values())
    excused = book.unanswered_retries + min(failed, book.lost_answers)
    report.require(len(strangers) <= excused, f"jobs that nobody has an acknowledgement of: {dict(strangers)}")


def _all_jobs(client: RawClient) -> Iterator[Mapping[str, Any]]:
    before, more = None, True
    while more:
        page = client.call("jobs", limit=200, before=before)
        yield from page["jobs"]
        more, before = page["more"], page["jobs"][-1]["id"] if page["jobs"] else None


def _judge_job(client: RawClient, job_id: int, book: Book, report: Report) -> None:
    report.count("jobs acknowledged and not forgotten")
    try:
        answer = client.result(job_id, _SETTLE_S)
        events = _events(client, job_id)
    except WhisperdError as error:
        if job_id not in book.may_be_forgotten:
            report.violate(f"job {job_id} is lost: {error}")
        return
    except TimeoutError:
        report.violate(f"job {job_id} does not end: {client.call('result', job=job_id)['job']}")
        return
    job, transcript = answer["job"], answer["transcript"]
    code = (job["error"] or {}).get("code", "")
    report.count(f"ends: {job['state']} {code}".rstrip())
    report.require(job["state"] != "failed" or code in _ALLOWED, f"job {job_id} failed: {job['error']}")
    numbers = [event["seq"] for event in events]
    report.require(numbers == list(range(1, len(numbers) + 1)), f"job {job_id}: its events have the numbers {numbers}")
    ends = [event["state"] for event in events if event["event"] == "end"]
    report.require(ends == [job["state"]], f"job {job_id} is {job['state']} and its ends are {ends}")
    if transcript is not None:
        report.require(
            tokens_of(transcript) == book.tokens[book.recording(job_id)],
            f"job {job_id} has other tokens than undisturbed",
        )
        report.require(
            _told(events) == transcript["segments"], f"job {job_id}: the segments told are not its transcript's"
        )
        resumes = sum(event.get("state") == "queued" and event["seq"] > 1 for event in events)
        if resumes:
            report.count("transcripts with identical tokens after one or more resumes")
            report.count("resumes of those")
            report.counts["resumes of those"] += resumes - 1


def _events(client: RawClient, job_id: int) -> list[dict[str, Any]]:
    number = client.send("subscribe", job=job_id)
    reply = client.reply(number)
    if not reply["ok"]:
        raise WhisperdError(reply["error"]["code"], reply["error"]["message"])
    events: list[dict[str, Any]] = []
    while not events or events[-1]["event"] != "end":
        event = client.receive_until(lambda message: message["id"] == number and "event" in message)
        if "seq" in event:
            events.append(event)
    return events


def _told(events: list[dict[str, Any]]) -> list[Any]:
    """Return the segments that somebody has who heard all events."""
    told: list[Any] = []
    for event in events:
        if event.get("discard"):
            told = []
        if event["event"] == "segment":
            told.append(event["segment"])
    return told


def _may_be_replaced(client: RawClient, job_id: int, book: Book) -> bool:
    if job_id in book.forgotten | book.may_be_forgotten:
        return True
    return bool(client.call("result", job=job_id)["job"]["state"] == "failed")


def judge_remains(victim: Victim, report: Report) -> None:
    """Look at disk and processes after the daemon was stopped."""
    state = victim.daemon.state_dir
    # Opened as a copy: the log is not folded in by who only looks.
    with closing(sqlite3.connect(f"file:{state / _DATABASE}?mode=ro", uri=True)) as db:
        report.require(db.execute("PRAGMA integrity_check").fetchone() == ("ok",), "the database is damaged")
        named = {row[0] for row in db.execute("SELECT folder FROM runs WHERE folder IS NOT NULL")}
    there = {entry.name for entry in (state / "spool").iterdir()}
    report.require(there <= named, f"folders that no row names: {sorted(there - named)[:5]}")
    report.require(named <= there, f"folders that a row names and that are gone: {sorted(named - there)[:5]}")
    files = {entry.name for entry in state.iterdir()}
    report.require(files <= _STATE_FILES, f"files left in the state folder: {sorted(files - _STATE_FILES)}")
    report.count("folders kept for retry", len(there))
    left = [process for process in psutil.process_iter() if _lives_in(process, victim.daemon.folder)]
    report.require(not left, f"processes left: {left}")


def _lives_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.environ().get("HOME") == str(folder)
    except (psutil.Error, OSError):
        return False
