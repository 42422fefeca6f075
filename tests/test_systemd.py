"""The installed service under a real systemd: started by a connection, killed, stopped, misconfigured, upgraded."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import sysconfig
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import whisperd
from tests.machine import Machine, requires_systemd
from tests.models import micro_checkpoint
from tests.support import to_toml, wait_until

pytestmark = requires_systemd

CHECKOUT = Path(__file__).parents[1]
# The machine's own copy of it: inside, /tmp is another, and what an install builds must not land in this one.
SOURCE = "/opt/checkout"
_NOT_SOURCE = shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache", "*.egg-info", "build")
LIB = "/usr/local/lib/whisperd"
SAMPLE = f"{SOURCE}/whisperd/assets/sample.flac"
# What `whisperctl` is told for the micro model: no second try at another temperature.
PLAIN = ("--language", "en", "--temperature", "0", "--option", "condition_on_previous_text=false")
CONFIGURATION = {"model": "/opt/models/micro.pt", "threads": 1}


def install(machine: Machine, source: str = SOURCE, version: str = whisperd.__version__) -> None:
    """`make install`, with an environment that borrows this one's packages instead of fetching them."""
    machine.run("/opt/python/bin/python3", "-m", "venv", "--without-pip", f"{LIB}/{version}")
    packages = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages/packages.pth"
    machine.write(f"{LIB}/{version}/{packages}", "/opt/packages\n")
    machine.run("make", "-C", source, "install", "PIP_FLAGS=--no-index --no-build-isolation")


def configure(machine: Machine, text: str = "") -> None:
    machine.write("/etc/whisperd/whisperd.toml", to_toml(CONFIGURATION) + text)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    # The daemon sees no home folder, and may not enter the one that this Python and its packages may lie in.
    machine = Machine({Path(sys.base_prefix): "/opt/python", Path(sysconfig.get_path("purelib")): "/opt/packages"})
    try:
        machine.write("/etc/ld.so.conf.d/python.conf", "/opt/python/lib\n")
        machine.run("ldconfig")
        shutil.copytree(CHECKOUT, machine.root / SOURCE[1:], ignore=_NOT_SOURCE)
        install(machine)
        for user in ("ada", "bob", "eve"):
            machine.run("useradd", "--create-home", user)
        for user in ("ada", "bob"):
            machine.run("usermod", "--append", "--groups", "whisperd", user)
        models = machine.root / "opt/models"
        models.mkdir(mode=0o755)
        micro_checkpoint(models).chmod(0o644)
        configure(machine)
        machine.run("systemctl", "enable", "--now", "whisperd.socket")
        yield machine
    finally:
        machine.close()


def whisperctl(machine: Machine, *arguments: str, user: str = "ada") -> str:
    return machine.run("whisperctl", *arguments, user=user).stdout


def main_pid(machine: Machine) -> int:
    return int(machine.show("whisperd", "MainPID"))


def wait_ready(machine: Machine) -> None:
    wait_until(lambda: machine.run("whisperctl", "health", check=False).returncode == 0, 60, "the daemon is ready")


def recording(machine: Machine, name: str, seconds: float) -> str:
    """Write a recording that nobody has had before, and return its path inside."""
    path = machine.root / "tmp" / name
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.random.default_rng().integers(-3000, 3000, int(seconds * 16_000), np.int16).tobytes())
    path.chmod(0o644)
    return f"/tmp/{name}"


def test_the_units_are_clean_and_say_why(machine: Machine) -> None:
    for manager, flag in (("system", "--system"), ("user", "--user")):
        folder = f"/usr/local/lib/systemd/{manager}"
        units = [f"{folder}/whisperd.socket", f"{folder}/whisperd.service"]
        for strict in ((), ("--recursive-errors=no",)):
            verify = ["env", "XDG_RUNTIME_DIR=/run", "systemd-analyze", flag, "verify", *strict, *units]
            done = machine.run(*verify)
            assert (done.stdout + done.stderr).strip() == ""
    score = machine.run("systemd-analyze", "security", "--no-pager", "whisperd").stdout.splitlines()[-1]
    assert float(score.split(":")[1].split()[0]) <= 1.6, score


