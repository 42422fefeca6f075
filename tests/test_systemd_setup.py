"""`whisperd setup` for a user whose own systemd runs on the machine: in steps, again, and undone."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.installed import PYTHON
from tests.machine import Machine, requires_systemd
from tests.support import wait_until
from whisperd.daemon.setup import user_units
from whisperd.protocol.catalogue import CHECKPOINTS

pytestmark = requires_systemd


@contextmanager
def user_manager(machine: Machine, user: str) -> Iterator[dict[str, str]]:
    """Run a user's own systemd, as a login does; yields the environment of his programs."""
    uid = machine.run("id", "--user", user).stdout.strip()
    environ = {"XDG_RUNTIME_DIR": f"/run/user/{uid}", "HOME": f"/home/{user}"}
    machine.run("install", "-d", "-m", "700", "-o", user, "-g", user, environ["XDG_RUNTIME_DIR"])
    settings = [f"--property=User={user}", "--property=Delegate=yes"]
    settings += [f"--setenv={name}={value}" for name, value in environ.items()]
    machine.run("systemd-run", "--unit=manager", *settings, "/lib/systemd/systemd", "--user")
    try:
        wait_until((machine.root / environ["XDG_RUNTIME_DIR"][1:] / "systemd/private").exists)
        yield environ
    finally:
        machine.run("systemctl", "stop", "manager")


def test_a_user_sets_it_up_in_steps_that_may_be_repeated_and_undone(machine: Machine) -> None:
    with user_manager(machine, "eve") as environ:

        def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
            variables = [f"{name}={value}" for name, value in environ.items()]
            return machine.run("env", *variables, *command, user="eve", check=check)

        file = machine.root / "home/eve/.config/whisperd/whisperd.toml"
        machine.write(f"/{file.relative_to(machine.root)}", 'models_url = ""\nthreads = 1\n')
        machine.run("chown", "--recursive", "eve", "/home/eve/.config")
        failed = run("whisperd", "setup", "--model", "tiny", check=False)
        assert failed.returncode == 1, failed
        assert f"{CHECKPOINTS['tiny'].sha256}/tiny.pt" in failed.stdout
        assert "/home/eve/.cache/whisperd/models/tiny.pt" in failed.stdout
        assert file.read_text() == 'model = "tiny"\nmodels_url = ""\nthreads = 1\n'
        assert not (machine.root / "home/eve/.config/systemd/user/whisperd.service").exists(), "the machine offers it"

        file.write_text(file.read_text().replace("tiny", "demo"))
        done = run("whisperd", "setup", check=False)
        assert done.returncode == ("✗" in done.stdout), "no JavaScript runtime, say, is told and stops nothing"
        assert "demo, as /home/eve/.config" in done.stdout
        assert "✓ transcription" in done.stdout
        assert "try: whisperctl transcribe" in done.stdout
        assert run("systemctl", "--user", "is-enabled", "whisperd.socket").stdout == "enabled\n"

        run("whisperd", "setup", "--remove")
        assert run("systemctl", "--user", "is-active", "whisperd.socket", check=False).stdout == "inactive\n"
        assert run("systemctl", "--user", "is-active", "whisperd.service", check=False).stdout == "inactive\n"
        assert not (machine.root / environ["XDG_RUNTIME_DIR"][1:] / "whisperd/whisperd.sock").exists()
        assert (machine.root / "home/eve/.local/state/whisperd/whisperd.sqlite3").exists(), "what it knows stays"


def test_without_a_user_manager_it_says_what_to_do_and_changes_nothing(machine: Machine) -> None:
    for variables in (["XDG_RUNTIME_DIR=/tmp"], []):
        done = machine.run("env", "HOME=/home/bob", *variables, "whisperd", "setup", user="bob", check=False)
        assert done.returncode == 1
        assert "log in properly" in done.stderr
    assert not (machine.root / "home/bob/.config").exists()


def test_units_that_setup_writes_are_clean(machine: Machine) -> None:
    code = (
        "from whisperd.daemon.setup import user_units; from pathlib import Path; user_units.write(Path('/tmp/units'))"
    )
    machine.run(PYTHON, "-c", code)
    units = [f"/tmp/units/{name}" for name in user_units.NAMES]
    for strict in ((), ("--recursive-errors=no",)):
        done = machine.run("env", "XDG_RUNTIME_DIR=/run", "systemd-analyze", "--user", "verify", *strict, *units)
        assert (done.stdout + done.stderr).strip() == ""
