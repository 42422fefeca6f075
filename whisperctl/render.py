"""Words for people: durations, sizes, jobs, health and stats, and nothing that a terminal would obey."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from whisperctl.arguments import source_label
from whisperd.protocol.jobs import Job, JobState

# C0, DEL and C1 controls; marks that turn the direction of text; line and paragraph separators; lone surrogates.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")
_COLOURS = {"red": "31", "green": "32", "yellow": "33", "cyan": "36", "dim": "2", "bold": "1"}
_STATE_COLOURS = {"done": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}
_HEALTH_COLOURS = {"ready": "green", "degraded": "red", "paused": "yellow"}


def safe(text: object) -> str:
    """Return `text` with everything a terminal would obey made visible: names and texts come from strangers."""
    return _UNSAFE.sub(lambda match: _visible(match[0]), str(text))


def _visible(character: str) -> str:
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character) or f"\\u{ord(character):04x}"


def paint(text: str, colour: str | None, *, colours: bool) -> str:
    """Return `text` in a colour, or as it is where colours are off."""
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if colours and colour else text


def duration(seconds: float) -> str:
    """Return seconds as people say them: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`, `3 days 4 h`."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s".replace(".0 ", " ")
    whole = round(seconds)
    for size, unit, part_size, part_unit in ((86400, "day", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            count, rest = divmod(whole, size)
            name = unit + "s" if unit == "day" and count > 1 else unit
            parts = rest // part_size
            return f"{count} {name} {parts} {part_unit}" if parts else f"{count} {name}"
    return f"{whole} s"


def clock(seconds: float) -> str:
    """Return a place in a recording: `0:07`, `12:34`, `1:02:03`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def size(count: float) -> str:
    """Return bytes as people say them: `900 B`, `12 kB`, `3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.1f} {unit}" if unit in ("MB", "GB") and count < 99.95 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: Any) -> str:
    """Return a number with thousands marked, `-` for none."""
    if not isinstance(value, int | float):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def plural(count: int, word: str) -> str:
    """Return `1 job`, `2 jobs`."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def what_happens(
    state: JobState,
    *,
    phase: str = "",
    progress: float | None = None,
    position: int | None = None,
    eta_s: float | None = None,
) -> str:
    """Return what a job that has not ended is waiting for, such as `transcribing 37 %, about 2 min left`."""
    words = {
        JobState.PENDING: "waiting to be downloaded",
        JobState.FETCHING: "downloading",
        JobState.QUEUED: "waiting",
        JobState.RUNNING: "transcribing",
    }.get(state, str(state))
    words = phase or words
    if progress and "%" not in words:
        words += f" {min(progress, 1):.0%}".replace("%", " %")
    parts = [words]
    if position and state is not JobState.RUNNING:
        parts.append(f"position {position}")
    if eta_s is not None and state in (JobState.RUNNING, JobState.FETCHING, JobState.QUEUED):
        parts.append(f"about {duration(round(eta_s) or 1)} left")
    return ", ".join(parts)


def how_it_is(job: Job) -> str:
    """Return a job's present in words: what it waits for, or how it ended."""
    match job.state:
        case JobState.DONE:
            parts = [f"{duration(job.audio_s)} of audio" if job.audio_s else ""]
            if job.started_at is not None and job.ended_at is not None:
                parts.append(f"in {duration(job.ended_at - job.started_at)}")
            return " ".join(filter(None, parts))
        case JobState.FAILED:
            error = job.error or {}
            return f"{error.get('code', 'internal')}: {error.get('message', 'no reason given')}"
        case JobState.CANCELLED:
            return ""
    return what_happens(job.state, phase=job.phase, progress=job.progress, position=job.position, eta_s=job.eta_s)


def job_table(jobs: Sequence[Job], *, colours: bool, width: int | None, now: float | None = None) -> list[str]:
    """Return lines that show jobs, cut to `width` columns (None: whole)."""
    now = time.time() if now is None else now
    rows = [
        (
            str(job.id),
            str(job.state),
            "now" if job.priority == "interactive" else "later",
            f"{duration(max(now - job.submitted_at, 0))} ago",
            shortened(safe(source_label(job)), 40),
            safe(how_it_is(job)),
        )
        for job in jobs
    ]
    titles = ("JOB", "STATE", "WHEN", "SUBMITTED", "SOURCE", "")
    lines = columns([titles, *rows], right=(0,))
    if width:
        lines = [shortened(line, width) for line in lines]
    head, *body = lines

    def painted(line: str, state: str) -> str:
        return line.replace(f" {state} ", f" {paint(state, _STATE_COLOURS.get(state), colours=colours)} ", 1)

    return [
        paint(head, "dim", colours=colours),
        *(painted(line, job.state) for line, job in zip(body, jobs, strict=True)),
    ]


