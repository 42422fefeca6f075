"""The service as it is installed, on a machine of its own with a real systemd: what its tests share."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import whisperd
from tests.machine import Machine
from tests.models import micro_checkpoint
from tests.support import to_toml, wait_until

CHECKOUT = Path(__file__).parents[1]
# The machine's own sources: inside, /tmp is another, and what an install builds must not land in this checkout.
SOURCE = "/opt/checkout"
_NOT_SOURCE = shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache", "*.egg-info", "build")
LIB = "/usr/local/lib/whisperd"
PYTHON = f"{LIB}/current/bin/python"
SAMPLE = f"{SOURCE}/whisperd/assets/sample.flac"
# What `whisperctl` is told for the micro model: no second try at another temperature.
PLAIN = ("--language", "en", "--temperature", "0", "--option", "condition_on_previous_text=false")
CONFIGURATION: dict[str, Any] = {
    "model": "/opt/models/micro.pt",
    "threads": 1,
    "fetch_allow_private": True,
    "fetch_extractors": ["generic"],
}


def pack(folder: Path) -> Path:
    """Make the archive of the sources that is handed on, below an empty folder; return its path."""
    source, built = folder / "source", folder / "built"
    shutil.copytree(CHECKOUT, source, symlinks=True, ignore=_NOT_SOURCE)
    built.mkdir()
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(built)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=120)
    (archive,) = built.iterdir()
    return archive


def unpack(machine: Machine, target: str) -> None:
    """Unpack that archive on the machine."""
    with tempfile.TemporaryDirectory(prefix="wd-", dir="/tmp") as folder, tarfile.open(pack(Path(folder))) as packed:
        packed.extractall(machine.root / "tmp", filter="data")
        machine.run("mv", f"/tmp/{packed.getnames()[0]}", target)


def install(machine: Machine, source: str = SOURCE, version: str = whisperd.__version__, **variables: str) -> None:
    """`make install`, with an environment that borrows this one's packages instead of fetching them."""
    lib = f"{variables.get('DESTDIR', '')}{variables.get('PREFIX', '/usr/local')}/lib/whisperd"
    machine.run("/opt/python/bin/python3", "-m", "venv", "--without-pip", f"{lib}/{version}")
    packages = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages/packages.pth"
    machine.write(f"{lib}/{version}/{packages}", "/opt/packages\n")
    given = [f"{name}={value}" for name, value in variables.items()]
    machine.run("make", "-C", source, "install", "PIP_FLAGS=--no-index --no-build-isolation", *given)


def configure(machine: Machine, text: str = "", **settings: Any) -> None:
    """Write the configuration with these settings, and `text` below it."""
    machine.write("/etc/whisperd/whisperd.toml", to_toml(CONFIGURATION | settings) + text)


def let_in(machine: Machine) -> None:
    """Let ada and bob use the service, and start its socket."""
    for user in ("ada", "bob"):
        machine.run("usermod", "--append", "--groups", "whisperd", user)
    configure(machine)
    machine.run("systemctl", "enable", "--now", "whisperd.socket")


@contextmanager
def installed_machine() -> Iterator[Machine]:
    """A machine with the service on it; ada and bob may use it, eve may not."""
    # The daemon sees no home folder, and may not enter the one that this Python and its packages may lie in.
    machine = Machine({Path(sys.base_prefix): "/opt/python", Path(sysconfig.get_path("purelib")): "/opt/packages"})
    try:
        machine.write("/etc/ld.so.conf.d/python.conf", "/opt/python/lib\n")
        machine.run("ldconfig")
        unpack(machine, SOURCE)
        install(machine)
        for user in ("ada", "bob", "eve"):
            machine.run("useradd", "--create-home", user)
        models = machine.root / "opt/models"
        models.mkdir(mode=0o755)
        micro_checkpoint(models).chmod(0o644)
        let_in(machine)
        yield machine
    finally:
        machine.close()


def whisperctl(machine: Machine, *arguments: str, user: str = "ada") -> str:
    """Run `whisperctl` as a user, and return what it says on stdout."""
    return machine.run("whisperctl", *arguments, user=user).stdout


def main_pid(machine: Machine) -> int:
    """Return the daemon's pid, 0 when it does not run."""
    return int(machine.show("whisperd", "MainPID"))


def health(machine: Machine) -> dict[str, Any]:
    """Return what `health` says, empty when nobody answers."""
    answer = machine.run("whisperctl", "health", "--json", check=False).stdout
    found: dict[str, Any] = json.loads(answer) if answer.startswith("{") else {}
    return found


def wait_up(machine: Machine) -> None:
    """Wait until the daemon answers; its model may still be loading, which takes its time and concerns few tests."""
    wait_until(lambda: health(machine).get("status") in ("starting", "ready", "degraded"), 60, "the daemon answers")


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


@contextmanager
def without_model(machine: Machine, **settings: Any) -> Iterator[None]:
    """Run the daemon without a model for a `with` block: it starts at once, and takes no time of others' processors.

    Afterwards it is stopped, and the next connection starts it as usual.
    """
    configure(machine, model="tiny", models_url="", **settings)
    machine.run("systemctl", "restart", "whisperd")
    try:
        yield
    finally:
        configure(machine)
        machine.run("systemctl", "stop", "whisperd.service")


@contextmanager
def drop_in(machine: Machine, unit: str, *lines: str) -> Iterator[None]:
    """Change a unit's `[Service]` for a `with` block. What runs already goes on as it is."""
    folder = f"/run/systemd/system/{unit}.d"
    machine.write(f"{folder}/test.conf", "\n".join(["[Service]", *lines, ""]))
    machine.run("systemctl", "daemon-reload")
    try:
        yield
    finally:
        machine.run("rm", "-r", folder)
        machine.run("systemctl", "daemon-reload")
