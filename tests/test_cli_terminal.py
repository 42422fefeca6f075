"""The command line on a terminal: a status line that comes and goes, and each segment once."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peer import Peer


class Terminal:
    """whisperctl on a pseudo-terminal; `screen` is what stands there, `bytes` all that was written."""

    def __init__(self, peer: Peer | Path, *arguments: str, columns: int = 80, **environ: str) -> None:
        socket = peer if isinstance(peer, Path) else peer.path
        self.bytes = b""
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "whisperctl", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={"PATH": os.environ["PATH"], "WHISPERD_SOCKET": str(socket), "LANG": "C.UTF-8", "TERM": "xterm"}
            | environ,
        )
        os.close(slave)

    def read_until(self, text: str, timeout_s: float = 20) -> None:
        """Read until `text` has been written."""
        deadline = time.monotonic() + timeout_s
        while text.encode() not in self.bytes:
            assert time.monotonic() < deadline, f"no {text!r} in {self.bytes!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                self.bytes += self._read()

    def end(self) -> int:
        """Read to the end and return the exit code."""
        while chunk := self._read():
            self.bytes += chunk
        os.close(self._master)
        return self.process.wait(20)

    def _read(self) -> bytes:
        try:
            return os.read(self._master, 65536)
        except OSError:  # the last process that had the terminal open is gone
            return b""

    @property
    def screen(self) -> list[str]:
        """The lines as they stand at the end; a line feed or a carriage return and a cleared line are obeyed."""
        lines = [""]
        for part in re.split(r"(\r\n|\r\x1b\[K)", self.bytes.decode()):
            if part == "\r\n":
                lines.append("")
            elif part == "\r\x1b[K":
                lines[-1] = ""
            else:
                lines[-1] += part
        return lines[:-1] if lines[-1] == "" else lines


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(tmp_path / "s")
    yield peer
    peer.stop()


@pytest.fixture
def talk(tmp_path: Path) -> str:
    path = tmp_path / "talk.m4a"
    path.write_bytes(b"a talk")
    return str(path)


def test_each_segment_once_under_a_true_status_line(peer: Peer, talk: str) -> None:
    terminal = Terminal(peer, "transcribe", talk)
    terminal.read_until("waiting, position 1")
    peer.wait_for(lambda: peer.subscribers)
    peer.say(1, "progress", progress=0.0, phase="decoding", position=3, eta_s=None)
    terminal.read_until("decoding, position 3")
    peer.say(1, "state", state="running")
    terminal.read_until("transcribing")
    peer.hear(1, "Hello there.")
    peer.say(1, "progress", progress=0.37, phase="", position=None, eta_s=130.0)
    terminal.read_until("transcribing 37 %, about 2 min 10 s left")
    peer.say(1, "state", state="queued", discard=True)
    peer.say(1, "state", state="running")
    peer.hear(1, "Hello there.", "Good bye.")
    terminal.read_until("Good bye.")
    peer.finish(1, "Hello there.", "Good bye.")
    assert terminal.end() == 0
    assert terminal.screen == ["Hello there.", "Good bye."]


def test_the_position_stands_while_the_job_waits(peer: Peer, talk: str) -> None:
    terminal = Terminal(peer, "transcribe", talk)
    peer.wait_for(lambda: peer.subscribers)
    peer.hear(1, "Hello.")  # what came before has been taken when this is shown, and the status under it is drawn anew
    terminal.read_until("Hello.\r\n\r\x1b[Kwaiting, position 1")
    peer.finish(1, "Hello.")
    assert (terminal.end(), terminal.screen) == (0, ["Hello."])


def test_the_status_says_that_the_model_loads(peer: Peer, talk: str) -> None:
    peer.health["model"]["state"] = "loading"
    terminal = Terminal(peer, "transcribe", talk)
    terminal.read_until("loading model micro, position 1")
    peer.finish(1, "Hello.")
    assert (terminal.end(), terminal.screen) == (0, ["Hello."])


def test_a_known_result_is_shown_although_no_segment_came(peer: Peer, talk: str) -> None:
    peer.on_submit = lambda job: peer.finish(job, "Known already.")
    terminal = Terminal(peer, "transcribe", talk)
    assert (terminal.end(), terminal.screen) == (0, ["Known already."])


def test_the_status_line_fits(peer: Peer, talk: str) -> None:
    terminal = Terminal(peer, "transcribe", talk, columns=20)
    terminal.read_until("waiting, position")
    peer.wait_for(lambda: peer.subscribers)
    peer.say(1, "progress", progress=0.5, phase="音声を読み込んでいます音声", position=None, eta_s=None)
    terminal.read_until("音声を読み込んでい…")
    peer.finish(1, "Hello.")
    assert (terminal.end(), terminal.screen) == (0, ["Hello."])


def test_nothing_in_a_text_is_obeyed(peer: Peer, talk: str) -> None:
    peer.transcribe_at_once("\x1b]0;evil\x07 \x9b31m", "\u202eright to left")
    terminal = Terminal(peer, "transcribe", talk)
    assert terminal.end() == 0
    assert terminal.screen == [r"\u001b]0;evil\u0007 \u009b31m", r"\u202eright to left"]
    for form in ("json", "srt", "vtt", "tsv"):
        terminal = Terminal(peer, "result", "1", "--format", form)
        assert terminal.end() == 0
        assert b"\x1b]" not in terminal.bytes


def test_a_daemon_that_goes_away_is_told_of(peer: Peer, talk: str) -> None:
    terminal = Terminal(peer, "transcribe", talk)
    terminal.read_until("position 1")
    peer.wait_for(lambda: peer.subscribers)
    peer.stop()
    terminal.read_until("waiting for it to come back")
    peer.start()
    peer.finish(1, "Hello.")
    assert (terminal.end(), terminal.screen) == (0, ["Hello."])


def test_ctrl_c_leaves_a_clean_line(peer: Peer, talk: str) -> None:
    terminal = Terminal(peer, "transcribe", talk)
    terminal.read_until("position 1")
    peer.wait_for(lambda: peer.subscribers)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert terminal.screen == ["cancelled job 1"]
    assert peer.jobs[1]["state"] == "cancelled"


@pytest.mark.parametrize(("options", "kind"), [(["--no-progress"], "xterm"), (["-q"], "xterm"), ([], "dumb")])
def test_no_status_line_where_none_is_wanted(peer: Peer, talk: str, options: list[str], kind: str) -> None:
    peer.transcribe_at_once("Hello.")
    terminal = Terminal(peer, "transcribe", talk, *options, TERM=kind)
    assert terminal.end() == 0
    assert terminal.bytes == b"Hello.\r\n"


def test_colours(peer: Peer) -> None:
    terminal = Terminal(peer, "health")
    assert terminal.end() == 0
    assert b"\x1b[32mready" in terminal.bytes
    plain = Terminal(peer, "health", NO_COLOR="1")
    assert plain.end() == 0
    assert b"\x1b" not in plain.bytes


def test_tables_fit_the_terminal(peer: Peer) -> None:
    peer.add_job(source={"kind": "fd", "name": "ä" * 200})
    terminal = Terminal(peer, "list", columns=50, NO_COLOR="1")
    assert terminal.end() == 0
    assert max(map(len, terminal.screen)) <= 50
