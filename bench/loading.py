"""Load to ready, and the most memory it takes: `whisper.load_model` against ours, each in a process of its own.

`python -m bench.loading ENGINE FILE CACHE DEVICE` is one of those processes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import planted
from bench.daemon import THREADS, peak_rss_mb
from bench.report import Bench, Row
from bench.weights import base_folder, write_checkpoint


def measure(bench: Bench) -> Iterator[Row]:
    """Yield both, for checkpoints of different sizes. The files lie in the page cache."""
    files = {"tiny.en": write_checkpoint("demo", bench.folder / "demo.pt")}
    if not bench.quick:
        files["base"] = write_checkpoint(str(base_folder(bench.folder)), bench.folder / "base.pt")
        files["turbo's dimensions"] = planted.write_planted(planted.TURBO, bench.folder / "turbo.pt")
    for name, path in files.items():
        figures = alternate(path, bench.folder, times=bench.pick(3 if "turbo" in name else 7, 2))
        yield from rows(name, figures, peak_goal=1.2)


def alternate(
    path: Path, folder: Path, *, times: int, device: str = "cpu", warm: bool = True
) -> dict[str, list[dict[str, float]]]:
    """Return what each engine, "upstream" and "ours", says of loading a checkpoint so many times, in turn.

    There is one more of each before them, to `warm` the caches.
    """
    figures: dict[str, list[dict[str, float]]] = {"upstream": [], "ours": []}
    for number in range(-1 if warm else 0, times):
        for engine in figures:
            command = [sys.executable, "-m", "bench.loading", engine, str(path), str(folder), device]
            one = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            if number >= 0:
                figures[engine].append(one)
    return figures


def rows(name: str, figures: dict[str, list[dict[str, float]]], *, peak_goal: float) -> Iterator[Row]:
    """Yield how long loading took and the most of the machine's memory, ours against upstream's."""

    def median(engine: str, key: str) -> float:
        return statistics.median(one[key] for one in figures[engine])

    ours_s, theirs_s = median("ours", "load_s"), median("upstream", "load_s")
    runs = f"{len(figures['ours'])} of each, alternating"
    yield Row(
        what=f"load to ready against `whisper.load_model`, {name}",
        goal="≥ 2 ×",
        measured=f"{theirs_s / ours_s:.2f} ×: {ours_s:.2f} s (of it the weights {median('ours', 'weights_s'):.2f} s) "
        f"against {theirs_s:.2f} s; layers laid out anew beside the first work: {median('ours', 'settle_s'):.2f} s",
        met=theirs_s >= 2 * ours_s,
        runs=runs,
    )
    ours_mb, theirs_mb = median("ours", "peak_mb"), median("upstream", "peak_mb")
    yield Row(
        what=f"the process's peak memory (of the host) after that, {name}",
        goal=f"≤ {peak_goal:g} ×",
        measured=f"{ours_mb / theirs_mb:.2f} ×: {ours_mb:.0f} against {theirs_mb:.0f} MB (after the imports alone "
        f"{median('ours', 'imports_mb'):.0f} and {median('upstream', 'imports_mb'):.0f} MB)",
        met=ours_mb <= peak_goal * theirs_mb,
        runs=runs,
    )


def _load_upstream(path: Path, device: str) -> dict[str, float]:
    import whisper

    imports_mb, started = _begin(device), time.perf_counter()
    whisper.load_model(str(path), device=device)
    _wait_for(device)
    return {"load_s": time.perf_counter() - started, "imports_mb": imports_mb}


def _load_ours(path: Path, cache_dir: Path, device: str) -> dict[str, float]:
    from whisperd.model.engine import Engine
    from whisperd.model.loading import load

    options: dict[str, Any] = {"device": device, "dtype": "auto", "environ": os.environ, "on_step": lambda: None}
    imports_mb, started = _begin(device), time.perf_counter()
    model = load(str(path), cache_dir=cache_dir, **options)
    _wait_for(device)
    loaded = time.perf_counter()
    engine = Engine(model, on_step=lambda: None, release=True)
    _wait_for(device)
    ready = time.perf_counter()
    engine.settle()  # a thread's, beside the first work; its memory counts
    return {
        "load_s": ready - started,
        "settle_s": time.perf_counter() - ready,
        "weights_s": loaded - started,
        "imports_mb": imports_mb,
    }


def _begin(device: str) -> float:
    """Have the device ready, which takes either engine as long; return the most that the process was so far, in MB."""
    torch.zeros(1, device=device)
    _wait_for(device)
    return peak_rss_mb(os.getpid())


def _wait_for(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def main() -> None:
    """Load once, and print the figures as JSON."""
    engine, path, cache_dir, device = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    if device == "cpu":
        torch.set_num_threads(THREADS)
    figures = _load_upstream(path, device) if engine == "upstream" else _load_ours(path, cache_dir, device)
    print(json.dumps(figures | {"peak_mb": peak_rss_mb(os.getpid())}))


if __name__ == "__main__":
    main()
