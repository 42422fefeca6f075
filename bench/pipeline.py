"""A queue of videos on a web server of this machine: does the model ever wait for a download or a decoder?"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bench.daemon import Failed, RawClient, running_daemon
from bench.recordings import write_talks
from bench.report import Bench, Row
from tests.models import micro_checkpoint

GOAL_PERCENT = 95
_OPTIONS = {"language": "en", "temperature": 0, "condition_on_previous_text": False}


def measure(bench: Bench) -> Iterator[Row]:
    videos, minutes = bench.pick(50, 8), bench.pick(10, 5)
    served = bench.folder / "served"
    served.mkdir()
    names = [path.name for path in write_talks(served, videos, minutes)]
    settings: dict[str, Any] = {"fetch_allow_private": "true", "fetch_extractors": '["generic"]'}
    model = str(micro_checkpoint(bench.folder))
    with (
        _serving(served) as url,
        running_daemon(bench.folder / "d", model=model, **settings) as daemon,
        daemon.client() as client,
    ):
        jobs, model_s, windows, wall_s = _transcribe(client, [f"{url}/{name}" for name in names])
    began, ended = jobs[0]["started_at"], max(job["ended_at"] for job in jobs)
    percent = 100 * _covered_s((job["started_at"], job["ended_at"]) for job in jobs) / (ended - began)
    yield Row(
        what=f"a queue of {videos} videos of {minutes} min, downloaded from this machine: the model has work",
        goal=f"at least {GOAL_PERCENT} % of the time after the first",
        measured=f"{percent:.1f} % of {ended - began:.0f} s; it computes in {100 * model_s / wall_s:.0f} % (the micro "
        f"model: {windows} windows, {model_s / max(1, windows):.2f} s each)",
        met=percent >= GOAL_PERCENT,
        runs="1",
    )


def _transcribe(client: RawClient, urls: Sequence[str]) -> tuple[list[dict[str, Any]], float, int, float]:
    """Have addresses transcribed as background work.

    Return the jobs, as the model began them; and from the end of the first on: the seconds in which it computed, its
    windows, and the seconds that it all took. The numbers come with a heartbeat, so each may be a second old.
    """
    ids = [client.call("submit", source={"kind": "url", "url": url}, options=_OPTIONS)["job"]["id"] for url in urls]
    jobs = [client.call("result", job=ids[0], wait_s=None)["job"]]
    before, began = client.call("stats")["model"], time.monotonic()
    jobs += [client.call("result", job=number, wait_s=None)["job"] for number in ids[1:]]
    after, wall_s = client.call("stats")["model"], time.monotonic() - began
    if failed := [job["error"] for job in jobs if job["state"] != "done"]:
        raise Failed(f"a job has failed: {failed[0]}")
    jobs.sort(key=lambda job: float(job["started_at"]))
    return jobs, after["busy_s"] - before["busy_s"], after["windows"] - before["windows"], wall_s


def _covered_s(spans: Iterable[tuple[float, float]]) -> float:
    """Return how much time the spans cover together."""
    covered_s, until = 0.0, 0.0
    for start, end in sorted(spans):
        covered_s += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered_s


@contextmanager
def _serving(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing: a client looks at a file's beginning, leaves, and comes again for the whole."""

    server = Server(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
