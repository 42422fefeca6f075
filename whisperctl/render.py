"""Jobs and stats as people read them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from whisperctl.words import clock, columns, duration, map_in, number, paint, plural, safe, shortened, size

if TYPE_CHECKING:
    from whisperd.protocol.jobs import Job

LIVE_STATES = ("running", "queued", "fetching", "pending")  # what is nearest to its words first
_STATE_COLOURS = {"done": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}
_STATE_WORDS = {
    "pending": "waiting to be downloaded",
    "fetching": "downloading",
    "queued": "waiting",
    "running": "transcribing",
}


def what_happens(
    state: str,
    *,
    phase: str = "",
    progress: float | None = None,
    position: int | None = None,
    eta_s: float | None = None,
) -> str:
    """Return what a job that has not ended is waiting for, such as `transcribing 37 %, about 2 min left`."""
    words = phase or _STATE_WORDS.get(state, state)
    if progress and "%" not in words:
        words += f" {min(progress, 1):.0%}".replace("%", " %")
    parts = [words]
    if position and state != "running":
        parts.append(f"position {position}")
    if eta_s is not None and state in ("running", "fetching", "queued"):
        parts.append(f"about {duration(round(eta_s) or 1)} left")
    return ", ".join(parts)


def how_it_is(job: Job) -> str:
    """Return a job's present in words: what it waits for, or how it ended."""
    match job.state:
        case "done":
            parts = [f"{duration(job.audio_s)} of audio" if job.audio_s else ""]
            if job.started_at is not None and job.ended_at is not None:
                parts.append(f"in {duration(job.ended_at - job.started_at)}")
            return " ".join(filter(None, parts))
        case "failed":
            error = job.error or {}
            return f"{error.get('code', 'internal')}: {error.get('message', 'no reason given')}"
        case "cancelled":
            return ""
    return what_happens(job.state, phase=job.phase, progress=job.progress, position=job.position, eta_s=job.eta_s)


def without_words(gaps: Sequence[tuple[float, float]]) -> str:
    """Return what a transcript's gaps (start and end, in seconds) are to people; three of them are named."""
    places = [f"{clock(start)} to {clock(end)}" for start, end in gaps[:3]]
    if more := len(gaps) - len(places):
        places.append(f"and {plural(more, 'stretch', 'stretches')} more")
    return f"{duration(sum(end - start for start, end in gaps))} of speech have no words: {', '.join(places)}"


def job_table(jobs: Sequence[Job], *, colours: bool, width: int | None, now: float | None = None) -> list[str]:
    """Return lines that show jobs, cut to `width` columns (None: whole)."""
    now = time.time() if now is None else now
    rows = [
        (
            str(job.id),
            str(job.state),
            str(job.priority),
            f"{duration(max(now - job.submitted_at, 0))} ago",
            shortened(safe(source_label(job)), 40),
            safe(how_it_is(job)),
        )
        for job in jobs
    ]
    titles = ("JOB", "STATE", "PRIORITY", "SUBMITTED", "SOURCE", "")
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


def stats_lines(stats: Mapping[str, Any], *, colours: bool) -> list[str]:
    """Return the daemon's counters as a few aligned lines; what it does not tell is left out."""
    rows = [(title, text) for title, text in _stats_rows(stats) if text]
    aligned = columns([(title, "") for title, _ in rows]) if rows else []
    pad = max(map(len, aligned), default=0)
    return [paint(title.ljust(pad), "dim", colours=colours) + "  " + safe(text) for title, text in rows]


def _stats_rows(stats: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    jobs, queue, audio = map_in(stats, "jobs"), map_in(stats, "queue"), map_in(stats, "audio")
    yield "jobs", _counts(map_in(jobs, "total"))
    yield "since start", _counts(map_in(jobs, "since_start"))
    waiting = [f"{number(queue[name])} {name}" for name in ("interactive", "background") if name in queue]
    yield "waiting", ", ".join(waiting) + (f", room for {number(queue['capacity'])}" if "capacity" in queue else "")
    for title, key in (("waited", "wait_s"), ("ran", "run_s")):
        yield title, ", ".join(filter(None, (_spread(name, spread) for name, spread in map_in(stats, key).items())))
    yield (
        "audio",
        _joined(
            (audio, "transcribed_s", lambda s: f"{duration(s)} transcribed"),
            (audio, "speed", lambda x: f"{x:.1f} × real time"),
        ),
    )
    yield from _machine_rows(stats)


def _machine_rows(stats: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    model, lanes, daemon = map_in(stats, "model"), map_in(stats, "lanes"), map_in(stats, "daemon")
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
            (model, "crashes", lambda n: plural(n, "crash", "crashes")),
        ),
    )
    for name, lane in lanes.items():
        if isinstance(lane, Mapping):
            counts = _counts({key: lane[key] for key in ("active", "waiting", "failed") if key in lane})
            until = lane.get("rests_until")
            rest = time.strftime("rests until %H:%M:%S", time.localtime(until)) if until else ""
            yield f"{name} lane", ", ".join(filter(None, (counts, rest)))
    yield "software", _software(map_in(stats, "software"), map_in(lanes, "fetch"))
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


def _software(software: Mapping[str, Any], fetch: Mapping[str, Any]) -> str:
    age_days = fetch.get("yt_dlp_age_days")
    told = (
        ("torch", software.get("torch")),
        ("CUDA", software.get("cuda") if software.get("cuda_devices") else None),
        ("FFmpeg", software.get("ffmpeg")),
        ("yt-dlp", fetch.get("yt_dlp") and f"{fetch['yt_dlp']}" + (f" ({age_days} days old)" if age_days else "")),
    )
    words = [f"{name} {version}" for name, version in told if version]
    return ", ".join([*words, *filter(None, [fetch.get("js_runtime")])])


def _counts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{number(count)} {name}" for name, count in counts.items() if count)


def _spread(name: str, spread: Any) -> str:
    if not isinstance(spread, Mapping) or spread.get("p50") is None:
        return ""
    p95 = f", 95 % within {duration(spread['p95'])}" if spread.get("p95") is not None else ""
    return f"{name}: half within {duration(spread['p50'])}{p95}"


def _joined(*fields: tuple[Mapping[str, Any], str, Any]) -> str:
    return ", ".join(words(values[key]) for values, key, words in fields if isinstance(values.get(key), int | float))


def source_label(job: Job) -> str:
    """Return how people know a job's source: its file name, its id, its address."""
    for key in ("name", "id", "url"):
        if isinstance(value := job.source.get(key), str) and value:
            return value
    return f"job {job.id}"
