"""Recordings of hours: what the daemon, the decoder and the model's process grow by."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from bench.children import Child
from bench.daemon import THREADS, Daemon, RawClient, peak_rss_mb, reset_peak, rss_mb, running_daemon
from bench.engine import spoken
from bench.recordings import write_hours, write_talk, write_wav
from bench.report import Bench, Row

GOAL_DAEMON_MB, GOAL_DECODER_MB, GOAL_MODEL_MB = 20, 150, 300
WORDS = {"word_timestamps": True}


def measure(bench: Bench) -> Iterator[Row]:
    """Yield figures of ten hours, up to the first words."""
    hours = bench.pick(10, 1)
    file = write_hours(bench.folder / "hours.mka", hours)
    with running_daemon(bench.folder / "d") as daemon, daemon.client() as client:
        (model,) = daemon.helpers("whisperd.model.main")
        minute_mb = _peak_mb(daemon, client, write_talk(bench.folder / "minute.wav", 60))
        before_mb = rss_mb(daemon.pid)
        for pid in (daemon.pid, model):
            reset_peak(pid)
        started = time.monotonic()
        job = client.submit(file, options=WORDS)
        accepted_s = time.monotonic() - started
        daemon.wait_for_state(job, "running")
        decoded_s = time.monotonic() - started
        daemon.wait_for_words(job)
        first_words_s = time.monotonic() - started
        decoder_mb, copier_mb = (
            max(map(peak_rss_mb, daemon.helpers(f"whisperd.audio.{role}"))) for role in ("decoder", "copier")
        )
        grown_mb = peak_rss_mb(daemon.pid) - before_mb
        model_mb = peak_rss_mb(model)
        pcm_mb = next((daemon.folder / "state").rglob("audio.pcm")).stat().st_size / 1e6
        cancelling = time.monotonic()
        client.call("cancel", job=job)
        cancelled_s = time.monotonic() - cancelling
    what = f"a file of {hours} h ({file.stat().st_size / 1e6:.0f} MB of AAC)"
    yield Row(
        what=f"{what}: the daemon grows by",
        goal=f"under {GOAL_DAEMON_MB} MB",
        measured=f"{grown_mb:.1f} MB at its peak",
        met=grown_mb < GOAL_DAEMON_MB,
        runs="1",
    )
    yield Row(
        what="the decoder with it, at its peak",
        goal=f"under {GOAL_DECODER_MB} MB",
        measured=f"{decoder_mb:.0f} MB (copier {copier_mb:.0f} MB)",
        met=decoder_mb < GOAL_DECODER_MB,
        runs="1",
    )
    yield Row(
        what="the model's process with it, up to the first words",
        goal=f"at most {GOAL_MODEL_MB} MB more than with a minute",
        measured=f"{model_mb:.0f} MB at its peak, {model_mb - minute_mb:+.0f} MB",
        met=model_mb - minute_mb <= GOAL_MODEL_MB,
        runs="1",
    )
    yield Row(
        what="how long it takes",
        measured=f"acknowledged after {accepted_s:.1f} s, decoded ({pcm_mb:.0f} MB on disk) after {decoded_s:.0f} s, "
        f"first words after {first_words_s:.0f} s, cancel answered in {1000 * cancelled_s:.0f} ms",
        runs="1",
    )


def measure_whole(bench: Bench) -> Iterator[Row]:
    """Yield what the model's process grows by until an hour has been transcribed to its end, with word times.

    openai-whisper makes the spectrogram of the whole file before it begins: half a minute of the hour shows its peak.
    """
    minutes = bench.pick(60, 5)
    minute, hour = spoken((60, 60 * minutes))
    for name, recording in (("minute", minute), ("hour", hour)):
        write_wav(bench.folder / f"{name}.wav", recording)
        (bench.folder / f"{name}.pcm").write_bytes(recording.pcm)
    with running_daemon(bench.folder / "whole") as daemon, daemon.client() as client:
        minute_mb = _peak_mb(daemon, client, bench.folder / "minute.wav")
        whole_mb = _peak_mb(daemon, client, bench.folder / "hour.wav")
        windows = client.call("stats")["model"]["windows"]
    what = f"the model's process with a recording of {minutes} min, word times, to its end"
    yield Row(
        what=f"{what}, against one of a minute",
        goal=f"at most {GOAL_MODEL_MB} MB more",
        measured=f"{whole_mb:.0f} MB at its peak, {whole_mb - minute_mb:+.0f} MB; {windows} windows",
        met=whole_mb - minute_mb <= GOAL_MODEL_MB,
        runs="1",
    )
    command = [sys.executable, "-m", "bench.upstream", str(THREADS), "0", str(bench.folder)]
    with closing(Child(command)) as upstream:
        minute_mb, whole_mb = (_upstream_peak_mb(upstream, bench.folder / f"{name}.pcm") for name in ("minute", "hour"))
    yield Row(
        what="openai-whisper with the same, after its first 30 s",
        measured=f"{whole_mb:.0f} MB at its peak, {whole_mb - minute_mb:+.0f} MB",
        runs="1",
    )


def _peak_mb(daemon: Daemon, client: RawClient, file: Path) -> float:
    """Return the most that the model's process holds while it transcribes a file with word times, in MB."""
    (model,) = daemon.helpers("whisperd.model.main")
    reset_peak(model)
    daemon.wait_for_end(client.submit(file, options=WORDS))
    return peak_rss_mb(model)


def _upstream_peak_mb(upstream: Child, file: Path) -> float:
    reset_peak(upstream.pid)
    upstream.ask(files=[str(file)], options=WORDS | {"clip_timestamps": [0, 30]})
    return peak_rss_mb(upstream.pid)
