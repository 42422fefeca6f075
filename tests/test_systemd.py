"""The installed service under a real systemd: started by a connection, killed, stopped, restarted, misconfigured."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.installed import (
    PLAIN,
    PYTHON,
    SAMPLE,
    configure,
    drop_in,
    health,
    main_pid,
    recording,
    wait_up,
    whisperctl,
    without_model,
)
from tests.machine import Machine, requires_systemd
from tests.support import wait_until

pytestmark = requires_systemd


def test_the_first_connection_starts_it_and_its_group_may_use_it(machine: Machine) -> None:
    machine.run("systemctl", "stop", "whisperd.service")
    assert machine.show("whisperd.service", "ActiveState") == "inactive"
    assert whisperctl(machine, "transcribe", SAMPLE, *PLAIN).strip()
    assert machine.show("whisperd.service", "ActiveState") == "active"
    wait_until(lambda: machine.show("whisperd", "StatusText").startswith("ready: micro on cpu; 0 waiting"), 10)
    job = whisperctl(machine, "submit", SAMPLE, *PLAIN).strip()
    refused = machine.run("whisperctl", "health", user="eve", check=False)
    assert refused.returncode == 3
    assert "belongs to the group 'whisperd'" in refused.stderr
    stranger = machine.run("whisperctl", "result", job, user="bob", check=False)
    assert stranger.returncode == 4, stranger
    assert job not in whisperctl(machine, "list", "--quiet", user="bob").split()


@pytest.mark.parametrize("whom", ["daemon", "model"])
def test_kill_9_loses_nothing(machine: Machine, whom: str) -> None:
    wait_up(machine)
    before = main_pid(machine)
    jobs = [whisperctl(machine, "submit", recording(machine, f"{whom}{n}.wav", 20), *PLAIN).strip() for n in range(3)]
    if whom == "daemon":
        machine.run("kill", "-9", str(before))
    else:
        machine.run("pkill", "-9", "-f", "whisperd.model.main")
    states = whisperctl(machine, "wait", "--timeout", "60", *jobs)
    assert states.count("done") == 3, states
    assert (main_pid(machine) != before) == (whom == "daemon")


def test_a_loop_that_stands_still_is_replaced(machine: Machine) -> None:
    with drop_in(machine, "whisperd.service", "WatchdogSec=1", "TimeoutAbortSec=1"), without_model(machine):
        wait_up(machine)
        before = main_pid(machine)
        assert machine.show("whisperd", "NRestarts") == "0", "a loop that turns is left alone"
        machine.run("kill", f"-{signal.SIGSTOP.value}", str(before))
        wait_until(lambda: main_pid(machine) not in (0, before), 30, "systemd starts another")
        wait_up(machine)
    assert any("Watchdog timeout" in entry["MESSAGE"] for entry in machine.journal("-u", "whisperd"))


def test_a_model_helper_that_stands_still_is_replaced(machine: Machine) -> None:
    configure(machine, heartbeat_timeout_s=5)
    machine.run("systemctl", "restart", "whisperd")
    wait_up(machine)
    before = main_pid(machine)
    job = whisperctl(machine, "submit", recording(machine, "still.wav", 20), *PLAIN).strip()
    machine.run("pkill", f"-{signal.SIGSTOP.value}", "-f", "whisperd.model.main")
    assert "done" in whisperctl(machine, "wait", "--timeout", "60", job)
    assert main_pid(machine) == before
    assert [entry for entry in machine.journal("-u", "whisperd") if "role=model" in entry["MESSAGE"]][-1]
    assert any("reason='silent'" in entry["MESSAGE"] for entry in machine.journal("-u", "whisperd"))
    configure(machine)
    machine.run("systemctl", "restart", "whisperd")


def test_stopped_with_a_queue_it_goes_on_with_it(machine: Machine) -> None:
    wait_up(machine)
    jobs = [whisperctl(machine, "submit", recording(machine, f"s{n}.wav", 40), *PLAIN).strip() for n in range(3)]
    machine.run("systemctl", "stop", "whisperd.service")
    assert machine.show("whisperd", "Result") == "success"
    assert machine.show("whisperd.socket", "ActiveState") == "active"
    states = whisperctl(machine, "wait", "--timeout", "60", *jobs)  # whose connection starts it again
    assert states.count("done") == 3, states


_STREAM = """
import os, sys
from whisperctl import Client
name, submitted = sys.argv[1], 0
while not os.path.exists("/tmp/enough"):
    with Client() as whisper:
        job = whisper.submit(f"/tmp/{name}.wav", key=f"{name}{submitted}")
        whisper.cancel(job.id)
    submitted += 1
    print(submitted, flush=True)
