"""The table: rows with a goal and a verdict, statistics of a few values, and the machine it was measured on."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. `met` is None where there is no goal, or where it could not be measured."""

    what: str
    measured: str
    goal: str = ""
    met: bool | None = None
    runs: str = ""

    @property
    def verdict(self) -> str:
        return {True: "met", False: "MISSED", None: ""}[self.met]


@dataclass(frozen=True, slots=True)
class Bench:
    """What every subject gets. The folder is deleted afterwards."""

    folder: Path
    quick: bool  # a short run is wanted
    device: str = "cpu"  # as the setting has it
    peer_python: str = ""  # an interpreter that has faster-whisper

    def pick(self, full: int, quick: int) -> int:
        """Return how often (or how much), by the length of the run."""
        return quick if self.quick else full


def format_row(row: Row) -> str:
    """Return a line of a Markdown table."""
    return f"| {row.what} | {row.goal} | {row.measured} | {row.verdict} | {row.runs} |"


def format_head() -> str:
    """Return the table's first two lines."""
    return "| what | goal | measured | verdict | runs |\n|---|---|---|---|---|"


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def milliseconds(seconds: Iterable[float]) -> str:
    """Return median, 99th percentile and extremes of some times."""
    values = [1000 * value for value in seconds]
    return (
        f"p50 {statistics.median(values):.2f} ms, p99 {percentile(values, 99):.2f} ms, "
        f"min {min(values):.2f}, max {max(values):.2f}"
    )


def describe_machine(folder: Path) -> str:
    """Return a few lines: cores, CPU, Python, kernel, the disk's file system, the load, the day."""
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    memory_gb = psutil.virtual_memory().total / 1e9
    return (
        f"{os.cpu_count()} cores, {cpu[1] if cpu else platform.machine()}, {memory_gb:.0f} GB of memory, "
        f"{_file_system(folder)} on disk\n"
        f"Python {platform.python_version()}, Linux {platform.release()}; "
        f"{time.strftime('%Y-%m-%d %H:%M')}, load of the last 1, 5, 15 minutes: {load}"
    )


def _file_system(folder: Path) -> str:
    """Return the type of the file system that holds `folder`: on a tmpfs no commit costs anything."""
    holders = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
    return max(holders, key=lambda part: len(part.mountpoint)).fstype if holders else "unknown"
