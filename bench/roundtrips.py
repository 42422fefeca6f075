"""How many `health` round trips a second one client gets, alone and beside 500 idle connections."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from bench.daemon import Pinger, running_daemon
from bench.report import Bench, Row
from whisperctl import Client

GOAL_PER_S = 2000
IDLE = 500


def measure(bench: Bench) -> Iterator[Row]:
    rounds, round_s = bench.pick(9, 3), 1.0
    with running_daemon(bench.folder / "d") as daemon, ExitStack() as stack:
        pinger = stack.enter_context(Pinger(daemon.socket))
        client = stack.enter_context(Client(daemon.socket))
        asking: dict[str, Callable[[], object]] = {"raw protocol": pinger.ping, "Python Client": client.health}
        for idle in (0, IDLE):
            for _ in range(idle):
                stack.enter_context(Pinger(daemon.socket)).ping()
            for name, ask in asking.items():
                rates = [_rate(ask, round_s) for _ in range(rounds)]
                yield Row(
                    what=f"`health` round trips a second, {name}" + (f", {idle} idle connections" if idle else ""),
                    goal=f"at least {GOAL_PER_S}",
                    measured=f"median {statistics.median(rates):.0f} (from {min(rates):.0f} to {max(rates):.0f})",
                    met=statistics.median(rates) >= GOAL_PER_S,
                    runs=f"{rounds} of {round_s:g} s",
                )


def _rate(ask: Callable[[], object], length_s: float) -> float:
    count, started = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - started) < length_s:
        ask()
        count += 1
    return count / elapsed_s
