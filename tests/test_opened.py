"""What a daemon that stands alone, and all its helpers, open and connect to: seen from outside, by strace."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.support import Daemon, error_of, requires_program, wait_until, write_noise
from tests.test_upload import upload
from tests.tracing import calls, traced_whole

NAME = "named-by-a-client.wav"
PLAIN_ARGUMENTS = ("--language", "en", "--temperature", "0", "--option", "condition_on_previous_text=false")


@requires_program("strace")
def test_no_port_is_opened_and_no_path_that_a_client_names(
    make_daemon: Callable[..., Daemon], micro: Path, tmp_path: Path
) -> None:
    daemon, log = make_daemon(model=str(micro)), tmp_path / "trace"
    daemon.before = traced_whole(log, "-e", "trace=?open,openat,?openat2,?creat,execve,socket,bind,listen,connect")
    daemon.start()
    path, other = write_noise(tmp_path / NAME, 1), write_noise(tmp_path / "other.wav", 1)
    write_noise(daemon.folder / NAME, 1)  # where it runs: what the name alone would lead to
    done = daemon.whisperctl("transcribe", str(path), *PLAIN_ARGUMENTS)
    assert (done.returncode, done.stderr) == (0, "")
    with daemon.client() as client:
        for name in (NAME, str(path), f"../{NAME}"):
            with other.open("rb") as file:
                source = {"kind": "fd", "name": name}
                jobs = [client.call("submit", descriptors=[file.fileno()], source=source)["job"]]
            jobs.append(upload(client, other.read_bytes(), name=name)["job"])
            assert [job["source"]["name"] for job in jobs] == [name, name]
            assert error_of(lambda name=name: client.call("pull", model=name)) == "bad_request"  # type: ignore[misc]
            source = {"kind": "url", "url": f"file://{name}"}
            assert error_of(lambda source=source: client.call("submit", source=source)) == "bad_request"  # type: ignore[misc]
        assert client.result(jobs[-1]["id"])["job"]["state"] == "done"
    pid = daemon.pid
    assert daemon.stop() == 0
    wait_until(lambda: re.search(rf"^{pid} .* \+\+\+ exited with 0 \+\+\+$", log.read_text(), re.MULTILINE))

    trace = calls(log)
    opened = [call for call in trace if "open" in call.name and call.result >= 0]
    for one in (r"/whisperd\.sqlite3", r"\w+\.partial/source", r"/\w+/audio\.pcm", re.escape(str(micro))):
        assert any(re.search(f'{one}"', call.arguments) for call in opened), "daemon and helpers are in the trace"
    assert [call for call in trace if NAME in call.arguments] == []
    assert [call for call in trace if call.name == "socket" and not call.arguments.startswith("AF_UNIX,")] == []
    assert [call for call in trace if call.name == "connect"] == []
    assert [call.name for call in trace if call.name in ("bind", "listen")] == ["bind", "listen"]
    assert any(call.name == "bind" and f'sun_path="{daemon.socket}"' in call.arguments for call in trace)
