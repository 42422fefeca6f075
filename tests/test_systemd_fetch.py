"""The two sandboxes under a real systemd: a download in a unit of its own, and what neither unit's process can do."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.installed import PLAIN, PYTHON, SOURCE, configure, drop_in, main_pid, recording, wait_up, whisperctl
from tests.machine import Machine, requires_systemd
from tests.support import wait_until

pytestmark = requires_systemd

FETCH = "whisperd-fetch@.service"
# Our web server is on this very machine, which the unit does not let a download at.
LOOPBACK = "IPAddressAllow=127.0.0.1"


@contextmanager
def web_server(machine: Machine, seconds: float = 2, *, file: str = "") -> Iterator[str]:
    """Serve a recording, or a file, inside; yields the server's address. What it was asked is in its unit's journal."""
    path = file or recording(machine, "web.wav", seconds)
    command = ["systemd-run", "--unit=web", "--working-directory", SOURCE, "--setenv=PYTHONUNBUFFERED=1"]
    machine.run(*command, PYTHON, "-m", "tests.media_server", path)
    try:
        this_run = f"_SYSTEMD_INVOCATION_ID={machine.show('web', 'InvocationID')}"
        said = wait_until(lambda: [e["MESSAGE"] for e in machine.journal(this_run) if "port " in e["MESSAGE"]])
        yield f"http://127.0.0.1:{said[-1].split()[-1]}"
    finally:
        machine.run("systemctl", "stop", "web")
        machine.run("rm", "--force", "/tmp/go-on")


def asked(machine: Machine, path: str) -> list[str]:
    """Return the requests for a path, each with its cookies."""
    return [e["MESSAGE"] for e in machine.journal("-u", "web") if f" {path} " in str(e["MESSAGE"])]


def instances(machine: Machine) -> list[str]:
    """Return the downloads that run, by their units' names."""
    lines = machine.run("systemctl", "list-units", "--plain", "--no-legend", "whisperd-fetch@*").stdout.splitlines()
    return [line.split()[0] for line in lines]


def started(machine: Machine) -> int:
    """Return how many downloads have been started."""
    return sum("Started whisperd-fetch@" in str(entry["MESSAGE"]) for entry in machine.journal("-t", "systemd"))


def test_a_download_has_a_unit_and_a_users_cookies(machine: Machine) -> None:
    wait_up(machine)
    already = started(machine)
    cookie = "127.0.0.1\tFALSE\t/\tFALSE\t0\tname\t{}\n"
    jar = "/etc/whisperd/cookies/ada.txt"
    machine.run("rm", "--recursive", "/etc/whisperd/cookies")
    with drop_in(machine, FETCH, LOOPBACK), web_server(machine) as web:
        assert whisperctl(machine, "transcribe", f"{web}/none.wav", *PLAIN).strip(), "no folder is no cookies"
    machine.run("install", "--directory", "--mode", "700", "/etc/whisperd/cookies")
    machine.write(jar, "# Netscape HTTP Cookie File\n" + cookie.format("ada"))
    machine.run("chmod", "600", jar)
    before = (machine.root / jar[1:]).read_bytes()
    with drop_in(machine, FETCH, LOOPBACK), web_server(machine) as web:
        for user in ("ada", "bob"):
            assert whisperctl(machine, "transcribe", f"{web}/{user}.wav", *PLAIN, user=user).strip()
        assert all("name=ada" in request for request in asked(machine, "/ada.wav"))
        assert asked(machine, "/bob.wav")
        assert not any("name=ada" in request for request in asked(machine, "/bob.wav"))
    assert (machine.root / jar[1:]).read_bytes() == before
    wait_until(lambda: not instances(machine), 10, "each ends with its work")
    assert started(machine) - already == 3
    assert not list((machine.root / "var/lib/whisperd/downloads").iterdir())


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_download_that_dies_or_hangs_is_begun_anew(machine: Machine, end: str) -> None:
    wait_up(machine)
    with drop_in(machine, FETCH, LOOPBACK, "WatchdogSec=3"), web_server(machine, 20) as web:
        job = whisperctl(machine, "submit", f"{web}/slow/{end}.wav", *PLAIN).strip()
        wait_until(lambda: len(asked(machine, f"/slow/{end}.wav")) == 2, 30, "it is under way")
        (unit,) = instances(machine)
        pid = machine.show(unit, "MainPID")
        machine.run("kill", f"-{(signal.SIGKILL if end == 'kill' else signal.SIGSTOP).value}", pid)
        wait_until(lambda: unit not in instances(machine), 20, "it is gone")
        machine.write("/tmp/go-on", "")
        assert "done" in whisperctl(machine, "wait", "--timeout", "60", job)


