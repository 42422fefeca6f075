"""A second client that asks for `health` while a first one misbehaves: a process of its own, which waits for nobody.

Run as a program with a socket's path, it pings until its standard input ends, then prints the seconds of each ping.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.daemon import Pinger
from torture.report import Report, percentile

_EVERY_S = 0.005


@contextmanager
def pinging(path: Path, report: Report) -> Iterator[None]:
    """Ping for a `with` block; the report gets the percentiles, and p99 must be under 50 ms."""
    command = [sys.executable, "-m", "torture.pinging", str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # it is up
    try:
        yield
    finally:
        output, _ = process.communicate(timeout=60)
    times = json.loads(output)
    report.count("health requests of a second client", len(times))
    for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        report.facts[f"ms: {name} of its health"] = f"{percentile(times, share) * 1000:.1f}"
    report.require(percentile(times, 0.99) < 0.05, "health of a second client took 50 ms or more at p99")


def main() -> None:
    """Ping until told to stop."""
    times: list[float] = []
    with Pinger(Path(sys.argv[1])) as pinger, selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        times.append(pinger.ping())
        print("up", flush=True)
        while not selector.select(_EVERY_S):
            times.append(pinger.ping())
    print(json.dumps(times))


if __name__ == "__main__":
    main()
