"""`whisperctl health`, from the shell's point of view, over what bare Python takes."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.daemon import environment, program, running_daemon
from bench.report import Bench, Row

GOAL_MS = 60


def measure(bench: Bench) -> Iterator[Row]:
    runs = bench.pick(60, 20)
    commands = {
        "bare": [sys.executable, "-c", "pass"],
        "--version": [program("whisperctl"), "--version"],
        "health": [program("whisperctl"), "--socket", "s", "health"],
    }
    times_ms: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    with running_daemon(bench.folder / "d") as daemon:
        for _ in range(runs):
            for name, command in commands.items():  # alternating, so that a busy moment hits all of them
                times_ms[name].append(_time_ms(command, daemon.folder))
    wall_ms = {name: [wall for wall, _ in times] for name, times in times_ms.items()}
    cpu_ms = {name: [cpu for _, cpu in times] for name, times in times_ms.items()}
    over_ms = statistics.median(wall_ms["health"]) - statistics.median(wall_ms["bare"])
    shown = "; ".join(f"{name} {statistics.median(values):.0f} ({min(values):.0f})" for name, values in wall_ms.items())
    yield Row(
        what="`whisperctl health` over bare Python",
        goal=f"at most {GOAL_MS} ms",
        measured=f"median {over_ms:.0f} ms, min {min(wall_ms['health']) - min(wall_ms['bare']):.0f} ms, "
        f"CPU time {statistics.median(cpu_ms['health']) - statistics.median(cpu_ms['bare']):.0f} ms "
        f"(whole commands, median and min: {shown} ms)",
        met=over_ms <= GOAL_MS,
        runs=f"{runs} of each, alternating",
    )


def _time_ms(command: Sequence[str], folder: Path) -> tuple[float, float]:
    """Return the wall time and the CPU time of a command."""
    cpu_before_s = _children_cpu_s()
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, env=environment(folder))
    return 1000 * (time.perf_counter() - started), 1000 * (_children_cpu_s() - cpu_before_s)


def _children_cpu_s() -> float:
    """Return the CPU time of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
