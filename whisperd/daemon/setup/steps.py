"""`whisperd setup`: the first five minutes, step by step, each of which may have been done already.

What it needs of the client it runs as a command: this package does not import that one.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from whisperd.daemon.config import Config, load_config
from whisperd.daemon.setup import user_units
from whisperd.protocol.catalogue import CHECKPOINTS, HOME_URL
from whisperd.protocol.paths import Paths, default_paths

_GIB = 2**30
_DEVICE_TIMEOUT_S = 120.0
# From what memory on a GPU takes a model with room for some recordings at a time; the first that fits.
_FOR_GPU = ((10 * _GIB, "large-v3"), (5 * _GIB, "turbo"), (2 * _GIB, "small"), (0, "base"))
# From how many cores on a processor is not much slower than speech.
_FOR_CORES = ((12, "small"), (4, "base"), (0, "tiny"))


class StepFailed(Exception):
    """A step cannot be done; the message says what to do about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a model could run on. `cores` counts the processor's, and `problem` says why no GPU is seen."""

    cuda: bool
    name: str
    memory_bytes: int
    cores: int
    problem: str = ""

    def proposal(self) -> str:
        """Return the name of a model that suits it."""
        table, amount = (_FOR_GPU, self.memory_bytes) if self.cuda else (_FOR_CORES, self.cores)
        return next(name for least, name in table if amount >= least)