def test_a_stop_of_the_daemon_ends_its_downloads(machine: Machine) -> None:
    wait_up(machine)
    with drop_in(machine, FETCH, LOOPBACK), web_server(machine, 20) as web:
        job = whisperctl(machine, "submit", f"{web}/slow/end.wav", *PLAIN).strip()
        wait_until(lambda: len(asked(machine, "/slow/end.wav")) == 2, 30, "it is under way")
        machine.run("systemctl", "stop", "whisperd.service")
        wait_until(lambda: not instances(machine), 10, "it ends")
        machine.write("/tmp/go-on", "")
        assert "done" in whisperctl(machine, "wait", "--timeout", "60", job)


def test_a_model_is_downloaded_in_its_unit_for_the_daemon(machine: Machine) -> None:
    with drop_in(machine, FETCH, LOOPBACK), web_server(machine) as web:
        sha256 = hashlib.sha256((machine.root / "tmp/web.wav").read_bytes()).hexdigest()
        configure(machine, extra_models=[f"ours={sha256}"], models_url=web)
        try:
            machine.run("systemctl", "restart", "whisperd.service")
            wait_up(machine)
            path = whisperctl(machine, "model", "pull", "ours", user="").strip()
        finally:
            configure(machine)
            machine.run("systemctl", "stop", "whisperd.service")
    assert path == "/var/cache/whisperd/models/ours.pt"
    assert machine.run("sha256sum", path).stdout.split()[0] == sha256
    # The daemon is in the group.
    assert machine.run("stat", "--format=%U %G %a", path).stdout == "whisperd-fetch whisperd-fetch 660\n"
    wait_until(lambda: not instances(machine), 10, "it ends with its work")


def test_nobody_but_the_daemon_may_ask_for_a_download(machine: Machine) -> None:
    wait_up(machine)
    ask = "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/whisperd/fetch.sock'); print(s.recv(9))"
    assert "PermissionError" in machine.run(PYTHON, "-c", ask, user="ada", check=False).stderr
    # root can open any socket; the process behind it asks the kernel who it is.
    assert machine.run(PYTHON, "-c", ask).stdout == "b''\n"
    wait_until(lambda: any("uid 0 has connected" in e["MESSAGE"] for e in machine.journal("-t", "whisperd-fetch")), 10)


# --- from inside ---

# What a process must be able to do, so that the refusals below mean something.
ALLOWED = {"write its own folder", "read the system"}
# What else each may do.
ITS_OWN = {
    "daemon": {"read the queue", "list recordings", "ask the daemon", "ask for a download"},
    "download": {"reach the name server"},
}


@pytest.mark.parametrize("whose", ["daemon", "download"])
def test_the_sandbox_holds_from_inside(machine: Machine, whose: str) -> None:
    """The unit's own settings, with attempts in the place of its program."""
    wait_up(machine)
    machine.write("/home/ada/secret", "secret")
    machine.run("chmod", "0755", "/home/ada")
    machine.write("/tmp/somebody-elses", "")
    listen = "import socket; s = socket.create_server(('::', 18080), family=socket.AF_INET6, dualstack_ipv6=True)"
    machine.run("systemd-run", "--unit=port", PYTHON, "-c", f"{listen}\nwhile s.accept(): pass")
    others_pid = machine.show("port", "MainPID") if whose == "daemon" else str(main_pid(machine))
    folder = "/var/lib/whisperd" if whose == "daemon" else "/var/lib/whisperd/downloads"
    command = f"{PYTHON} -I {SOURCE}/tests/sandbox_attempts.py 18080 {others_pid} {folder}"
    try:
        if whose == "daemon":
            with drop_in(
                machine, "whisperd.service", "Type=oneshot", "Restart=no", "ExecStart=", f"ExecStart={command}"
            ):
                machine.run("systemctl", "restart", "whisperd")
        else:
            with drop_in(machine, FETCH, "ExecStart=", f"ExecStart={command}"):
                ask = (
                    "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/whisperd/fetch.sock'); s.recv(1)"
                )
                machine.run(PYTHON, "-c", ask, user="whisperd")
    finally:
        machine.run("systemctl", "stop", "port")
    said = [e["MESSAGE"] for e in machine.journal("-g", "^attempts ")]
    outcomes = json.loads(said[-1].partition(" ")[2])
    worked = {name for name, outcome in outcomes.items() if outcome == "worked"}
    assert worked - ITS_OWN[whose] == ALLOWED, outcomes
    assert whose == "daemon" or worked >= ITS_OWN[whose], outcomes
    assert len(outcomes) > 30
    machine.run("rm", "--force", f"{folder}/mine", f"{folder}/setuid")
