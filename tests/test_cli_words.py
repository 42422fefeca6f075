"""Words for people: durations, sizes, columns, states, and text that a terminal may see."""

from __future__ import annotations

import json

import pytest

from whisperctl.render import job_table, what_happens
from whisperctl.results import Segment
from whisperctl.watch import LiveText
from whisperctl.words import clock, columns, display_width, duration, plural, safe, shortened, size, to_json
from whisperd.protocol.jobs import Job, JobState, Priority


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"), (0.04, "0 s"), (0.44, "0.4 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min"),
        (61, "1 min 1 s"), (3599.6, "1 h"), (3700, "1 h 1 min"), (86400, "1 day"), (200_000, "2 days 7 h"), (-3, "0 s"),
    ],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1.0 MB"), (1_234_567, "1.2 MB"), (123_456_789, "123 MB"),
        (1_500_000_000, "1.5 GB"), (2_000_000_000_000, "2.0 TB"),
    ],
)  # fmt: skip
def test_sizes(count: float, words: str) -> None:
    assert size(count) == words


def test_places_and_counts() -> None:
    assert [clock(seconds) for seconds in (0, 7.9, 754, 3723)] == ["0:00", "0:07", "12:34", "1:02:03"]
    assert [plural(1, "job"), plural(2, "job"), plural(3, "crash", "crashes")] == ["1 job", "2 jobs", "3 crashes"]


def test_nothing_that_a_terminal_obeys() -> None:
    assert safe("a\x1b[2Jb\x07\x7f\x9b") == r"a\u001b[2Jb\u0007\u007f\u009b"
    assert safe("line\nline\ttab\r") == r"line\nline\ttab\r"
    assert safe("\u202egnp.exe\u2028\ud800") == r"\u202egnp.exe\u2028\ud800"
    assert safe("Ünï 日本 می\u200cخواهم 👩\u200d🚀") == "Ünï 日本 می\u200cخواهم 👩\u200d🚀"
    text = to_json({"name": "a\x9b\u202eä", "text": "x\ny"})
    assert text == '{"name": "a\\u009b\\u202eä", "text": "x\\ny"}'
    assert json.loads(text) == {"name": "a\x9b\u202eä", "text": "x\ny"}


def test_columns_know_wide_letters() -> None:
    assert columns([("日本", "x"), ("ab", "y")]) == ["日本  x", "ab    y"]
    assert columns([("1", "a"), ("10", "b")], right=[0]) == [" 1  a", "10  b"]
    assert (display_width("e\u0301"), display_width("日")) == (1, 2)
    assert shortened("日本語です", 6) == "日本…"
    assert shortened("short", 5) == "short"


@pytest.mark.parametrize(
    ("state", "more", "words"),
    [
        ("pending", {}, "waiting to be downloaded"),
        ("fetching", {"progress": 0.4}, "downloading 40 %"),
        ("queued", {"position": 3}, "waiting, position 3"),
        ("queued", {"phase": "decoding", "position": 1, "progress": 0.5}, "decoding 50 %, position 1"),
        ("running", {"progress": 0.371, "eta_s": 130, "position": 1}, "transcribing 37 %, about 2 min 10 s left"),
        ("running", {"progress": 0.0}, "transcribing"),
        ("running", {"progress": 0.999, "eta_s": 0.01}, "transcribing 100 %, about 1 s left"),
        ("new in a later version", {}, "new in a later version"),
    ],
)
def test_what_a_job_waits_for(state: str, more: dict[str, float], words: str) -> None:
    assert what_happens(state, **more) == words  # type: ignore[arg-type]


def test_the_table_of_jobs() -> None:
    job = Job(
        id=7, state=JobState.RUNNING, priority=Priority.BACKGROUND, uid=0, options={}, submitted_at=100.0, progress=0.5,
        source={"kind": "video", "id": "dQw4w9WgXcQ"},
    )  # fmt: skip
    _, line = job_table([job], colours=False, width=None, now=160.0)
    assert line == "  7  running  background  1 min ago  dQw4w9WgXcQ  transcribing 50 %"
    _, painted = job_table([job], colours=True, width=None, now=160.0)
    assert painted.replace("\x1b[36m", "").replace("\x1b[0m", "") == line


def segments(*texts: str) -> list[Segment]:
    return [Segment(id=index, start=index, end=index + 1, text=text) for index, text in enumerate(texts)]


def test_live_text_shows_each_segment_once() -> None:
    shown: list[str] = []
    live = LiveText(lambda segment: shown.append(segment.text), lambda note: shown.append("note"))
    for segment in segments("a", "b"):
        live.add(segment)
    live.discard()
    for segment in segments("a", "b", "c"):
        live.add(segment)
    live.complete(segments("a", "b", "c", "d"))
    assert shown == ["a", "b", "c", "d"]


def test_live_text_says_when_the_second_attempt_differs() -> None:
    shown: list[str] = []
    live = LiveText(lambda segment: shown.append(segment.text), lambda note: shown.append("note"))
    for segment in segments("a", "b", "c"):
        live.add(segment)
    live.discard()
    for segment in segments("a", "B", "C"):
        live.add(segment)
    assert shown == ["a", "b", "c", "note", "B", "C"]
