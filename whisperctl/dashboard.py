"""The screen of `stats --watch`. The only importer of rich."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import IO, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from whisperctl.history import SPAN_S, History, Snapshot
from whisperctl.plot import plot
from whisperctl.render import how_it_is, source_label
from whisperctl.words import duration, map_in, model_words, number, plural, safe, shortened, size
from whisperd.protocol.jobs import Job

_PLOT_LINES = 3
_FIXED_LINES = 20  # all but problems and further jobs
_STATUS_STYLES = {"ready": "bold green", "degraded": "bold red", "paused": "bold yellow"}
_LANES = {"copy": (), "fetch": ("fetching",), "decode": ("queued",), "model": ("running",)}
_DIM = "dim"
_FIGURE_TITLE = 6


class Dashboard:
    """Draws over the whole terminal while the block runs, and gives it back as it was."""

    def __init__(
        self,
        *,
        colours: bool,
        file: IO[str] | None = None,
        clock: Callable[[], str] = lambda: time.strftime("%H:%M:%S"),
    ) -> None:
        self._console = Console(file=file, no_color=not colours, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, screen=True, auto_refresh=False)
        self._clock = clock
        self._history: History | None = None

    def show(self, history: History) -> None:
        """Draw the newest snapshot."""
        self._history = history
        self._draw(gone=False)

    def gone(self) -> None:
        """Keep what was last seen, and say that it is old."""
        self._draw(gone=True)

    def _draw(self, *, gone: bool) -> None:
        assert self._history is not None, "the first look comes before the first trouble"
        width, height = self._console.size
        self._live.update(picture(self._history, width, height, now=self._clock(), gone=gone), refresh=True)

    def __enter__(self) -> Self:
        # Ended from elsewhere, it gives the terminal back too.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, traceback)


def picture(history: History, width: int, height: int, *, now: str, gone: bool) -> RenderableType:
    """Return the whole screen, at most `width` columns and (problems aside) `height` lines."""
    last = history.last
    problems = [Text(f"! {safe(problem)}", "red", no_wrap=True, overflow="ellipsis") for problem in _problems(last)]
    jobs_room = max(0, height - _FIXED_LINES - len(problems))
    return Group(
        _headline(last, now, gone=gone),
        *problems[:3],
        _title("waiting"),
        _queue(last, width),
        _title("now"),
        _lanes(last, width, jobs_room),
        _title(f"the last {duration(SPAN_S)}"),
        _plots(history, width),
        _title("figures"),
        _figures(history, width),
    )


def _title(words: str) -> Rule:
    return Rule(Text(words, "cyan"), align="left", style=_DIM)


def _headline(last: Snapshot, now: str, *, gone: bool) -> Table:
    health = last.health
    status = "gone away; waiting for it to come back" if gone else str(health.get("status", "?"))
    words = Text(no_wrap=True, overflow="ellipsis")
    words.append("whisperd ", "bold")
    words.append(safe(status), "bold red" if gone else _STATUS_STYLES.get(status, "bold"))
    words.append(f"  {model_words(health.get('model') or {})}, up {duration(health.get('uptime_s') or 0)}")
    row = Table.grid(expand=True)
    row.add_column(ratio=1)
    row.add_column(justify="right")
    row.add_row(words, Text(now, _DIM))
    return row


def _problems(last: Snapshot) -> list[str]:
    return [str(problem) for problem in last.health.get("problems") or ()]


def _queue(last: Snapshot, width: int) -> Table:
    capacity = last.number("queue.capacity") or 0
    table = Table.grid(padding=(0, 1))
    bar_width = max(8, width - 30)
    for priority, style in (("interactive", "magenta"), ("background", "blue")):
        count = last.number(f"queue.{priority}") or 0
        filled = min(bar_width, round(bar_width * count / capacity) or bool(count)) if capacity else 0
        bar = Text("━" * filled, style) + Text("─" * (bar_width - filled), _DIM)
        table.add_row(Text(priority), Text(f"{number(int(count)):>6}"), bar, Text(f"{number(capacity)}", _DIM))
    return table


def _lanes(last: Snapshot, width: int, jobs_room: int) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(min_width=6)
    for _ in range(3):
        table.add_column(justify="right", min_width=7)
    table.add_column(no_wrap=True)
    table.add_row("", *(Text(words, _DIM) for words in ("working", "waiting", "failed")), "")
    words_width = max(10, width - 35)
    for lane, states in _LANES.items():
        jobs = _jobs_in(lane, states, last)
        counts = [last.number(f"lanes.{lane}.{key}") for key in ("active", "waiting", "failed")]
        cells = [Text(number(count), _DIM if not count else "red" if place == 2 else "")
                 for place, count in enumerate(counts)]  # fmt: skip
        table.add_row(Text(lane), *cells, _job_words(jobs[0], words_width) if jobs else Text(""))
        shown = min(len(jobs) - 1, jobs_room)
        for job in jobs[1 : 1 + shown] if jobs else ():
            table.add_row("", "", "", "", _job_words(job, words_width))
            jobs_room -= 1
    return table


def _jobs_in(lane: str, states: Iterable[str], last: Snapshot) -> list[Job]:
    jobs = [job for state in states for job in last.jobs.get(state, ())]
    if lane == "decode":  # most of the queue has its audio, or waits for a decoder
        jobs = [job for job in jobs if job.phase.startswith("decoding")]
    return sorted(jobs, key=lambda job: (job.priority != "interactive", job.id))


def _job_words(job: Job, width: int) -> Text:
    title = job.source.get("title") or source_label(job)
    style = "magenta" if job.priority == "interactive" else ""
    doing = safe(how_it_is(job))
    label = shortened(safe(title), max(8, width - len(doing) - 1))
    return Text(shortened(f"{label} {doing}", width), style)


def _plots(history: History, width: int) -> Table:
    half = max(10, (width - 2) // 2)
    table = Table.grid(padding=(0, 2, 0, 0))
    speed = history.series(lambda snapshot: history.rate("model.audio_s", until=snapshot), half)
    waiting = history.series(lambda snapshot: snapshot.waiting, half)
    tops = [max([0.0, *(value for value in values if value is not None)]) for values in (speed, waiting)]
    table.add_row(
        Text(f"speed, at most {tops[0]:.1f} × real time", _DIM, no_wrap=True),
        Text(f"waiting, at most {number(int(tops[1]))}", _DIM, no_wrap=True),
    )
    table.add_row(
        Text("\n".join(plot(speed, height=_PLOT_LINES)), "green", no_wrap=True),
        Text("\n".join(plot(waiting, height=_PLOT_LINES)), "blue", no_wrap=True),
    )
    return table


def _figures(history: History, width: int) -> Table:
    last = history.last
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(width=_FIGURE_TITLE)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for title, parts in (
        ("speed", _speed_words(history)),
        ("waited", _wait_words(last)),
        ("memory", _memory_words(last)),
        ("done", _done_words(last)),
    ):
        table.add_row(Text(title, _DIM), Text(_fitting(parts, width - _FIGURE_TITLE - 2)))
    return table


def _fitting(parts: Iterable[str], width: int) -> str:
    """Return as many of the parts as there is room for; the first ones matter most."""
    words = ""
    for part in filter(None, parts):
        longer = f"{words} · {part}" if words else part
        if words and len(longer) > width:
            break
        words = longer
    return words or "-"


def _speed_words(history: History) -> list[str]:
    last, rate = history.last, history.rate("model.audio_s")
    return [
        "" if rate is None else f"{rate:.1f} × real time now",
        _told(last.number("audio.speed"), lambda x: f"{x:.1f} × while it works"),
        _told(last.number("model.tokens_per_s"), lambda x: f"{x:.0f} tokens/s"),
        _told(last.number("model.batch_occupancy"), lambda x: f"batches {x:.0%} full".replace("%", " %")),
    ]


def _wait_words(last: Snapshot) -> list[str]:
    parts = []
    for priority in ("interactive", "background"):
        half, most = (last.number(f"wait_s.{priority}.{quantile}") for quantile in ("p50", "p95"))
        if half is not None and most is not None:
            parts.append(f"{priority} {duration(half)} (95 %: {duration(most)})")
    return parts


def _memory_words(last: Snapshot) -> list[str]:
    used, total = last.number("model.device_used_bytes"), last.number("model.device_total_bytes")
    return [
        _told(last.number("model.rss_bytes"), lambda n: f"model {size(n)}"),
        f"GPU {size(used)} of {size(total)}" if used is not None and total else "",
        _told(last.number("free_bytes"), lambda n: f"disk {size(n)} free"),
        _told(last.number("spool_bytes"), lambda n: f"spool {size(n)}"),
        _told(last.number("daemon.rss_bytes"), lambda n: f"daemon {size(n)}"),
    ]


def _done_words(last: Snapshot) -> list[str]:
    counts = map_in(map_in(last.stats, "jobs"), "since_start")
    crashes = last.number("model.crashes")
    return [
        *(f"{number(counts[state])} {state}" for state in ("done", "failed", "cancelled") if counts.get(state)),
        _told(last.number("audio.transcribed_s"), lambda s: f"{duration(s)} of audio" if s else ""),
        _told(last.number("cache_hits"), lambda n: f"{number(n)} known already" if n else ""),
        plural(int(crashes), "crash", "crashes") if crashes else "",
        _told(last.number("connections"), lambda n: plural(int(n), "connection")),
    ]


def _told(value: float | None, words: Callable[[float], str]) -> str:
    return "" if value is None else words(value)
