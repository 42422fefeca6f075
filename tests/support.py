"""What tests share: waiting, whole daemons in folders of their own, a raw client, spoken recordings."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from whisperd.protocol.channel import Channel
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.frames import MAX_REPLY_BYTES

IN_CI = os.environ.get("CI") == "true"


# --- what a machine may lack ---


def need(there: bool, what: str) -> None:
    """Skip the running test when something of the machine is missing; in CI fail, as nothing may be missing there."""
    if not there:
        (pytest.fail if IN_CI else pytest.skip)(f"this test needs {what}")


requires_root = pytest.mark.requires(os.geteuid() == 0, "root")


def requires_program(name: str) -> pytest.MarkDecorator:
    """Return a mark for tests that run a program of Debian's."""
    return pytest.mark.requires(shutil.which(name) is not None, f"the program {name} (apt-get install {name})")


# --- waiting ---


def wait_until(predicate: Callable[[], Any], timeout_s: float = 30, message: str = "") -> Any:
    """Return the first true value of `predicate()`, asked again and again; fail the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := predicate()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s:g} s in vain: {message or predicate}")
        time.sleep(0.02)
    return value


# --- speaking the protocol, byte by byte ---


class RawClient:
    """A connection that a test drives by hand. Replies come back as the maps they are.

    `call` sends and waits for the reply under that id; what else arrives meanwhile is kept for `receive`.
    """

    def __init__(self, path: Path | socket.socket) -> None:
        if isinstance(path, socket.socket):
            self.socket = path
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(str(path))
        self.channel = Channel(self.socket, max_bytes=MAX_REPLY_BYTES)
        self._last_id = 0
        self._kept: list[dict[str, Any]] = []

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.channel.close()

    def send(self, op: str, /, *, descriptors: Sequence[int] = (), **params: Any) -> int:
        """Send a request and return its id."""
        self._last_id += 1
        self.channel.send({"id": self._last_id, "op": op, "params": params}, descriptors)
        return self._last_id

    def send_bytes(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send bytes as they are."""
        sent = socket.send_fds(self.socket, [data], list(descriptors)) if descriptors else 0
        self.socket.sendall(data[sent:])

    def receive(self, timeout_s: float = 30) -> dict[str, Any]:
        """Return the next map that nobody has taken. Raises `EOFError` or `TimeoutError`."""
        return self._kept.pop(0) if self._kept else self.channel.receive(timeout_s)[0]

    def receive_until(self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float = 30) -> dict[str, Any]:
        """Return the first map that is `wanted`; the others stay for later, in order."""
        for index, message in enumerate(self._kept):
            if wanted(message):
                return self._kept.pop(index)
        deadline = time.monotonic() + timeout_s
        while not wanted(message := self.channel.receive(max(0.01, deadline - time.monotonic()))[0]):
            self._kept.append(message)
        return message

    def reply(self, number: int, timeout_s: float = 30) -> dict[str, Any]:
        """Return the reply to a request, ok or not."""
        return self.receive_until(lambda message: message["id"] == number and "ok" in message, timeout_s)

    def call(
        self, op: str, /, *, descriptors: Sequence[int] = (), timeout_s: float = 30, **params: Any
    ) -> dict[str, Any]:
        """Send a request and return its result. Raises `WhisperdError` with the reply's code."""
        reply = self.reply(self.send(op, descriptors=descriptors, **params), timeout_s)
        if not reply["ok"]:
            raise WhisperdError(reply["error"]["code"], reply["error"]["message"])
        result: dict[str, Any] = reply["result"]
        return result

    def submit(self, path: Path | str, **params: Any) -> dict[str, Any]:
        """Hand over a file and return its Job map (`options`, `priority`, `key`, ... as the operation has them)."""
        with open(path, "rb") as file:
            source = {"kind": "fd", "name": Path(path).name}
            job: dict[str, Any] = self.call("submit", descriptors=[file.fileno()], source=source, **params)["job"]
        return job

    def result(self, job: int, timeout_s: float = 120) -> dict[str, Any]:
        """Wait for a job's end and return `{"job": ..., "transcript": ...}`."""
        return self.call("result", job=job, wait_s=None, timeout_s=timeout_s)


def error_of(call: Callable[[], Any]) -> str:
    """Return the code of the error that `call` raises."""
    with pytest.raises(WhisperdError) as caught:
        call()
    return caught.value.code


