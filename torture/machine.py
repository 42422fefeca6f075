"""The daemon that is tortured: started and killed in every way, on a small disk that can be filled."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil

from tests.support import Daemon, RawClient, fill
from torture.report import Report

HELPERS = ("whisperd.audio.copier", "whisperd.audio.decoder", "whisperd.model.main")
_START_S = 120.0
_ORPHAN_S = 60.0  # dying takes processor time too, and torture may run at the lowest priority


class Victim:
    """One daemon with its helpers and its disk. What it does wrong by itself is told to `report`."""

    def __init__(self, report: Report, **settings: Any) -> None:
        self.report = report
        self.daemon = Daemon(**settings)
        self.has_small_disk = False
        self.full = False

    # --- the disk ---

    def mount(self, size: str) -> None:
        """Put the state on a small file system of its own; needs root."""
        self.daemon.state_dir.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.daemon.state_dir)]
        subprocess.run(command, check=True)
        self.has_small_disk = True

    @property
    def _filling(self) -> Path:
        return self.daemon.state_dir / "somebody-elses"

    def fill_disk(self) -> None:
        """Take all that is free."""
        fill(self._filling)
        self.full = True

    def empty_disk(self) -> None:
        """Give it back."""
        self._filling.unlink(missing_ok=True)
        self.full = False

    # --- the daemon ---

    def start(self) -> None:
        """Start it and wait until it answers. On a full disk it may refuse, saying so: then the disk is emptied."""
        for _ in range(3):
            self.daemon.start(wait=False)
            if self._answers_in_time():
                self.report.count("starts of the daemon")
                return
            code = self._code()
            if not self.full:
                self.report.violate(f"the daemon does not start: exit code {code}: {self.daemon.log()[-500:]}")
            self.report.count(f"starts refused on a full disk (exit code {code})")
            self.empty_disk()
        raise RuntimeError(f"the daemon does not start:\n{self.daemon.log()[-3000:]}")

    def _answers_in_time(self) -> bool:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._code() is None:
            with suppress(OSError, EOFError), RawClient(self.daemon.socket) as client:
                client.call("hello", timeout_s=_START_S)
                return True
            time.sleep(0.02)
        return False

    def _code(self) -> int | None:
        assert self.daemon.process is not None
        return self.daemon.process.poll()

    def check_alive(self) -> None:
        """Start it again if it has ended by itself, which it may only when storage failed under it."""
        code = self._code()
        if code is not None:
            self.report.count(f"ends of the daemon by itself (exit code {code})")
            self.report.require(code == 1 and self.full, f"the daemon ended by itself with exit code {code}")
            self.start()

    def end(self, number: int, grace_s: float = 30.0) -> None:
        """Send the daemon a signal that ends it, and see that its helpers end with it."""
        helpers = self.helpers()
        assert self.daemon.process is not None
        self.daemon.process.send_signal(number)
        try:
            self.daemon.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.report.violate(f"the daemon did not end within {grace_s:g} s of signal {number}")
            self.daemon.process.kill()
            self.daemon.process.wait()
        for helper in helpers:  # one that stands still cannot see its daemon end
            with suppress(psutil.NoSuchProcess):
                helper.resume()
        deadline = time.monotonic() + _ORPHAN_S
        while (left := [helper for helper in helpers if is_alive(helper)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.report.require(not left, f"helpers outlived the daemon: {left}")
        for helper in left:
            helper.kill()

    def stand_still(self, seconds: float) -> None:
        """SIGSTOP, and on again."""
        os.kill(self.daemon.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(self.daemon.pid, signal.SIGCONT)

    # --- helpers ---

    def helpers(self, module: str = "") -> list[psutil.Process]:
        """Return the living helpers, all or those of one module."""
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.daemon.pid).children()
            return [child for child in children if module in (module, *command_line(child))]
        return []

    def hurt_helper(self, random: Random, module: str, how: str) -> bool:
        """Hurt one helper of a module: `KILL`, `SEGV`, `STOP` or `memory`. False when there is none."""
        found = self.helpers(module)
        if module:
            found = [helper for helper in found if module in command_line(helper)]
        if not found:
            return False
        helper = random.choice(found)
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if how == "memory":
                resource.prlimit(helper.pid, resource.RLIMIT_AS, (2**20, 2**20))
            else:
                os.kill(helper.pid, getattr(signal, f"SIG{how}"))
        return True

    # --- the end ---

    def close(self) -> None:
        """End what runs and remove what was made."""
        try:
            if self.daemon.process is not None and self._code() is None:
                os.kill(self.daemon.pid, signal.SIGCONT)
                self.end(signal.SIGKILL)
            self.daemon.process = None
        finally:
            if self.has_small_disk:
                subprocess.run(["umount", "--lazy", str(self.daemon.state_dir)], check=False)
            self.daemon.close()


def is_alive(process: psutil.Process) -> bool:
    """True until a process has ended; that its new parent has not heard of it yet does not make it live."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_line(process: psutil.Process) -> list[str]:
    """Return a process's arguments; none once it has ended."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


@contextmanager
def victim(report: Report, *, disk: str | None = None, **settings: Any) -> Iterator[Victim]:
    """Prepare a daemon (not started) for a `with` block; its log is printed where something raises."""
    made = Victim(report, **settings)
    try:
        if disk is not None:
            made.mount(disk)
        yield made
    except BaseException:
        print(made.daemon.log()[-5000:], file=sys.stderr)
        raise
    finally:
        made.close()
