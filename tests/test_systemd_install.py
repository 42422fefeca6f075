"""Installing under a real systemd: clean units, a package for another place, upgrades, uninstall and purge."""

from __future__ import annotations

import pytest

import whisperd
from tests.installed import (
    LIB,
    PLAIN,
    SOURCE,
    configure,
    health,
    install,
    let_in,
    main_pid,
    recording,
    wait_up,
    whisperctl,
)
from tests.machine import Machine, requires_systemd
from tests.support import wait_until

pytestmark = requires_systemd

UNITS = "/usr/local/lib/systemd"
VERSION = whisperd.__version__


def test_the_units_are_clean_and_say_why(machine: Machine) -> None:
    for manager in ("system", "user"):
        folder = f"{UNITS}/{manager}"
        units = [f"{folder}/{name}" for name in machine.run("ls", folder).stdout.split() if name.startswith("whisperd")]
        assert len(units) == {"system": 4, "user": 2}[manager]
        for strict in ((), ("--recursive-errors=no",)):
            verify = ["env", "XDG_RUNTIME_DIR=/run", "systemd-analyze", f"--{manager}", "verify", *strict, *units]
            done = machine.run(*verify)
            assert (done.stdout + done.stderr).strip() == ""


@pytest.mark.parametrize(("unit", "most"), [("whisperd.service", 1.0), ("whisperd-fetch@.service", 1.6)])
def test_the_units_score_well(machine: Machine, unit: str, most: float) -> None:
    analyze = ["systemd-analyze", "security", "--offline=true", "--no-pager", f"{UNITS}/system/{unit}"]
    last = machine.run(*analyze).stdout.splitlines()[-1]
    assert float(last.split(":")[1].split()[0]) <= most, last


def test_a_package_for_another_prefix_works_where_it_is_unpacked(machine: Machine) -> None:
    package, prefix = "/tmp/package", "/opt/w"
    install(machine, DESTDIR=package, PREFIX=prefix)
    packed = machine.root / package[1:]
    assert not machine.run("grep", "-rlI", package, package, check=False).stdout, "nothing remembers where it was made"
    service = (packed / f"{UNITS[1:]}/system/whisperd.service").read_text()
    assert f"ExecStart={prefix}/lib/whisperd/current/bin/whisperd " in service
    assert "/usr/local/" not in service
    machine.run("mv", f"{package}{prefix}", prefix)
    assert VERSION in machine.run(f"{prefix}/bin/whisperd", "--version").stdout
    assert VERSION in machine.run(f"{prefix}/bin/whisperctl", "--version").stdout
    assert (machine.root / LIB[1:] / "current").exists(), "the one that is installed is not touched"
    machine.run("make", "-C", SOURCE, "uninstall", f"DESTDIR={package}", f"PREFIX={prefix}")
    left = [path for path in packed.rglob("*") if not path.is_dir()]
    assert left == []
    machine.run("rm", "-r", package, prefix)


def test_an_upgrade_keeps_queue_and_configuration(machine: Machine) -> None:
    wait_up(machine)
    before = main_pid(machine)
    job = whisperctl(machine, "submit", recording(machine, "u.wav", 30), *PLAIN).strip()
    source, version = "/opt/next", "99.0.0"
    machine.run("mkdir", source)
    parts = "whisperd whisperctl systemd docs tools Makefile LICENSE README.md CHANGELOG.md".split()
    parts += ["setup.cfg", "setup.py", "pyproject.toml"]
    machine.run("cp", "-r", *(f"{SOURCE}/{part}" for part in parts), source)
    machine.run("sed", "-i", f's/^__version__ = .*/__version__ = "{version}"/', f"{source}/whisperd/__init__.py")
    install(machine, source, version)
    assert sorted(machine.run("ls", LIB).stdout.split()) == sorted([VERSION, version, "current"])
    assert main_pid(machine) == before, "the running one is left alone"
    machine.run("pkill", "-f", f"{LIB}/{VERSION}/.*whisperd.audio.decoder")
    # Whatever it starts now is of its own version; only a download's unit is of the next, and waits.
    video = whisperctl(machine, "submit", "http://127.0.0.1:9/talk.wav", *PLAIN).strip()
    wait_until(lambda: any("restart whisperd" in problem for problem in health(machine)["problems"]), 30)
    machine.run("systemctl", "restart", "whisperd")
    wait_up(machine)
    assert health(machine)["version"] == version
    assert "done" in whisperctl(machine, "wait", "--timeout", "60", job)
    whisperctl(machine, "cancel", video)
    install(machine)  # and back again; the state is the same version's
    assert sorted(machine.run("ls", LIB).stdout.split()) == sorted([VERSION, version, "current"])
    machine.run("systemctl", "restart", "whisperd")
    wait_up(machine)
    machine.run("rm", "-r", source, f"{LIB}/{version}")


def test_uninstall_leaves_the_data_and_purge_nothing(machine: Machine) -> None:
    wait_up(machine)
    configure(machine, "log_level = 'debug'\n")
    machine.run("make", "-C", SOURCE, "uninstall")
    try:
        assert not (machine.root / LIB.lstrip("/")).exists()
        assert machine.run("find", "/usr/local/lib", "-name", "*whisperd*").stdout == ""
        assert machine.run("systemctl", "list-units", "--all", "--no-legend", "whisperd*").stdout == ""
        assert (machine.root / "var/lib/whisperd/whisperd.sqlite3").exists()
        assert "debug" in (machine.root / "etc/whisperd/whisperd.toml").read_text()
        machine.run("make", "-C", SOURCE, "purge")
        assert not (machine.root / "var/lib/whisperd").exists()
        assert not (machine.root / "etc/whisperd").exists()
        for user in ("whisperd", "whisperd-fetch"):
            assert machine.run("id", user, check=False).returncode != 0
    finally:  # for the tests that other workers' order puts behind this one
        install(machine)
        let_in(machine)
