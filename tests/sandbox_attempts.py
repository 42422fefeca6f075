"""What a unit's process might try if somebody took it over. Run inside the unit; prints what became of each as JSON.

`worked`, or the name of the error. Standard library alone: it is run by whatever Python the unit has.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWUSER = 0x10000000
MS_BIND = 4096
PTRACE_ATTACH = 16


def libc(name: str, *arguments: object) -> None:
    """Call a function of the C library. Raises `OSError`."""
    if getattr(LIBC, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def listed(path: str) -> None:
    """Raise when there is nothing in a folder."""
    if not os.listdir(path):
        raise FileNotFoundError(path)


def connect(family: int, address: object) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        sock.connect(address)


def setuid_file(folder: str) -> None:
    path = Path(folder, "setuid")
    path.write_text("")
    path.chmod(0o4755)


def attempts(port: int, daemon: int, writable: str) -> dict[str, Callable[[], object]]:
    """Return the attempts by name. `port` has a listener on loopback, `daemon` is another process's pid."""
    write: Callable[[str], Callable[[], object]] = lambda path: lambda: Path(path).write_text("x")  # noqa: E731
    read: Callable[[str], Callable[[], object]] = lambda path: lambda: Path(path).read_bytes()  # noqa: E731
    return {
        "write its own folder": write(f"{writable}/mine"),
        "read the system": read("/etc/os-release"),
        "read a home": read("/home/ada/secret"),
        "list root's home": lambda: listed("/root"),
        "read passwords": read("/etc/shadow"),
        "read cookies": lambda: listed("/etc/whisperd/cookies"),
        "write the configuration": write("/etc/whisperd/whisperd.toml"),
        "write a unit": write("/etc/systemd/system/evil.service"),
        "write its program": write("/usr/local/lib/whisperd/evil"),
        "write a sysctl": write("/proc/sys/kernel/hostname"),
        "write beside the socket": write("/run/whisperd/evil"),
        "see others' files in /tmp": lambda: listed("/tmp"),
        "read the queue": read("/var/lib/whisperd/whisperd.sqlite3"),
        "list recordings": lambda: listed("/var/lib/whisperd/spool"),
        "read the daemon's folder by its process": lambda: os.listdir(f"/proc/{daemon}/root/var/lib/whisperd"),
        "read the daemon's memory": read(f"/proc/{daemon}/environ"),
        "connect to loopback": lambda: connect(socket.AF_INET, ("127.0.0.1", port)),
        "connect to loopback by IPv6": lambda: connect(socket.AF_INET6, ("::1", port)),
        "reach the name server": lambda: connect(socket.AF_INET, ("127.0.0.53", port)),
        "listen on a port": lambda: socket.create_server(("0.0.0.0", 0)).close(),
        "sniff the network": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
        "ask the daemon": lambda: connect(socket.AF_UNIX, "/run/whisperd/whisperd.sock"),
        "ask for a download": lambda: connect(socket.AF_UNIX, "/run/whisperd/fetch.sock"),
        "ask systemd": lambda: connect(socket.AF_UNIX, "/run/systemd/private"),
        "kill the daemon": lambda: os.kill(daemon, signal.SIGCONT),
        "trace the daemon": lambda: libc("ptrace", PTRACE_ATTACH, daemon, 0, 0),
        "mount": lambda: libc("mount", b"/", b"/tmp", None, MS_BIND, None),
        "make a namespace": lambda: libc("unshare", CLONE_NEWUSER),
        "become root": lambda: os.setuid(0),
        "make a setuid file": lambda: setuid_file(writable),
        "change the clock": change_clock,
        "change the host's name": lambda: socket.sethostname("evil"),
        "load a module": lambda: libc("syscall", 313, 0, b"", 0),
        "read the kernel's log": lambda: libc("klogctl", 3, ctypes.create_string_buffer(100), 100),
        "make a device": lambda: os.mknod(f"{writable}/device", 0o060666, os.makedev(254, 0)),
        "run with a raised priority": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    }


def change_clock() -> None:
    time.clock_settime(time.CLOCK_REALTIME, time.time())


def main() -> None:
    """Try all, print `{name: outcome}`."""
    port, daemon, writable = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    outcomes = {}
    for name, attempt in attempts(port, daemon, writable).items():
        try:
            attempt()
            outcomes[name] = "worked"
        except OSError as error:
            outcomes[name] = type(error).__name__
    print("attempts " + json.dumps(outcomes), flush=True)


if __name__ == "__main__":
    main()