class Setup:
    """For one user's own systemd (`user`), or for the machine."""

    def __init__(self, *, user: bool) -> None:
        if user and os.geteuid() == 0:
            raise StepFailed("root's whisperd is the machine's: run this without --user, or as the user it is for")
        self._user = user
        self._paths: Paths = default_paths()
        if self._paths.socket is None:
            raise StepFailed("$XDG_RUNTIME_DIR is not set: log in properly (not by su or sudo), and run this again")
        self._socket: Path = self._paths.socket

    # -- the steps -----------------------------------------------------------------------------------------------

    def run(self, model: str | None) -> int:
        """Do all steps; return 0 when whisperd works now. Raises `StepFailed`, and `ConfigError`."""
        self._install_socket()
        self._choose_model(model)
        config = load_config({}, os.environ, self._paths)
        self._restart_with(config)
        if not self._pull(config):
            return 1
        _say("test", "transcribing the sample that comes with whisperd")
        failed = self._client("selftest").returncode != 0
        if failed:
            _say("test", "what has a cross above is still to be mended; run this again whenever you like")
        _say("done", f"try: {_shown('whisperctl')} transcribe FILE")
        return int(failed)

    def remove(self) -> int:
        """Undo what `run` did to systemd; what it fetched and what was transcribed stays."""
        if not self._user:
            raise StepFailed("for the machine: make uninstall, where you ran make install")
        self._systemctl("disable", "--now", "whisperd.socket", "whisperd.service", check=False)
        gone = user_units.remove(user_units.folder())
        self._systemctl("daemon-reload", check=False)
        _say("socket", "closed" + "".join(f"; removed {path}" for path in gone))
        paths = self._paths
        _say("kept", f"{paths.config_file}, {paths.state_dir} (jobs, transcripts), {paths.cache_dir} (models)")
        return 0

    def _install_socket(self) -> None:
        if not self._user:
            if self._systemctl("cat", "whisperd.socket", check=False).returncode:
                raise StepFailed("whisperd is not installed for the machine: make install; or whisperd setup --user")
            self._systemctl("enable", "--now", "whisperd.socket")
            _say("socket", f"open at {self._socket}; whoever is in the group whisperd may use it")
            return
        if self._systemctl("show", "--property=Version", check=False).returncode:
            raise StepFailed(
                "your systemd cannot be reached (systemctl --user): log in properly (not by su or sudo), or run "
                f"{_shown('whisperd')} in a terminal, which needs no set-up"
            )
        if self._systemctl("is-active", "whisperd.socket", check=False).returncode and _answers(self._socket):
            raise StepFailed(f"a whisperd from elsewhere answers on {self._socket}: stop it, and run this again")
        written = [] if user_units.shared() else user_units.write(user_units.folder())
        self._systemctl("daemon-reload")
        self._systemctl("enable", "--now", "whisperd.socket")
        _say("socket", f"open at {self._socket}" + "".join(f"; wrote {path}" for path in written))

    def _choose_model(self, wanted: str | None) -> None:
        """Write the model into the configuration, unless one stands there already and no other is wanted."""
        file = self._paths.config_file
        config = load_config({}, os.environ, self._paths)
        lines = file.read_text().splitlines() if file.exists() else []
        chosen = [line for line in lines if line.partition("=")[0].strip() == "model"]
        if chosen and wanted in (None, config.model):
            _say("model", f"{config.model}, as {file} says")
            return
        if wanted is None:
            device = look_at_device()
            wanted = device.proposal()
            _say("device", _described(device))
        if chosen:
            raise StepFailed(f"{file} says {chosen[0].strip()!r}: change that line to model = {json.dumps(wanted)}")
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.new")
        # First: whatever else the file may have, a key at its beginning belongs to no section.
        new.write_text("\n".join([f"model = {json.dumps(wanted)}", *lines, ""]))
        new.chmod(file.stat().st_mode & 0o777 if file.exists() else 0o644)
        new.replace(file)
        _say("model", f"{wanted}, written into {file}; another: change that line, and restart whisperd")

    def _restart_with(self, config: Config) -> None:
        """Restart a daemon that runs with another model than the configuration names by now."""
        answer = self._client("health", "--json", output=subprocess.PIPE).stdout
        try:
            running = json.loads(answer)["model"]["name"]
        except (ValueError, KeyError):  # it does not start: the selftest will say why
            return
        if running != config.model and config.model in {*CHECKPOINTS, "demo"}:
            self._systemctl("try-restart", "whisperd.service")

    def _pull(self, config: Config) -> bool:
        """Return whether the model is there, or needs no download."""
        checkpoint = CHECKPOINTS.get(config.model)
        if checkpoint is None:  # a path, `demo`, a name of the configuration's own
            return True
        _say("model", f"looking for {checkpoint.file_name}, or fetching it")
        if self._client("model", "pull", config.model).returncode == 0:
            return True
        _say(
            "model",
            f"{config.model} is not here and could not be fetched. On a machine that can: fetch\n"
            f"  {checkpoint.url(config.models_url or HOME_URL)}\n"
            f"and put it at\n  {checkpoint.home(config.cache_dir)}\nthen run this again",
        )
        return False

    # -- other programs --------------------------------------------------------------------------------------------

    def _systemctl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["systemctl", *(["--user"] if self._user else []), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        except FileNotFoundError:
            raise StepFailed(f"there is no systemd here: run {_shown('whisperd')} in a terminal instead") from None
        if check and done.returncode:
            raise StepFailed(f"{shlex.join(command)}: {done.stderr.strip() or done.returncode}")
        return done

    def _client(self, *arguments: str, output: int | None = None) -> subprocess.CompletedProcess[bytes]:
        """Run `whisperctl`, where its user sees it unless `output` says otherwise."""
        command = [str(user_units.program().with_name("whisperctl")), "--socket", str(self._socket), *arguments]
        return subprocess.run(command, check=False, stdout=output)


def look_at_device() -> Device:
    """Return what a model could run on, seen by a process of its own. Raises `StepFailed`."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "whisperd.model.device"],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            timeout=_DEVICE_TIMEOUT_S,
            check=True,
        )
        return Device(**json.loads(done.stdout), cores=len(os.sched_getaffinity(0)))
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        raise StepFailed(f"torch does not start ({error}): install whisperd anew; or name a --model") from None


def _described(device: Device) -> str:
    memory = f"{device.memory_bytes / _GIB:.0f} GiB"
    if device.cuda:
        return f"{device.name} with {memory}"
    return f"no GPU{f' ({device.problem})' if device.problem else ''}, {device.name}, {memory} of memory"


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return False
    return True


def _shown(name: str) -> str:
    """Return a program as a user has to type it."""
    path = user_units.program().with_name(name)
    found = shutil.which(name)
    return name if found and os.path.samefile(found, path) else shlex.quote(str(path))


def _say(step: str, text: str) -> None:
    first, *more = text.split("\n")
    click.echo(f"{step:>7}  {first}")
    for line in more:
        click.echo(f"{'':>7}  {line}")
