"""System calls of a running process, seen and tampered with from outside: strace on the real thing."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
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
def traced(pids: int | Sequence[int], log: Path, *options: str) -> Iterator[None]:
    """Attach strace to processes, with the threads they have now, for a `with` block; not to what they start."""
    pids = [pids] if isinstance(pids, int) else pids
    tracer = _attach(pids, ["strace", "-y", "-ttt", "-s", "256", "-o", str(log), *options])
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


def _attach(pids: Sequence[int], command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start strace on every thread of the processes; again where one of them ended before strace got to it."""
    for _ in range(5):
        tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
        named = [argument for task in tasks for argument in ("-p", task.name)]
        tracer = subprocess.Popen([*command, *named], stderr=subprocess.DEVNULL)
        wait_until(
            lambda tracer=tracer, tasks=tasks: tracer.poll() is not None or all(map(_is_traced, tasks)),  # type: ignore[misc]
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


def _is_traced(task: Path) -> bool:
    try:
        return "TracerPid:\t0\n" not in (task / "status").read_text()
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
