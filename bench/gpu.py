"""`python -m bench.gpu [NAME...]`: the engine on a GPU, by the goals for one. No network needed.

For time: planted weights in the dimensions of turbo and large-v3, made here. For text: tiny.en, from the `demo` extra.
Each subject has a process of its own and a limit of time, prints each row as soon as it is known, and holds up no
other. Those that matter most come first; what does not fit into `--minutes` (8) is named in the table. Where there is
less time, name some: `python -m bench.gpu recording fidelity steps-turbo`.

A machine that reaches no package index needs an environment with the server's packages, in which this tree is installed
(`pip install --no-index --no-deps --no-build-isolation -e .`), and, without flite, what `python -m bench.gpu --speak
FOLDER` writes (9 MB).
`--quick --device cpu` does all of it in small: that shows that the measuring works, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import gpu_speed, gpu_steps, gpu_text, leaks, loading
from bench.gpu_place import SIZES, SPOKEN_S, Place, place_of
from bench.recordings import TEXT, speak_sentences, write_spoken
from bench.report import Bench, Row, describe_machine, format_head, format_row
from whisperd.model.main import SWITCH_INTERVAL_S, prepare_environment
from whisperd.protocol.errors import WhisperdError

_LEAST_S = 20  # to begin a subject with


@dataclass(frozen=True, slots=True)
class Subject:
    measure: Callable[[Place], Iterator[Row]]
    limit_s: float  # far above what it takes on an H100: it ends what hangs


def _load(place: Place, size: str) -> Iterator[Row]:
    """Each engine in processes of its own, from a file in the page cache, the device ready."""
    path, times = Path(place.planted(size)), place.pick(2, 1)
    figures = loading.alternate(path, place.new_folder("cache"), times=times, device=str(place.device), warm=False)
    for row in loading.rows(size, figures, peak_goal=0.4):
        yield place.timed(row)


def _leaks(place: Place) -> Iterator[Row]:
    bench = Bench(place.new_folder("leaks"), place.quick, device=str(place.device))
    for row in leaks.measure_jobs(bench, jobs=place.pick(1000, 8), every=place.pick(leaks.EVERY, 8)):
        yield place.timed(row)


def _sized(measure: Callable[[Place, str], Iterator[Row]], size: str, limit_s: float) -> Subject:
    return Subject(lambda place: measure(place, size), limit_s)


# What matters most comes first.
SUBJECTS: Mapping[str, Subject] = {
    "recording": Subject(gpu_steps.recording, 60),
    "fidelity": Subject(gpu_text.measure, 120),
    "steps-turbo": _sized(gpu_steps.measure, "turbo", 60),
    "jobs-turbo": _sized(gpu_speed.jobs, "turbo", 120),
    "jobs-large-v3": _sized(gpu_speed.jobs, "large-v3", 180),
    "urgent-turbo": _sized(gpu_speed.urgent, "turbo", 90),
    "words": Subject(gpu_speed.words, 90),
    "beams": Subject(gpu_speed.beams, 120),
    "peer": Subject(gpu_speed.peer, 90),
    "long-turbo": _sized(gpu_speed.long_file, "turbo", 90),
    "load-large-v3": _sized(_load, "large-v3", 180),
    "host": Subject(gpu_speed.host, 60),
    "leaks": Subject(_leaks, 180),
    "urgent-large-v3": _sized(gpu_speed.urgent, "large-v3", 150),
    "steps-large-v3": _sized(gpu_steps.measure, "large-v3", 90),
    "long-large-v3": _sized(gpu_speed.long_file, "large-v3", 150),
    "load-turbo": _sized(_load, "turbo", 120),
}
assert set(gpu_speed.GOALS) == set(SIZES)


def measure_here(name: str, place: Place) -> bool:
    """Measure one subject in this process and print its rows; return whether that went to its end."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as the model helper has it
    try:
        for row in SUBJECTS[name].measure(place):
            print(format_row(row), flush=True)
        return True
    except Exception as error:  # whatever it is, the others are measured
        _not_measured(name, f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}")
        traceback.print_exc()
        return False
    finally:
        sys.setswitchinterval(interval_s)


def measure_apart(names: Sequence[str], options: Sequence[str], folder: Path, *, until_s: float) -> bool:
    """Measure subjects, each in a process of its own, as long as there is time; return whether all came to an end."""
    environ = dict(os.environ)
    prepare_environment(environ, cache_dir=folder, threads=0)
    well = True
    for name in names:
        left_s = min(SUBJECTS[name].limit_s, until_s - time.monotonic())
        if left_s < _LEAST_S:
            _not_measured(name, "no time left (--minutes)")
            well = False
            continue
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "bench.gpu", name, "--folder", str(folder), *options]
        process = subprocess.Popen(command, env=environ, start_new_session=True)
        try:
            status = process.wait(left_s)
            if status not in (0, 1):  # 1 has said why
                _not_measured(name, f"its process ended with {status}")
            well &= status == 0
        except subprocess.TimeoutExpired:
            _not_measured(name, f"not over after {left_s:.0f} s")
            well = False
        finally:
            _end(process)
    return well


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _not_measured(name: str, why: str) -> None:
    print(format_row(Row(what=name, measured=f"NOT MEASURED: {why}")), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Measure the engine on a GPU.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure: {', '.join(SUBJECTS)}; all of them")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or, with --quick, cpu")
    parser.add_argument("--quick", action="store_true", help="small dimensions: does the measuring work?")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing that would end later; 8")
    parser.add_argument(
        "--tiny-en",
        type=Path,
        metavar="PATH",
        help="tiny.en, where the demo extra is not installed: a checkpoint, a folder, or a folder of pieces of their "
        "files (`split -b 60M -d tiny.en.pt pieces/tiny.en.pt.`)",
    )
    parser.add_argument(
        "--speech", type=Path, metavar="FOLDER", help="what --speak wrote, where flite is not installed"
    )
    parser.add_argument("--speak", type=Path, metavar="FOLDER", help="write recordings for --speech, and nothing else")
    parser.add_argument("--peer-python", default="", metavar="PATH", help="an interpreter that has faster-whisper")
    # How a subject's process is told where the others' weights are; it prints rows alone.
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return 1 when something could not be measured, and 2 when there is no device to measure on."""
    parser = _parser()
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    if unknown := [name for name in arguments.names if name not in SUBJECTS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(SUBJECTS)}")
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("on a CPU `python -m bench` measures; --quick tries this one there")
    if arguments.speak:
        write_spoken(arguments.speak, list(speak_sentences(TEXT.read_text(), SPOKEN_S)))
        return 0
    with tempfile.TemporaryDirectory(prefix="wb-") as temporary:
        fields = {name: getattr(arguments, name) for name in ("quick", "tiny_en", "speech", "peer_python")}
        try:
            place = place_of(arguments.device, folder=arguments.folder or Path(temporary), **fields)
        except WhisperdError as error:
            print(error.message, file=sys.stderr)
            return 2
        if arguments.folder:
            well = [measure_here(name, place) for name in arguments.names]
            return int(not all(well))
        print(f"{describe_machine(place.folder)}\n{_device_of(place)}\n\n{format_head()}", flush=True)
        options = [each for each in given if each not in arguments.names]
        until_s = time.monotonic() + 60 * arguments.minutes
        return int(not measure_apart(arguments.names or list(SUBJECTS), options, place.folder, until_s=until_s))


def _device_of(place: Place) -> str:
    if not place.on_gpu:
        return f"no GPU, torch {torch.__version__}: none of the times means anything"
    used = torch.cuda.get_device_properties(place.device)
    return f"{used.name}, {used.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
