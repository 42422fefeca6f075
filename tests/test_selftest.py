"""`whisperctl selftest`: ticks where all is well, and for each thing that is not a cross that says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import whisperd
from tests.peer import Peer
from tests.support import Daemon, need
from whisperctl import Client
from whisperctl.inspection import NAMES, Inspection, Step
from whisperd.model.loading import demo_folder

SPOKEN = (Path(whisperd.__file__).parent / "assets/sample.txt").read_text().strip()
GOOD_STATS: dict[str, Any] = {
    "software": {"torch": "2.13.0", "cuda": "13.0", "cuda_devices": 1, "cuda_problem": None, "av": "18", "ffmpeg": "8"},
    "lanes": {
        "fetch": {"extractors": ["youtube"], "yt_dlp": "2026.07.04", "yt_dlp_age_days": 9, "js_runtime": "deno 2.5"}
    },
    "free_bytes": 9e9,
    "min_free_bytes": 5e8,
    "jobs": {"since_start": {"done": 0}},
}


# --- a whole installation ---

# What no machine that runs tests has for sure: a yt-dlp of these days.
FRESH_YT_DLP = """
import datetime, sys
if "whisperd.fetch.fetcher" in sys.orig_argv:
    import yt_dlp.version
    yt_dlp.version.__version__ = datetime.date.today().strftime("%Y.%m.%d")