def columns(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> list[str]:
    """Return rows with their cells aligned; the cells of the columns in `right` stand at their right edge."""
    widths = [max(display_width(row[index]) for row in rows) for index in range(len(rows[0]))]
    rights = set(right)

    def cell(text: str, index: int) -> str:
        gap = " " * (widths[index] - display_width(text))
        return gap + text if index in rights else text + gap

    return ["  ".join(cell(text, index) for index, text in enumerate(row)).rstrip() for row in rows]


def display_width(text: str) -> int:
    """Return how many columns `text` takes: East Asian wide characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text
    )


def shortened(text: str, width: int) -> str:
    """Return `text` in at most `width` columns, with `…` where it was cut."""
    if display_width(text) <= width:
        return text
    while text and display_width(text) > width - 1:
        text = text[:-1] if len(text) <= width else text[:width]
    return text + "…"


def model_words(model: Mapping[str, Any]) -> str:
    """Return `model small on cuda:0 (float16)`, or what keeps it from that."""
    name, state = safe(model.get("name", "?")), str(model.get("state", "?"))
    if state == "ready":
        dtype = f" ({safe(model['dtype'])})" if model.get("dtype") else ""
        return f"model {name} on {safe(model.get('device', '?'))}{dtype}"
    words = {"unloaded": "not loaded", "failed": "failed to load"}.get(state, safe(state))
    return f"model {name} {words}"


def health_lines(health: Mapping[str, Any], *, colours: bool) -> list[str]:
    """Return the daemon's health: a line, and one for each problem."""
    status = str(health.get("status", "?"))
    queue = health.get("queue") or {}
    parts = [
        paint(safe(status), _HEALTH_COLOURS.get(status), colours=colours),
        model_words(health.get("model") or {}),
        f"{number(queue.get('depth'))} of {number(queue.get('capacity'))} waiting",
        f"up {duration(health.get('uptime_s') or 0)}",
        f"version {safe(health.get('version', '?'))}",
    ]
    problems = [safe(problem) for problem in health.get("problems") or []]
    error = (health.get("model") or {}).get("error")
    if error and not any(safe(error) in problem for problem in problems):
        problems.append(safe(error))
    return [" · ".join(parts), *(paint("problem: ", "red", colours=colours) + problem for problem in problems)]


def stats_lines(stats: Mapping[str, Any], *, colours: bool) -> list[str]:
    """Return the daemon's counters as a few aligned lines; what it does not tell is left out."""
    rows = [(title, text) for title, text in _stats_rows(stats) if text]
    aligned = columns([(title, "") for title, _ in rows]) if rows else []
    pad = max(map(len, aligned), default=0)
    return [paint(title.ljust(pad), "dim", colours=colours) + "  " + safe(text) for title, text in rows]


def _stats_rows(stats: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    jobs, queue, audio = _map(stats, "jobs"), _map(stats, "queue"), _map(stats, "audio")
    yield "jobs", _counts(_map(jobs, "total"))
    yield "since start", _counts(_map(jobs, "since_start"))
    waiting = [f"{number(queue[name])} {name}" for name in ("interactive", "background") if name in queue]
    yield "waiting", ", ".join(waiting) + (f", room for {number(queue['capacity'])}" if "capacity" in queue else "")
    for title, key in (("waited", "wait_s"), ("ran", "run_s")):
        yield title, ", ".join(filter(None, (_spread(name, spread) for name, spread in _map(stats, key).items())))
    yield (
        "audio",
        _joined(
            (audio, "transcribed_s", lambda s: f"{duration(s)} transcribed"),
            (audio, "speed", lambda x: f"{x:.1f} × real time"),
        ),
    )
    yield from _machine_rows(stats)


def _machine_rows(stats: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    model, lanes, daemon = _map(stats, "model"), _map(stats, "lanes"), _map(stats, "daemon")
    yield (
        "model",
        _joined(
            (model, "windows", lambda n: f"{number(n)} windows"),
            (model, "windows_per_s", lambda n: f"{n:.2f} windows/s"),
            (model, "tokens_per_s", lambda n: f"{n:.0f} tokens/s"),
            (model, "batch_occupancy", lambda n: f"batches {n:.0%} full"),
        ),
    )
    yield (
        "model process",
        _joined(
            (model, "pid", lambda n: f"pid {n}"),
            (model, "rss_bytes", size),
            (model, "device_used_bytes", lambda n: f"{size(n)} on the device"),
            (model, "device_total_bytes", lambda n: f"of {size(n)}"),
            (model, "starts", lambda n: plural(n, "start")),
            (model, "crashes", lambda n: plural(n, "crash").replace("crashs", "crashes")),
        ),
    )
    for name, lane in lanes.items():
        if isinstance(lane, Mapping):
            yield f"{name} lane", _counts(lane)
    yield (
        "store",
        _joined(
            (stats, "spool_bytes", lambda n: f"spool {size(n)}"),
            (stats, "database_bytes", lambda n: f"database {size(n)}"),
            (stats, "cache_hits", lambda n: f"{number(n)} answered from it"),
        ),
    )
    yield (
        "daemon",
        _joined(
            (daemon, "pid", lambda n: f"pid {n}"),
            (daemon, "rss_bytes", size),
            (daemon, "cpu_s", lambda s: f"{duration(s)} of CPU"),
            (daemon, "uptime_s", lambda s: f"up {duration(s)}"),
            (stats, "connections", lambda n: plural(n, "connection")),
        ),
    )


def _map(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    return value if isinstance(value, Mapping) else {}


def _counts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{number(count)} {name}" for name, count in counts.items() if count)


def _spread(name: str, spread: Any) -> str:
    if not isinstance(spread, Mapping) or spread.get("p50") is None:
        return ""
    p95 = f", 95 % within {duration(spread['p95'])}" if spread.get("p95") is not None else ""
    return f"{name}: half within {duration(spread['p50'])}{p95}"


def _joined(*fields: tuple[Mapping[str, Any], str, Any]) -> str:
    return ", ".join(words(values[key]) for values, key, words in fields if isinstance(values.get(key), int | float))
