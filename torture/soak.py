"""Thousands of jobs in one daemon: memory, descriptors and files must stay flat."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from random import Random
from statistics import median

import psutil

from tests.models import micro_checkpoint
from tests.support import PLAIN_OPTIONS, RawClient, files_in
from torture.kills import write_recordings
from torture.machine import Victim, command_line, victim
from torture.report import Report

_AT_ONCE = 8
_SAMPLES = 40
_SHARE_OF_TIME = 0.98  # in which all jobs are begun: a batch that is late can be made up for
# What may be added between the second quarter and the last: allocators settle.
_GROWTH, _GROWTH_MB = 0.05, 4.0


def soak(seed: int, jobs: int, minutes: float) -> Report:
    """Do `jobs` jobs spread evenly over `minutes`, or as many as the machine does in that time.

    Each is forgotten after its end, so that nothing need grow.
    """
    report = Report(f"soak, seed {seed}")
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    samples: dict[str, list[float]] = defaultdict(list)
    try:
        recording = write_recordings(folder, Random(f"{seed}:recordings"), (1,))[0]
        with victim(report, model=str(micro_checkpoint(folder)), log_level="warning") as target:
            target.start()
            target.daemon.wait_ready(120)
            started = time.monotonic()
            with target.daemon.client() as client:
                every = max(1, jobs // _SAMPLES)
                for done in range(0, jobs, _AT_ONCE):
                    due = started + _SHARE_OF_TIME * minutes * 60 * done / jobs
                    time.sleep(max(0.0, due - time.monotonic()))
                    _batch(client, recording, report)
                    if done % every < _AT_ONCE:
                        _sample(target, samples)
                    if time.monotonic() - started > minutes * 60:
                        break
            report.facts["minutes"] = f"{(time.monotonic() - started) / 60:.1f}"
            report.require("Traceback" not in target.daemon.log(), "the log has a traceback")
        _judge(samples, report)
    finally:
        shutil.rmtree(folder)
        report.end()
    return report


def _batch(client: RawClient, recording: Path, report: Report) -> None:
    jobs = [client.submit(recording, options=PLAIN_OPTIONS, fresh=True)["id"] for _ in range(_AT_ONCE)]
    for job in jobs:
        state = client.result(job)["job"]["state"]
        report.count(f"jobs {state}")
        report.require(state == "done", f"job {job} is {state}")
        client.call("forget", job=job)


def _sample(target: Victim, samples: dict[str, list[float]]) -> None:
    daemon = psutil.Process(target.daemon.pid)
    sums: dict[str, list[psutil.Process]] = defaultdict(list, {"daemon": [daemon]})
    for child in daemon.children():
        modules = [word for word in command_line(child) if word.startswith("whisperd.")]
        sums[modules[0] if modules else "others"].append(child)
    for name, processes in sums.items():
        samples[f"{name} MB"].append(max(process.memory_info().rss for process in processes) / 1e6)
        samples[f"{name} descriptors"].append(max(process.num_fds() for process in processes))
        samples[f"{name} processes"].append(len(processes))
    files = files_in(target.daemon.state_dir)
    samples["files"].append(len(files))
    samples["database MB"].append(sum(p.stat().st_size for p in files if p.name.startswith("whisperd.sqlite3")) / 1e6)


def _judge(samples: dict[str, list[float]], report: Report) -> None:
    for name, values in sorted(samples.items()):
        quarter = max(1, len(values) // 4)
        early, late = median(values[quarter : 2 * quarter] or values), median(values[-quarter:])
        report.facts[f"{name}, of the second quarter, and of the last: {late:.1f}"] = f"{early:.1f}"
        allowed = early * (1 + _GROWTH) + (_GROWTH_MB if name.endswith("MB") else 1)
        report.require(late <= allowed, f"{name} grew from {early:.1f} to {late:.1f}")
