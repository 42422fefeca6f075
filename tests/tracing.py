"""System calls of a running process, seen and tampered with from outside: strace on the real thing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support import wait_until

_CALL = re.compile(r"^(\d+) +(\d+\.\d+) (\w+)\((.*)\) += (-?\d+)(.*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemCall:
    """A system call that came back: in the order of the trace. `arguments` name the files behind descriptors."""

    pid: int
    name: str
    arguments: str
    result: int


@contextmanager
def traced(pids: int | Sequence[int], log: Path, *options: str, first_thread_only: bool = False) -> Iterator[None]:
    """Attach strace to processes, with the threads they have now, for a `with` block; not to what they start.

    With `first_thread_only` a helper's heartbeats are not seen, nor counted among its other words.
    """
    pids = [pids] if isinstance(pids, int) else pids
    command = ["strace", "-y", "-ttt", "-s", "256", "-o", str(log), *options]
    with _attached(lambda: [n for pid in pids for n in ([pid] if first_thread_only else _threads(pid))], command):
        yield


@contextmanager
def traced_new_threads(pid: int, log: Path, *options: str) -> Iterator[None]:
    """As `traced`, for the first thread of a process and those that are started meanwhile.

    strace follows new threads only where it takes all that are there: so another one, which looks at nothing, has them.
    """
    with (
        _attached(lambda: [thread for thread in _threads(pid) if thread != pid], ["strace", "-qq", "-e", "trace=none"]),
        traced(pid, log, "-f", *options, first_thread_only=True),
    ):
        yield


def traced_whole(log: Path, *options: str) -> list[str]:
    """Return the command that starts a program under strace, from its first call on, with all that it starts itself.

    The program has the pid that was started; strace is a stranger to it, and ends with the last of them.
    """
    return ["strace", "-D", "-f", "-q", "--seccomp-bpf", "-ttt", "-o", str(log), *options]


def _threads(pid: int) -> list[int]:
    return [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]


@contextmanager
def _attached(threads: Callable[[], list[int]], command: Sequence[str]) -> Iterator[None]:
    tracer = _attach(threads, command)
    try:
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        try:
            tracer.wait(5)
        except subprocess.TimeoutExpired:
            # It can wait for ever for a process that ended with all its threads at once; and until it is gone, nobody
            # else hears of that end.
            tracer.kill()
            tracer.wait()


def _attach(threads: Callable[[], list[int]], command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start strace on threads; again where one of them ended before strace got to it."""
    for _ in range(5):
        wanted = threads()
        named = [argument for thread in wanted for argument in ("-p", str(thread))]
        tracer = subprocess.Popen([*command, *named], stderr=subprocess.DEVNULL)
        wait_until(
            lambda tracer=tracer, wanted=wanted: tracer.poll() is not None or all(map(_is_traced, wanted)),  # type: ignore[misc]
            message="strace holds every thread",
        )
        if tracer.poll() is None:
            return tracer
    raise AssertionError("strace ended at once: may it trace here?")


def wait_for_end(pid: int) -> None:
    """Wait until a traced process has ended. Its exit code is told only after `traced`."""
    wait_until(lambda: _has_ended(pid), 60, f"the process {pid} ends")


def _has_ended(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def _is_traced(thread: int) -> bool:
    try:
        return "TracerPid:\t0\n" not in Path(f"/proc/{thread}/status").read_text()
    except OSError:  # it has ended
        return True


def calls(log: Path) -> list[SystemCall]:
    """Return the calls of a trace in the order in which they came back."""
    begun: dict[int, str] = {}
    found = []
    for line in log.read_text(errors="replace").splitlines():
        pid, _, rest = line.partition(" ")
        if rest.endswith("<unfinished ...>"):
            begun[int(pid)] = line.removesuffix("<unfinished ...>").rstrip()
            continue
        if (resumed := re.match(r"\s*\d+\.\d+ <\.\.\. \w+ resumed>(.*)$", rest)) and int(pid) in begun:
            line = begun.pop(int(pid)) + resumed[1]
        if match := _CALL.match(line):
            found.append(SystemCall(pid=int(match[1]), name=match[3], arguments=match[4], result=int(match[5])))
    return found


def killed_at(log: Path) -> str:
    """Return the call that a traced process did not live to make, as far as strace wrote it down."""
    found = ""
    for line in log.read_text(errors="replace").splitlines():
        if ("= ?" in line or line.endswith("<unfinished ...>")) and " resumed>" not in line:
            found = line
    return found
