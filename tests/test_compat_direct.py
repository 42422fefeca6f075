"""The direct mode of the former client: a private daemon for the lifetime of a transcriber, and nothing left of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.media_server import MediaServer, serving
from tests.support import NO_MODEL, PLAIN_OPTIONS, wait_until, write_noise
from tests.video_daemon import environment
from whisperctl import DaemonUnreachable, JobFailed, WhisperdError
from whisperctl.compat import WhisperTranscriber
from whisperctl.private import PrivateDaemon

VIDEO, OTHER = "-bcdefghijk", "lmnopqrstuv"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MediaServer]:
    with serving(write_noise(tmp_path / "talk.wav", 5)) as server:
        yield server


@pytest.fixture(autouse=True)
def surroundings(server: MediaServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Everything a program brings along, nothing of this machine's; its folder for temporary ones has a short path."""
    folder = Path(tempfile.mkdtemp(prefix="wd-", dir="/tmp"))
    variables = {
        "HOME": str(tmp_path),
        "TMPDIR": str(folder),
        "WHISPERD_CACHE_DIR": str(tmp_path / "cache"),
        "WHISPERD_FETCH_ALLOW_PRIVATE": "true",
        "WHISPERD_FETCH_BACKOFF_S": "0.05",
        "WHISPERD_MODELS_URL": "",
        # Of a service that the program is: its daemon is another one.
        "NOTIFY_SOCKET": "/nowhere",
        "STATE_DIRECTORY": "/nowhere",
    }
    for name, value in (environment(server) | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", None)
    yield folder
    shutil.rmtree(folder)


def processes_below(folder: Path) -> list[psutil.Process]:
    return [each for each in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(each.info["cmdline"] or ())]


def test_it_transcribes_and_leaves_nothing(micro: Path, surroundings: Path, server: MediaServer) -> None:
    with WhisperTranscriber(str(micro), device="cpu", threads=1, **PLAIN_OPTIONS) as transcriber:
        text = transcriber.transcribe_video(VIDEO)
        assert text
        (folder,) = surroundings.iterdir()
        assert folder.stat().st_mode & 0o077 == 0, "nobody else reaches its socket"
        server.slow.add(f"{OTHER}.wav")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(transcriber.transcribe_video, OTHER)
            wait_until(lambda: server.asked[f"/{OTHER}.wav"])
            (daemon,) = processes_below(folder)
            daemon.kill()
            server.go_on.set()
            assert waiting.result(120) == text, "started again under one who waits: the same audio"
        server.refused["00000000000.wav"] = 404
        with pytest.raises(JobFailed, match="404"):
            transcriber.transcribe_video("00000000000")
    assert not list(surroundings.iterdir())
    assert not processes_below(folder)
    with pytest.raises(RuntimeError, match="closed"):
        transcriber.transcribe_video(VIDEO)


PROGRAM = """
import sys
from whisperctl.private import PrivateDaemon
daemon = PrivateDaemon(["--model", "/nowhere/model.pt"])
print(daemon.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["exit", "kill -9"])
def test_it_ends_with_its_program(surroundings: Path, end: str) -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdin is not None
    assert program.stdout is not None
    daemon = psutil.Process(int(program.stdout.readline()))
    helpers = daemon.children()
    if end == "exit":
        program.stdin.close()
    else:
        program.kill()
    program.wait(20)
    left = psutil.wait_procs([daemon, *helpers], timeout=20)[1]
    assert not left
    assert (end == "kill -9") == bool(list(surroundings.iterdir())), "who is killed cannot clean up"


def test_a_forked_child_neither_ends_nor_starts_it(surroundings: Path) -> None:
    daemon = PrivateDaemon(["--model", NO_MODEL])
    child = os.fork()
    if not child:
        daemon.ensure()
        daemon.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    (process,) = processes_below(surroundings)
    daemon.ensure()
    assert processes_below(surroundings) == [process]
    process.kill()
    process.wait(10)
    daemon.ensure()
    (other,) = processes_below(surroundings)
    assert other.pid == daemon.pid != process.pid
    daemon.close()
    assert not processes_below(surroundings)


def test_it_is_stopped_in_order_while_a_forked_child_lives_on(surroundings: Path) -> None:
    daemon = PrivateDaemon(["--model", NO_MODEL])
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        with (daemon.socket_path.parent / "log").open() as log:
            daemon.close()
            assert ": stopped\n" in log.read(), "its last word, which a kill cuts off"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not list(surroundings.iterdir())


def test_a_long_temporary_folder_is_no_place_for_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 100)))
    daemon = PrivateDaemon(["--model", NO_MODEL])
    assert daemon.socket_path.is_socket()
    daemon.close()
    assert not daemon.socket_path.parent.exists()


def test_it_says_why_it_cannot_start(surroundings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client_only = tmp_path / "client-only"
    client_only.mkdir()
    (client_only / "sitecustomize.py").write_text("import sys\nsys.modules |= {'torch': None, 'whisper': None}\n")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(client_only))
        with pytest.raises(DaemonUnreachable, match=r"torch, whisper.*pip install 'whisperd\[server\]'"):
            WhisperTranscriber()
    with pytest.raises(DaemonUnreachable, match="device"):
        WhisperTranscriber(device="abacus")
    assert not list(surroundings.iterdir())


def test_a_model_that_cannot_be_loaded_ends_the_wait(surroundings: Path) -> None:
    with WhisperTranscriber("/nowhere/model.pt") as transcriber:
        for _ in range(2):
            with pytest.raises(WhisperdError) as caught:
                transcriber.transcribe_video(VIDEO)
            assert caught.value.code == "model_unavailable"
            assert "/nowhere/model.pt" in str(caught.value)
        assert transcriber.transcribe_video(VIDEO, timeout=0) is None


def test_until_eof_wants_a_pipe(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "whisperd", "--until-eof", "--socket", str(tmp_path / "s")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--until-eof needs a pipe" in done.stderr


def test_ctrl_c_is_for_the_program_alone(surroundings: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert program.stdout is not None
    daemon = psutil.Process(int(program.stdout.readline()))
    log = next(surroundings.iterdir()) / "log"
    wait_until(lambda: "started" in log.read_text())
    os.killpg(program.pid, signal.SIGINT)
    program.wait(20)
    assert not psutil.wait_procs([daemon], timeout=20)[1]
    assert not list(surroundings.iterdir())