def test_the_first_connection_starts_it_and_its_group_may_use_it(machine: Machine) -> None:
    machine.run("systemctl", "stop", "whisperd.service")
    assert machine.show("whisperd.service", "ActiveState") == "inactive"
    assert whisperctl(machine, "transcribe", SAMPLE, *PLAIN).strip()
    assert machine.show("whisperd.service", "ActiveState") == "active"
    wait_until(lambda: machine.show("whisperd", "StatusText").startswith("ready: micro on cpu; 0 waiting"), 10)
    job = whisperctl(machine, "submit", SAMPLE, *PLAIN).strip()
    refused = machine.run("whisperctl", "health", user="eve", check=False)
    assert refused.returncode == 3
    assert "belongs to the group 'whisperd'" in refused.stderr
    stranger = machine.run("whisperctl", "result", job, user="bob", check=False)
    assert stranger.returncode == 4, stranger
    assert whisperctl(machine, "list", "--quiet", user="bob") == ""


@pytest.mark.parametrize("whom", ["daemon", "model"])
def test_kill_9_loses_nothing(machine: Machine, whom: str) -> None:
    wait_ready(machine)
    before = main_pid(machine)
    jobs = [whisperctl(machine, "submit", recording(machine, f"{whom}{n}.wav", 60), *PLAIN).strip() for n in range(3)]
    if whom == "daemon":
        machine.run("kill", "-9", str(before))
    else:
        machine.run("pkill", "-9", "-f", "whisperd.model.main")
    states = whisperctl(machine, "wait", "--timeout", "60", *jobs)
    assert states.count("done") == 3, states
    assert (main_pid(machine) != before) == (whom == "daemon")


def test_a_loop_that_stands_still_is_replaced(machine: Machine) -> None:
    machine.write(
        "/run/systemd/system/whisperd.service.d/short.conf",
        "[Service]\nWatchdogSec=1\nTimeoutAbortSec=1\n",
    )
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "whisperd")
    wait_ready(machine)
    before = main_pid(machine)
    assert machine.show("whisperd", "NRestarts") == "0", "a loop that turns is left alone"
    machine.run("kill", f"-{signal.SIGSTOP.value}", str(before))
    wait_until(lambda: main_pid(machine) not in (0, before), 30, "systemd starts another")
    wait_ready(machine)
    assert any("Watchdog timeout" in entry["MESSAGE"] for entry in machine.journal("-u", "whisperd"))
    machine.run("rm", "-r", "/run/systemd/system/whisperd.service.d")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "whisperd")


def test_stopped_with_a_queue_it_goes_on_with_it(machine: Machine) -> None:
    wait_ready(machine)
    jobs = [whisperctl(machine, "submit", recording(machine, f"s{n}.wav", 120), *PLAIN).strip() for n in range(4)]
    machine.run("systemctl", "stop", "whisperd.service")
    assert machine.show("whisperd", "Result") == "success"
    assert machine.show("whisperd.socket", "ActiveState") == "active"
    states = whisperctl(machine, "wait", "--timeout", "60", *jobs)  # whose connection starts it again
    assert states.count("done") == 4, states


_STREAM = """
import os
from whisperctl import Client
answers = 0
while not os.path.exists("/tmp/enough"):
    with Client() as whisper:
        whisper.jobs()
    answers += 1
print(answers)
"""


def test_a_restart_refuses_nobody(machine: Machine) -> None:
    wait_ready(machine)
    streams = [machine.start(f"{LIB}/current/bin/python", "-c", _STREAM, user=user) for user in ("ada", "bob")]
    for _ in range(3):
        machine.run("systemctl", "restart", "whisperd")
    wait_ready(machine)
    machine.write("/tmp/enough", "")
    for stream in streams:
        answers, errors = stream.communicate(timeout=60)
        assert stream.returncode == 0, errors
        assert int(answers) > 3