"""


@pytest.fixture
def whole(make_daemon: Callable[..., Daemon]) -> Daemon:
    need(demo_folder().exists(), "the demo model")
    daemon = make_daemon(model="demo")
    (daemon.folder / "sitecustomize.py").write_text(FRESH_YT_DLP)
    daemon.variables["PYTHONPATH"] = str(daemon.folder)
    daemon.start()
    return daemon


def test_a_whole_installation_passes_and_one_that_is_paused_does_not(whole: Daemon) -> None:
    done = whole.whisperctl("selftest")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["✓", name] for name in NAMES]
    assert ", deno " in lines[NAMES.index("yt-dlp")]
    with whole.client() as client:
        assert client.call("jobs") == {"jobs": [], "more": False}, "its jobs are forgotten"
        assert client.call("stats")["jobs"]["since_start"]["done"] == 2

        client.call("pause")
        answer = whole.whisperctl("selftest", "--timeout", "1", "--json")
        assert answer.returncode == 1
        steps = {step["name"]: step for step in json.loads(answer.stdout)["steps"]}
        assert {name for name, step in steps.items() if not step["ok"]} == {"model", "transcription", "stats"}
        assert "whisperctl resume" in steps["model"]["mend"]
        assert "waits at place" in steps["transcription"]["told"]
        assert client.call("jobs") == {"jobs": [], "more": False}, "and so are those that never ran"


def test_without_a_daemon(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "whisperctl", "--socket", str(tmp_path / "s"), "selftest"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"LC_ALL": "C", "PYTHONUTF8": "0"})
    first, *others = done.stdout.splitlines()
    assert first.startswith("no socket")
    assert "not running" in first
    assert [line.split(maxsplit=2) for line in others] == [["-", name, "not tried"] for name in NAMES[1:]]
    assert done.returncode == 3


# --- what may be wrong ---


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(tmp_path / "s")
    peer.stats = json.loads(json.dumps(GOOD_STATS))
    lock = threading.Lock()

    def transcribe(job_id: int) -> None:
        with lock:
            peer.hear(job_id, SPOKEN)
            peer.finish(job_id, SPOKEN)
            peer.stats["jobs"]["since_start"]["done"] += 1

    peer.on_submit = transcribe
    yield peer
    peer.stop()


def inspect(peer: Peer, **arguments: Any) -> dict[str, Step]:
    with Client(peer.path) as client:
        return {step.name: step for step in Inspection(client, **{"timeout_s": 10} | arguments).steps()}


def crosses(steps: dict[str, Step]) -> set[str]:
    assert tuple(steps) == NAMES
    for step in steps.values():
        assert bool(step.mend) == (not step.ok), step
    return {name for name, step in steps.items() if not step.ok}


def test_all_is_well(peer: Peer) -> None:
    assert crosses(inspect(peer)) == set()
    assert not peer.jobs
    assert peer.seen("submit") == 2
    background, waiting = sorted(
        (request.params for request in peer.requests if request.op == "submit"), key=lambda params: params.attached
    )
    assert (str(background.priority), str(waiting.priority)) == ("background", "interactive")
    assert background.fresh
    assert waiting.fresh


@pytest.mark.parametrize(
    ("where", "value", "step", "words"),
    [
        ("hello.uid", 65534, "permissions", "PrivateUsers"),
        ("health.version", "0.0.9", "versions", "same version"),
        ("health.model.state", "failed", "model", "log"),
        ("health.status", "degraded", "model", "the disk is nearly full"),
        ("health.status", "paused", "model", "the disk is nearly full"),
        ("stats.software.torch", None, "device", "log"),
        ("stats.software.ffmpeg", None, "ffmpeg", "pip install"),
        ("stats.lanes.fetch.yt_dlp", None, "yt-dlp", "pip install"),
        ("stats.lanes.fetch.yt_dlp_age_days", 91, "yt-dlp", "pip install -U"),
        ("stats.lanes.fetch.js_runtime", None, "yt-dlp", "pip install 'whisperd[server]'"),
        ("stats.free_bytes", 1e8, "disk", "min_free_bytes"),
    ],
)
def test_each_thing_that_is_wrong_is_its_own_cross(peer: Peer, where: str, value: Any, step: str, words: str) -> None:
    if where == "health.status":
        peer.health["problems"] = ["the disk is nearly full"]
    name, *keys, last = where.split(".")
    place = getattr(peer, name)
    for key in keys:
        place = place[key]
    place[last] = value
    steps = inspect(peer)
    assert crosses(steps) == {step}
    assert words in steps[step].mend


def test_what_is_no_fault(peer: Peer) -> None:
    peer.stats["lanes"]["fetch"] |= {"extractors": ["generic"], "js_runtime": None, "yt_dlp_age_days": None}
    peer.stats["software"] |= {"cuda_devices": 0, "cuda_problem": "no driver"}
    steps = inspect(peer)
    assert crosses(steps) == set()
    assert "no CUDA: no driver" in steps["device"].told
    peer.health["model"] |= {"state": "unloaded", "device": "", "dtype": ""}
    peer.stats["software"] |= {"cuda_devices": 2, "cuda_problem": None}
    steps = inspect(peer)
    assert crosses(steps) == set(), "asleep until the next job"
    assert "it sees CUDA (2)" in steps["device"].told
    peer.stats["lanes"]["fetch"] = {"extractors": []}
    assert crosses(inspect(peer)) == set()


def test_whom_one_is_behind_a_forwarded_socket(peer: Peer) -> None:
    peer.hello["uid"] = os.geteuid() + 1
    steps = inspect(peer)
    assert crosses(steps) == set()
    assert f"to the daemon uid {os.geteuid() + 1} (a forwarded socket?)" in steps["permissions"].told


def test_a_socket_that_everybody_may_replace(peer: Peer) -> None:
    folder = peer.path.parent
    folder.chmod(0o777)
    assert crosses(steps := inspect(peer)) == {"permissions"}
    assert f"chmod o-w {folder}" in steps["permissions"].mend
    folder.chmod(0o1777)
    assert crosses(inspect(peer)) == set()


def test_a_loading_model_is_waited_for(peer: Peer) -> None:
    peer.health["model"]["state"] = "loading"
    told: list[str] = []

    def sleep(seconds: float) -> None:
        peer.health["model"]["state"] = "ready" if len(told) > 2 else "loading"

    assert crosses(inspect(peer, tell=told.append, sleep=sleep)) == set()
    assert told[:2] == ["model micro loading"] * 2
    peer.health["model"]["state"] = "loading"
    clock = iter(range(0, 10_000, 100))
    steps = inspect(peer, clock=lambda: next(clock), sleep=lambda seconds: None)
    assert "wait longer" in steps["model"].mend


def test_other_words_than_the_spoken_ones(peer: Peer) -> None:
    def transcribe(job_id: int) -> None:
        peer.finish(job_id, "Thank you for watching.")

    peer.on_submit = transcribe
    steps = inspect(peer)
    assert crosses(steps) == {"transcription", "stats"}
    assert "Thank you for watching" in steps["transcription"].told


@pytest.mark.parametrize("ended", [True, False])
def test_a_sample_that_fails_or_does_not_come(peer: Peer, ended: bool) -> None:
    peer.on_submit = lambda job_id: peer.fail(job_id, "out_of_memory", "no room: choose less") if ended else None
    steps = inspect(peer, timeout_s=0.3)
    assert {name for name, step in steps.items() if not step.ok} == {"transcription", "stats"}
    assert ("no room: choose less" if ended else "no words in time") in steps["transcription"].told
    assert not peer.jobs, "cancelled, and forgotten"
    assert peer.seen("cancel") >= 2


def test_ctrl_c_leaves_no_job(peer: Peer) -> None:
    peer.on_submit = lambda job_id: None
    process = subprocess.Popen(
        [sys.executable, "-m", "whisperctl", "--socket", peer.path, "selftest"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": os.environ["PATH"]},
    )
    peer.wait_for(lambda: len(peer.jobs) == 2 and peer.subscribers)
    process.send_signal(2)
    assert process.communicate(timeout=20)[1] == b""
    assert process.returncode == 130
    assert not peer.jobs