# --- the micro model ---

# No fallback through the temperatures, no end before its time: a window of the micro model takes 0.1 s.
PLAIN_OPTIONS: dict[str, Any] = {"language": "en", "temperature": 0, "condition_on_previous_text": False}


def submit(client: RawClient, path: Path, **params: Any) -> dict[str, Any]:
    """Hand over a file with `PLAIN_OPTIONS` unless others are given; return its Job map."""
    return client.submit(path, **{"options": PLAIN_OPTIONS} | params)


def write_noise(path: Path, seconds: float) -> Path:
    """Write a WAV of noise that nobody has had before, and return its path."""
    rng = np.random.default_rng()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(rng.integers(-3000, 3000, int(seconds * 16_000), dtype=np.int16).tobytes())
    return path


# --- disks ---


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount an empty file system of `size` (such as "24m") on `folder` for a `with` block. Needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


# --- whole daemons ---

# Jobs are accepted, decoded, and wait. A name whose file is not there and is not downloaded: the daemon knows so by
# itself. For a path it would start the model's process, which imports torch for seconds to find nothing.
NO_MODEL = "tiny"


class Daemon:
    """`python -m whisperd` in a temporary folder of its own, with a clean environment.

    Settings are the keys of the configuration file. No model is downloaded, unless `models_url` says from where. The
    folder's path is short: a socket's may have 107 bytes.
    """

    def __init__(self, **settings: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="wd-", dir="/tmp"))
        self.socket = self.folder / "s"
        self.state_dir = self.folder / "state"
        self.cache_dir = self.folder / "cache"
        self.config_file = self.folder / "whisperd.toml"
        self.log_file = self.folder / "stderr"
        self.settings: dict[str, Any] = {"threads": 1, "models_url": ""} | settings
        self.variables: dict[str, str] = {}  # beside the clean environment
        self.before: list[str] = []  # a command that starts it, under its own pid
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None, "the daemon was not started"
        return self.process.pid

    def environment(self) -> dict[str, str]:
        """Return the clean environment of everything that is started for this daemon."""
        kept = {
            name: os.environ[name] for name in ("PATH", "OPENBLAS_CORETYPE", "NUMBA_CACHE_DIR") if name in os.environ
        }
        home = {"HOME": str(self.folder), "XDG_RUNTIME_DIR": str(self.folder), "LANG": "C.UTF-8"}
        return kept | home | self.variables

    def start(self, *arguments: str, wait: bool = True, ready: bool = False, timeout_s: float = 60) -> None:
        """Start it, and wait until its socket answers; with `ready` also until the model does."""
        self.config_file.write_text(to_toml(self.settings))
        command = [*self.before, sys.executable, "-m", "whisperd", "--config", str(self.config_file)]
        command += ["--socket", str(self.socket), "--state-dir", str(self.state_dir)]
        command += ["--cache-dir", str(self.cache_dir), *arguments]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if wait:
            wait_until(self.answers, timeout_s, "the daemon answers on its socket")
        if ready:
            self.wait_ready(timeout_s)

    def answers(self) -> bool:
        """True once a connection is accepted and answered; fails the test when the daemon has ended instead."""
        assert self.process is not None, "the daemon was not started"
        if (code := self.process.poll()) is not None:
            pytest.fail(f"the daemon ended with exit code {code}:\n{self.log()}")
        try:
            with self.client() as client:
                return bool(client.call("hello")["server"] == "whisperd")
        except OSError:
            return False

    def wait_ready(self, timeout_s: float = 60) -> None:
        """Wait until the model is loaded; fail the test when it cannot be."""

        def ready() -> bool:
            health = client.call("health")
            if health["model"]["state"] == "failed":
                pytest.fail(f"the model cannot be loaded: {health['problems']}")
            return bool(health["status"] == "ready")

        with self.client() as client:
            wait_until(ready, timeout_s, "the model is ready")

    def client(self) -> RawClient:
        """Return a new connection; the caller closes it."""
        return RawClient(self.socket)

    def whisperctl(
        self, *arguments: str, stdin: bytes | None = None, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line against this daemon, in a pipe."""
        done = subprocess.run(
            [Path(sys.executable).with_name("whisperctl"), "--socket", str(self.socket), *arguments],
            input=b"" if stdin is None else stdin,
            capture_output=True,
            cwd=self.folder,
            env=self.environment(),
            timeout=timeout_s,
            check=False,
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def log(self) -> str:
        """Return what it wrote to stderr so far, over all its starts."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def children(self) -> list[psutil.Process]:
        """Return its helpers."""
        return psutil.Process(self.pid).children(recursive=True)

    def helpers(self, module: str) -> list[psutil.Process]:
        """Return the living helpers that run a module, such as `whisperd.model.main`."""
        return [child for child in self.children() if module in _command_line(child)]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill -9, and wait until it and its helpers are gone."""
        self._end(signal.SIGKILL, 10)

    def stop(self, timeout_s: float = 15) -> int:
        """Ask it to stop; return its exit code. Fails the test if a helper outlives it."""
        return self._end(signal.SIGTERM, timeout_s)

    def _end(self, number: int, timeout_s: float) -> int:
        assert self.process is not None, "the daemon was not started"
        try:
            helpers = self.children() if self.process.poll() is None else []
        except psutil.NoSuchProcess:
            helpers = []
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"the daemon did not end within {timeout_s:g} s of signal {number}")
        self.process = None
        deadline = time.monotonic() + 5
        while (left := [helper for helper in helpers if not has_ended(helper)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        for helper in left:
            helper.kill()
        assert not left, f"helpers outlived the daemon: {left}"
        return code

    def close(self) -> None:
        """Stop it if it runs, and delete its folder."""
        try:
            if self.process is not None:
                self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def client_as(daemon: Daemon, uid: int) -> RawClient:
    """Connect as somebody else (as root): the kernel notes who connects, not who sends."""
    daemon.folder.chmod(0o755)
    os.seteuid(uid)
    try:
        return daemon.client()
    finally:
        os.seteuid(0)


@contextmanager
def running_daemon(*, wait: bool = True, ready: bool = False, **settings: Any) -> Iterator[Daemon]:
    """Start a daemon for a `with` block (or a fixture of a module's own); its log is printed where something raises."""
    daemon = Daemon(**settings)
    try:
        daemon.start(wait=wait, ready=ready)
        yield daemon
    except BaseException:
        print(daemon.log(), file=sys.stderr)
        raise
    finally:
        daemon.close()


def to_toml(settings: Mapping[str, Any]) -> str:
    """Return flat settings as a TOML file."""

    def value(item: Any) -> str:
        if isinstance(item, bool):
            return str(item).lower()
        if isinstance(item, list | tuple):
            return "[" + ", ".join(map(value, item)) + "]"
        if isinstance(item, int | float):
            return str(item)
        return '"' + str(item).replace("\\", "\\\\").replace('"', '\\"') + '"'

    return "".join(f"{name} = {value(item)}\n" for name, item in settings.items() if item is not None)


def files_in(folder: Path) -> list[Path]:
    """Return all files under a folder, as far as they stay there meanwhile (a glob fails at a folder that goes)."""
    return [Path(place, name) for place, _, names in os.walk(folder) for name in names]


def has_ended(process: psutil.Process) -> bool:
    """True once a process has ended, also where nobody has asked how yet: an init may take seconds for orphans."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def stop_process(pid: int) -> None:
    """Stop a process with SIGSTOP and wait until it stands: on another processor it goes on for a moment."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, message=f"{pid} stands")


def _command_line(process: psutil.Process) -> list[str]:
    """Return a process's arguments; none once it has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie too
        return []


# --- speech ---


def speak(text: str, path: Path, voice: str = "slt") -> Path:
    """Speak English text into a WAV file with flite (voices: slt rms awb kal16) and return the path."""
    need(shutil.which("flite") is not None, "the program flite (apt-get install flite)")
    subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(path)], check=True, capture_output=True)
    return path


def speak_apart(text: str, path: Path, *, every_s: float) -> Path:
    """Speak the sentences of a text into a WAV file, one every so many seconds: a long recording of few words."""
    with wave.open(str(path), "wb") as whole:
        for number, sentence in enumerate(text.split(". ")):
            with wave.open(str(speak(sentence, path.with_name(f"{path.stem}-{number}.wav"), voice="rms"))) as part:
                if number == 0:
                    whole.setparams(part.getparams())
                silence = bytes(2 * round(every_s * part.getframerate()))
                whole.writeframes((part.readframes(part.getnframes()) + silence)[: len(silence)])
    return path