def test_a_broken_configuration_is_told_and_mended(machine: Machine) -> None:
    configure(machine, "modle = 1\n")
    wrong = "/etc/whisperd/whisperd.toml: unknown key 'modle'; did you mean 'model'?"
    assert machine.run("systemctl", "restart", "whisperd", check=False).returncode != 0
    for _ in range(3):
        told = machine.run("whisperctl", "health", user="ada", check=False)
        assert told.returncode == 3
        assert wrong in told.stderr
    assert machine.show("whisperd.socket", "ActiveState") == "active"
    assert wrong in machine.show("whisperd", "StatusText")
    errors = machine.journal("-u", "whisperd", "-t", "whisperd", "-p", "crit")
    assert wrong in errors[-1]["MESSAGE"]
    configure(machine)
    wait_ready(machine)


def test_an_upgrade_keeps_queue_and_configuration(machine: Machine) -> None:
    wait_ready(machine)
    before = main_pid(machine)
    job = whisperctl(machine, "submit", recording(machine, "u.wav", 60), *PLAIN).strip()
    source, version = "/opt/next", "99.0.0"
    machine.run("mkdir", source)
    parts = "whisperd whisperctl systemd docs tools Makefile LICENSE README.md CHANGELOG.md".split()
    parts += ["setup.cfg", "setup.py", "pyproject.toml"]
    machine.run("cp", "-r", *(f"{SOURCE}/{part}" for part in parts), source)
    machine.run("sed", "-i", f's/^__version__ = .*/__version__ = "{version}"/', f"{source}/whisperd/__init__.py")
    install(machine, source, version)
    assert main_pid(machine) == before, "the running one is left alone"
    machine.run("systemctl", "restart", "whisperd")
    wait_ready(machine)
    assert json.loads(whisperctl(machine, "health", "--json"))["version"] == version
    assert "done" in whisperctl(machine, "wait", "--timeout", "60", job)
    install(machine)  # and back again; the state is the same version's
    machine.run("systemctl", "restart", "whisperd")
    wait_ready(machine)


def test_the_journal_reads_like_a_story(machine: Machine) -> None:
    wait_ready(machine)
    entries = machine.journal("-u", "whisperd", "-t", "whisperd")
    lines = [str(entry["MESSAGE"]) for entry in entries]
    assert not [line for line in lines if line.startswith("<")], "prefixes become priorities"
    started = next(entry for entry in entries if str(entry["MESSAGE"]).startswith("started version="))
    assert started["PRIORITY"] == "6"
    warned = [entry for entry in entries if str(entry["MESSAGE"]).startswith("helper killed")]
    assert all(entry["PRIORITY"] == "4" for entry in warned)


def test_uninstall_leaves_the_data_and_purge_nothing(machine: Machine) -> None:
    wait_ready(machine)
    machine.run("make", "-C", SOURCE, "uninstall")
    try:
        assert not (machine.root / LIB.lstrip("/")).exists()
        assert (machine.root / "var/lib/whisperd/whisperd.sqlite3").exists()
        assert (machine.root / "etc/whisperd/whisperd.toml").exists()
        machine.run("make", "-C", SOURCE, "purge")
        assert not (machine.root / "var/lib/whisperd").exists()
        assert not (machine.root / "etc/whisperd").exists()
        assert machine.run("id", "whisperd", check=False).returncode != 0
    finally:  # for the tests that other workers' order puts behind this one
        install(machine)
        for user in ("ada", "bob"):
            machine.run("usermod", "--append", "--groups", "whisperd", user)
        configure(machine)
        machine.run("systemctl", "enable", "--now", "whisperd.socket")
