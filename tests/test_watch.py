"""`stats --watch` and `stats --prometheus`: the screen, the lines where there is none, and the text for a scrape."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.peer import Peer
from tests.test_cli_terminal import Terminal
from whisperctl.dashboard import picture
from whisperctl.history import History, Snapshot
from whisperctl.plot import plot
from whisperctl.prometheus import exposition
from whisperctl.words import display_width
from whisperd.protocol.jobs import Job

STATS: dict[str, Any] = {
    "jobs": {"since_start": {"done": 201, "failed": 2}, "total": {"done": 900}},
    "queue": {"interactive": 1, "background": 443, "capacity": 1000},
    "wait_s": {"interactive": {"p50": 0.4, "p95": 2.1}, "background": {"p50": None, "p95": None}},
    "audio": {"transcribed_s": 3000.5, "speed": 12.25},
    "model": {
        "state": "ready", "pid": 7, "rss_bytes": 1.2e9, "starts": 1, "crashes": 0, "audio_s": 100.0, "busy_s": 9.0,
        "windows": 4, "tokens": 431, "tokens_per_s": 43.1, "batch_occupancy": 0.75, "device_used_bytes": 3e9,
        "device_total_bytes": 24e9,
    },
    "lanes": {
        "copy": {"active": 1, "waiting": 0, "failed": 0},
        "fetch": {"active": 2, "waiting": 41, "failed": 3, "rests_until": None, "yt_dlp": "2026", "js_runtime": None},
        "decode": {"active": 0, "waiting": 0, "failed": 0},
        "model": {"active": 4, "waiting": 9, "failed": 0},
    },
    "software": {"torch": "2.13.0", "cuda_devices": 1},
    "free_bytes": 71e9,
    "daemon": {"pid": 6, "rss_bytes": 31e6, "cpu_s": 1.5, "uptime_s": 60.0},
}  # fmt: skip
HEALTH: dict[str, Any] = {
    "status": "ready", "version": "0.1.0", "uptime_s": 108_000.0, "problems": [],
    "model": {"name": "large-v3-turbo", "state": "ready", "device": "cuda:0", "dtype": "float16", "error": None},
}  # fmt: skip


def with_audio(audio_s: float, **more: Any) -> dict[str, Any]:
    return STATS | {"model": STATS["model"] | {"audio_s": audio_s}} | more


def a_job(number: int, state: str, name: str, **more: Any) -> Job:
    wire = {"id": number, "state": state, "priority": "background", "uid": 0, "submitted_at": 0.0, "options": {}}
    return Job.from_wire(wire | {"source": {"kind": "fd", "name": name}} | more)


# --- what is remembered ---


def test_the_speed_of_now_is_that_of_the_last_seconds() -> None:
    history = History()
    for second in range(0, 100, 2):
        history.add(Snapshot(at_s=second, stats=with_audio(3.0 * second if second < 60 else 180.0), health=HEALTH))
    assert history.rate("model.audio_s") == 0
    assert history.rate("model.nothing") is None
    history.add(Snapshot(at_s=100, stats=with_audio(5.0), health=HEALTH))
    assert history.rate("model.audio_s") is None, "a restart sets it back"


def test_a_series_is_as_wide_as_asked_and_keeps_gaps() -> None:
    history = History()
    for at_s in (0, 2, 50, 110, 112, 400, 402, 404):
        history.add(Snapshot(at_s=at_s, stats=STATS | {"queue": {"background": at_s}}, health=HEALTH))
    series = history.series(lambda snapshot: snapshot.waiting, 30)
    assert len(series) == 30
    assert series[-1] == 402, "the mean of what falls together"
    assert series[:2] == [111, 111], "a single gap is bridged: a narrow column may fall between two looks"
    assert set(series[2:-1]) == {None}


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ([0, 1, 2, 4, None, 8], ["   ▄ █"[:3] + "  █", "▁▂▄█ █"]),
        ([None, None], ["  ", "  "]),
        ([0, 0], ["  ", "▁▁"]),
    ],
)
def test_a_plot(values: list[float | None], lines: list[str]) -> None:
    drawn = plot(values, height=2)
    assert drawn == lines


# --- the screen ---


def drawn(history: History, width: int, height: int, *, gone: bool = False) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, highlight=False, markup=False)
    console.print(picture(history, width, height, now="12:34:56", gone=gone))
    return out.getvalue().splitlines()


@pytest.fixture
def history() -> History:
    history = History()
    jobs = {
        "running": [
            a_job(3, "running", "a-talk-on-[bold]bridges[/bold]-and-\x1b[31mrivers.flac", progress=0.37, eta_s=130.0),
            a_job(4, "running", "talk.m4a", progress=0.9, priority="interactive"),
            *(a_job(n, "running", "ä" * 90, progress=0.1) for n in range(5, 30)),
        ],
        "fetching": [a_job(31, "fetching", "dQw4w9WgXcQ", phase="downloading (1.2 of 4.5 MB)")],
        "queued": [a_job(32, "queued", "waits.mp3"), a_job(33, "queued", "song.mp3", phase="decoding 20 %")],
    }  # fmt: skip
    for second in range(0, 300, 2):
        stats = with_audio(second * 10.0, queue={"interactive": 1, "background": 600 - 2 * second, "capacity": 1000})
        history.add(Snapshot(at_s=second, stats=stats, health=HEALTH, jobs=jobs))
    return history


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 24), (132, 50), (40, 10)])
def test_it_fits(history: History, width: int, height: int) -> None:
    lines = drawn(history, width, height)
    assert max(map(display_width, lines)) <= width
    assert len(lines) <= max(height, 20)


def test_what_stands_on_it(history: History) -> None:
    lines = drawn(history, 80, 24)
    text = "\n".join(lines)
    assert lines[0].startswith("whisperd ready  model large-v3-turbo on cuda:0 (float16), up 1 day 6 h")
    assert lines[0].endswith("12:34:56")
    assert re.search(r"^interactive +1 ━─", text, re.M)
    assert re.search(r"^copy +1 +0 +0 *$", text, re.M)
    assert re.search(r"^fetch +2 +41 +3 dQw4w9WgXcQ downloading \(1.2 of 4.5 MB\)", text, re.M)
    assert re.search(r"^decode +0 +0 +0 song.mp3 decoding 20 %", text, re.M)
    assert re.search(r"^model +4 +9 +0 talk.m4a transcribing 90 %", text, re.M), "interactive work first"
    assert "speed, at most 10.0 × real time" in text
    assert "10.0 × real time now · 12.2 × while it works" in text
    assert "waited  interactive 0.4 s (95 %: 2.1 s)" in text
    assert "model 1.2 GB · GPU 3.0 GB of 24.0 GB" in text
    assert "201 done · 2 failed" in text
    assert "\x1b" not in text, "nothing in a name is obeyed"
    assert "[bold]" in "\n".join(drawn(history, 160, 24)), "nor taken for markup"


def test_it_says_what_is_wrong(history: History) -> None:
    last = history.last
    problems = ["downloads rest until 18:00: the site has had too many requests, and more words than there is room for"]
    history.add(Snapshot(at_s=301, stats=last.stats, health=HEALTH | {"status": "degraded", "problems": problems}))
    lines = drawn(history, 80, 24)
    assert lines[0].startswith("whisperd degraded")
    assert lines[1].startswith("! downloads rest until 18:00")
    assert lines[1].endswith("…")
    assert drawn(history, 80, 24, gone=True)[0].startswith("whisperd gone away; waiting for it to come back")


def test_a_daemon_that_tells_nothing_is_shown() -> None:
    history = History()
    history.add(Snapshot(at_s=0, stats={}, health={}))
    assert drawn(history, 80, 24)


# --- on a terminal, in a pipe ---


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(tmp_path / "s")
    peer.stats = dict(STATS)
    yield peer
    peer.stop()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_screen_outlives_the_daemon_and_goes_without_a_trace(peer: Peer, number: int, code: int) -> None:
    peer.add_job(state="running", source={"kind": "fd", "name": "talk.m4a"}, progress=0.5)
    terminal = Terminal(peer, "stats", "--watch")
    terminal.read_until("talk.m4a transcribing 50 %")
    peer.stop()
    terminal.read_until("gone away; waiting")
    peer.health["version"], peer.health["uptime_s"] = "0.1.0", 7777.0
    peer.start()
    terminal.read_until("up 2 h 9 min")
    terminal.process.send_signal(number)
    assert terminal.end() == code
    before, _, after = terminal.bytes.partition(b"\x1b[?1049h")
    assert before.replace(b"\x1b[?25l", b"") == b""
    drawn, _, after = after.rpartition(b"\x1b[?1049l")
    assert drawn
    assert after.replace(b"\x1b[?25h", b"").strip() == b"", "the terminal is as it was"
    assert b"\x1b[?25h" in terminal.bytes, "the cursor too"


def test_no_colours_where_none_are_wanted(peer: Peer) -> None:
    terminal = Terminal(peer, "stats", "--watch", NO_COLOR="1")
    terminal.read_until("memory")
    terminal.process.send_signal(2)
    assert terminal.end() == 130
    assert not re.search(rb"\x1b\[[\d;]*3[0-7]m", terminal.bytes)


def test_a_dumb_terminal_gets_lines(peer: Peer) -> None:
    terminal = Terminal(peer, "stats", "--watch", TERM="dumb")
    terminal.read_until("4 running · 1 + 443 waiting · model 1.2 GB\r\n")
    peer.stop()
    terminal.read_until("waiting for it to come back")
    peer.start()
    peer.stats = with_audio(100.0, queue={"interactive": 0, "background": 2})
    terminal.read_until("0 + 2 waiting · 0.0 × real time")
    terminal.process.send_signal(2)
    assert terminal.end() == 130
    assert b"\x1b" not in terminal.bytes
    assert terminal.bytes.count(b"waiting for it to come back") == 1, "said once"
    assert max(map(len, terminal.screen)) < 80


def ctl(peer: Peer, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "whisperctl", "--socket", str(peer.path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"} | environ,
    )


def test_in_a_pipe(peer: Peer) -> None:
    lines, objects = ctl(peer, "stats", "--watch"), ctl(peer, "stats", "--watch", "--json")
    assert lines.stdout is not None
    assert objects.stdout is not None
    assert re.fullmatch(r"\d\d:\d\d:\d\d  ready · 4 running · 1 \+ 443 waiting · .*\n", lines.stdout.readline())
    assert [json.loads(objects.stdout.readline()) for _ in range(2)] == [STATS, STATS]
    for process in (lines, objects):
        process.send_signal(2)
        assert process.communicate(timeout=20)[1] == ""
        assert process.returncode == 130


def test_without_rich_there_are_lines_and_a_word_on_it(peer: Peer, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['rich'] = None\n")
    terminal = Terminal(peer, "stats", "--watch", PYTHONPATH=str(tmp_path))
    terminal.read_until("4 running")
    terminal.process.send_signal(2)
    assert terminal.end() == 130
    assert b"pip install 'whisperd[watch]'" in terminal.bytes
    assert b"\x1b[?1049h" not in terminal.bytes


@pytest.mark.parametrize("how", [["--watch"], ["--watch", "--json"], ["--prometheus"]])
def test_a_daemon_that_was_never_there(peer: Peer, how: list[str]) -> None:
    peer.stop()
    process = ctl(peer, "stats", *how)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (3, "")
    assert "no longer running" in err


# --- for a scrape ---

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\"n])*"'
_SAMPLE = re.compile(rf"({_NAME})(?:\{{({_LABEL}(?:,{_LABEL})*)\}})? (-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|[+-]Inf|NaN)")


def scraped(text: str) -> dict[str, str]:
    """Read the exposition format strictly: HELP, TYPE, then all samples of the metric, none twice."""
    samples: dict[str, str] = {}
    seen: set[str] = set()
    assert text.endswith("\n")
    lines = text.splitlines()
    while lines:
        help_line, type_line = lines.pop(0), lines.pop(0)
        name = re.fullmatch(rf"# HELP ({_NAME}) (?:[^\\\n]|\\[\\n])+", help_line)
        assert name, help_line
        assert name[1] not in seen
        seen.add(name[1])
        assert re.fullmatch(rf"# TYPE {name[1]} (counter|gauge|summary)", type_line), type_line
        assert type_line.endswith("counter") == name[1].endswith("_total"), name[1]
        assert not re.search(r"_(s|ms|mb|days)$", name[1]), "base units, written out"
        count = 0
        while lines and not lines[0].startswith("#"):
            match = _SAMPLE.fullmatch(line := lines.pop(0))
            assert match, line
            assert match[1] == name[1]
            sample, _, value = line.rpartition(" ")
            assert sample not in samples
            samples[sample] = value
            count += 1
        assert count, f"{name[1]} has no sample"
    return samples


def test_a_scrape_has_every_number() -> None:
    samples = scraped(exposition(STATS, HEALTH))
    assert samples["whisperd_up"] == "1"
    assert samples['whisperd_queue_jobs{priority="background"}'] == "443"
    assert samples['whisperd_job_moves_total{state="done"}'] == "201"
    assert samples['whisperd_wait_seconds{priority="interactive",quantile="0.95"}'] == "2.1"
    assert not any('wait_seconds{priority="background"' in sample for sample in samples), "null is no sample"
    assert samples['whisperd_lane_failures_total{lane="fetch"}'] == "3"
    assert samples["whisperd_audio_transcribed_seconds_total"] == "3000.5"
    assert samples['whisperd_model_state{state="ready"}'] == "1"
    assert samples['whisperd_status{status="degraded"}'] == "0"
    assert not any("pid" in sample for sample in samples)


def test_a_scrape_of_what_is_new_or_odd() -> None:
    stats = {"uploads": {"waited_s": 1.5, "open": True, "words": "none"}, "lanes": {"upload": {"active": 3}}}
    health = {"status": "dreaming", "version": 'a "quoted" \\ and\nbroken', "problems": ["one", "two"]}
    samples = scraped(exposition(stats, health))
    assert samples["whisperd_uploads_waited_seconds"] == "1.5"
    assert samples["whisperd_uploads_open"] == "1"
    assert samples['whisperd_lane_active{lane="upload"}'] == "3"
    assert samples['whisperd_status{status="dreaming"}'] == "1"
    assert samples["whisperd_problems"] == "2"
    assert r'whisperd_build_info{version="a \"quoted\" \\ and\nbroken"}' in samples
    assert scraped(exposition({}, {}))["whisperd_up"] == "1"


def test_prometheus_on_the_command_line(peer: Peer) -> None:
    process = ctl(peer, "stats", "--prometheus")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert scraped(out)[
        'whisperd_build_info{version="0.1.0",torch="2.13.0",yt_dlp="2026",model="micro",device="cpu",dtype="float32"}'
    ]
    for other in ("--json", "--watch"):
        process = ctl(peer, "stats", "--prometheus", other)
        assert process.communicate(timeout=20)[0] == ""
        assert process.returncode == 2
