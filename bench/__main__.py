"""`python -m bench [--quick] [--peer-python PATH] [NAME...]`: measure and print one table.

It takes an hour and wants the machine for itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bench import (
    engine,
    latency,
    leaks,
    loading,
    long_file,
    memory,
    overhead,
    pipeline,
    roundtrips,
    startup,
    steps,
    submit,
    urgent,
)
from bench.daemon import Failed
from bench.report import Bench, Row, describe_machine, format_head, format_row

SUBJECTS: Mapping[str, Callable[[Bench], Iterator[Row]]] = {
    "engine": engine.measure,
    "options": engine.measure_options,
    "alone": engine.measure_alone,
    "busy": engine.measure_busy,
    "steps": steps.measure,
    "urgent": urgent.measure,
    "loading": loading.measure,
    "leaks": leaks.measure,
    "startup": startup.measure,
    "memory": memory.measure,
    "roundtrips": roundtrips.measure,
    "latency": latency.measure,
    "submit": submit.measure,
    "long_file": long_file.measure,
    "whole": long_file.measure_whole,
    "pipeline": pipeline.measure,
    "overhead": overhead.measure,
}


def main() -> int:
    """Run the subjects that the command line names; return 1 when one could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure whisperd and print a table.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure: {', '.join(SUBJECTS)}; all of them")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller: does it work, and about how fast")
    parser.add_argument("--peer-python", default="", metavar="PATH", help="an interpreter that has faster-whisper")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in SUBJECTS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(SUBJECTS)}")
    # A short name of our own: the path of a socket may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="wb-"))
    failed = False
    try:
        print(f"{describe_machine(folder)}\n\n{format_head()}", flush=True)
        for name in arguments.names or SUBJECTS:
            print(f"measuring {name} (load {os.getloadavg()[0]:.1f}) ...", file=sys.stderr)
            failed |= not _measure(
                SUBJECTS[name], Bench(folder / name, arguments.quick, peer_python=arguments.peer_python)
            )
    finally:
        shutil.rmtree(folder)
    return int(failed)


def _measure(subject: Callable[[Bench], Iterator[Row]], bench: Bench) -> bool:
    bench.folder.mkdir()
    try:
        for row in subject(bench):
            print(format_row(row), flush=True)
        return True
    except Failed as error:
        print(f"not measured: {error}", file=sys.stderr)
        return False
    finally:
        shutil.rmtree(bench.folder)  # at once: some of it is large


if __name__ == "__main__":
    sys.exit(main())