print(submitted)
"""


def test_a_restart_under_a_stream_of_clients_refuses_nobody_and_loses_nothing(machine: Machine) -> None:
    with without_model(machine):
        wait_up(machine)

        def jobs(user: str) -> int:
            return len(whisperctl(machine, "list", "--quiet", "--limit", "200", user=user).split())

        before = {user: jobs(user) for user in ("ada", "bob")}
        streams = {}
        for user in before:
            recording(machine, f"{user}.wav", 1)
            streams[user] = machine.start(PYTHON, "-c", _STREAM, user, user=user)
        for _ in range(3):
            for stream in streams.values():
                assert stream.stdout is not None
                assert stream.stdout.readline(), stream.communicate()[1]
            machine.run("systemctl", "restart", "whisperd")
        machine.write("/tmp/enough", "")
        for user, stream in streams.items():
            submitted, errors = stream.communicate(timeout=60)
            assert stream.returncode == 0, errors
            assert jobs(user) - before[user] == int(submitted.split()[-1]), "one job for each submit"


# --- what a restart cannot mend: told to all, started no more often than asked ---


@contextmanager
def broken(machine: Machine, how: str) -> Iterator[str]:
    """Break something for a `with` block; yields what is said of it."""
    machine.run("systemctl", "stop", "whisperd.service")
    with ExitStack() as mend:
        if how == "configuration":
            configure(machine, "capasity = 1\n")
            mend.callback(configure, machine)
            yield "/etc/whisperd/whisperd.toml: unknown key 'capasity'; did you mean 'capacity'?"
        elif how == "taken":
            lock = "/var/lib/whisperd/whisperd.lock"
            machine.run("systemd-run", "--unit=other", "flock", lock, "sleep", "1000")
            mend.callback(machine.run, "systemctl", "stop", "other.service")
            wait_until(lambda: machine.run("flock", "--nonblock", lock, "true", check=False).returncode, 10)
            yield "another whisperd works with /var/lib/whisperd"
        else:
            machine.run(PYTHON, "-c", _RAISE_VERSION, "100", user="whisperd")
            mend.callback(machine.run, PYTHON, "-c", _RAISE_VERSION, "-100", user="whisperd")
            yield "newer"


_RAISE_VERSION = """
import sqlite3, sys
db = sqlite3.connect("/var/lib/whisperd/whisperd.sqlite3")
version = db.execute("PRAGMA user_version").fetchone()[0]
db.execute(f"PRAGMA user_version = {version + int(sys.argv[1])}")
db.close()
"""


@pytest.mark.parametrize(("how", "code"), [("configuration", 2), ("taken", 3), ("newer state", 4)])
def test_what_a_restart_cannot_mend_is_told_and_not_tried_for_ever(machine: Machine, how: str, code: int) -> None:
    with broken(machine, how) as wrong:
        assert machine.run("systemctl", "restart", "whisperd", check=False).returncode != 0
        starts = _starts(machine)
        for _ in range(3):
            told = machine.run("whisperctl", "health", user="ada", check=False)
            assert told.returncode == 3
            assert wrong in told.stderr
        wait_until(lambda: machine.show("whisperd", "ActiveState") == "failed", 10, "nobody asks, and it rests")
        assert machine.show("whisperd", "ExecMainStatus") == str(code)
        assert machine.show("whisperd", "NRestarts") == "0", "systemd does not try again by itself"
        assert _starts(machine) - starts <= 3, "a connection is a start, and no more"
        assert machine.show("whisperd.socket", "ActiveState") == "active"
        assert wrong in machine.show("whisperd", "StatusText")
        assert wrong in machine.journal("-u", "whisperd", "-t", "whisperd", "-p", "crit")[-1]["MESSAGE"]
    with without_model(machine):
        wait_up(machine)


def _starts(machine: Machine) -> int:
    entries = machine.journal("UNIT=whisperd.service")
    return sum(entry["MESSAGE"].startswith("Starting whisperd.service") for entry in entries)


def test_the_journal_reads_like_a_story(machine: Machine) -> None:
    wait_up(machine)
    entries = machine.journal("-u", "whisperd", "-t", "whisperd")
    lines = [str(entry["MESSAGE"]) for entry in entries]
    assert not [line for line in lines if line.startswith("<")], "prefixes become priorities"
    assert not [line for line in lines if "beside clients' files" in line], "the unit lets the spawner be apart"
    started = next(entry for entry in entries if str(entry["MESSAGE"]).startswith("started version="))
    assert started["PRIORITY"] == "6"
    warned = [entry for entry in entries if str(entry["MESSAGE"]).startswith("helper killed")]
    assert all(entry["PRIORITY"] == "4" for entry in warned)
    assert health(machine)["version"] in str(started["MESSAGE"])
