"""A machine with a real systemd, in private namespaces, for a test's lifetime. Needs root and Debian's `systemd`.

systemd runs as PID 1 of namespaces of its own, on an overlay of this machine's file system: what the test installs,
enables and breaks in there is gone with it. Outside, one control group is made, and removed again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import requires_program, requires_root, wait_until

INIT = Path(__file__).with_name("machine_init.sh")
_NAMESPACES = ("--mount", "--pid", "--cgroup", "--uts", "--ipc", "--net")

requires_systemd = [
    requires_root,
    requires_program("systemctl"),
    requires_program("nsenter"),
]


class Machine:
    """Booted when made. `binds` maps folders of this machine to where they are seen inside."""

    def __init__(self, binds: dict[Path, str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="machine-", dir="/tmp"))
        self._pid_file = self._folder.with_name(f"{self._folder.name}.pid")
        self._group = _control_groups() / self._folder.name
        self._group.mkdir()
        self._console = self._folder.with_name(f"{self._folder.name}.log")
        try:
            self._boot(binds)
        except BaseException:
            self.close()
            raise

    def _boot(self, binds: dict[Path, str]) -> None:
        # The control group first, then its namespace: systemd takes the group it finds itself in for the root.
        enter = f"echo $$ > {shlex.quote(str(self._group / 'cgroup.procs'))}"
        # A test run that is killed takes the machine with it: its PID 1 dies with unshare, which dies with us.
        unshare = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            *_NAMESPACES,
            "--propagation",
            "private",
            "--fork",
            "--kill-child=SIGKILL",
        ]
        command = [*unshare, "bash", str(INIT), str(self._folder), *(f"{a}:{b}" for a, b in binds.items())]
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(
                ["bash", "-c", f"{enter} && exec {shlex.join(command)}"],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        wait_until(self._is_up, 30, f"systemd boots; it says: {self._console.read_text()}")
        state = self.run("systemctl", "is-system-running", "--wait", check=False).stdout.strip()
        assert state == "running", self.run("systemctl", "--failed", check=False).stdout

    def _is_up(self) -> bool:
        assert self._process.poll() is None, f"the machine does not start: {self._console.read_text()}"
        return self._pid_file.exists() and (self.root / "run/systemd/private").exists()

    @property
    def root(self) -> Path:
        """Its file system, seen from outside."""
        return Path(f"/proc/{self._pid_file.read_text().strip()}/root")

    def run(
        self, *command: str, user: str = "", check: bool = True, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside as root, or as a user with his groups; fail when it fails, unless `check` is false."""
        done = subprocess.run(
            self._command(command, user), capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout_s, check=False
        )
        answer = subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())
        assert not check or answer.returncode == 0, f"{command} ended with {answer.returncode}: {answer}"
        return answer

    def start(self, *command: str, user: str = "") -> subprocess.Popen[str]:
        """Start a command inside, with pipes for its output."""
        return subprocess.Popen(
            self._command(command, user),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _command(self, command: Sequence[str], user: str) -> list[str]:
        enter = ["nsenter", "--target", self._pid_file.read_text().strip(), "--all", "env", "-i"]
        enter += ["LANG=C.UTF-8", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
        # By its numbers, a user would come without the groups that he was added to a moment ago.
        become = ["setpriv", "--reuid", user, "--regid", user, "--init-groups"] if user else []
        inside = self._group / "entered"
        inside.mkdir(exist_ok=True)
        join = f"echo $$ > {shlex.quote(str(inside / 'cgroup.procs'))} && exec"
        return ["bash", "-c", f"{join} {shlex.join([*enter, *become, *command])}"]

    def write(self, path: str, text: str) -> None:
        """Write a file inside, with its folder, readable for all."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o644)

    def journal(self, *arguments: str) -> list[dict[str, Any]]:
        """Return journal entries, oldest first, as `journalctl ARGUMENTS --output=json` tells them."""
        self.run("journalctl", "--sync")
        lines = self.run("journalctl", "--output=json", *arguments).stdout.splitlines()
        return [json.loads(line) for line in lines]

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", unit, "--property", name, "--value").stdout.strip()

    def close(self) -> None:
        """End everything in it at once, and remove what was outside."""
        (self._group / "cgroup.kill").write_text("1")
        if (process := getattr(self, "_process", None)) is not None:
            process.wait(10)
        wait_until(lambda: "populated 0" in (self._group / "cgroup.events").read_text(), 10)
        for folder in sorted(self._group.rglob("*/"), reverse=True):
            folder.rmdir()
        self._group.rmdir()
        shutil.rmtree(self._folder)
        self._pid_file.unlink(missing_ok=True)
        self._console.unlink(missing_ok=True)


def _control_groups() -> Path:
    """Return where control groups of the second version are mounted: alone, or beside the first."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, *_ = line.split()
        if kind == "cgroup2" and os.access(target, os.W_OK):
            return Path(target)
    raise AssertionError("no control groups of the second version are mounted: mount -t cgroup2 none /sys/fs/cgroup")
