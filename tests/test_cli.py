"""The command line in a pipe: what it prints, where, and what it exits with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peer import Peer
from tests.support import requires_program
from whisperctl.exits import EXIT_CODES
from whisperd.protocol.errors import ErrorCode, WhisperdError


class Result:
    """What a command printed and how it ended."""

    def __init__(self, process: subprocess.Popen[bytes], stdin: bytes | None = None) -> None:
        out, err = process.communicate(stdin, timeout=60)
        self.code, self.out, self.err = process.returncode, out.decode(), err.decode()
        assert "Traceback" not in self.err


# Runs a command that needs permissions, as any user's does; root goes on being who owns Python's folders.
AS_A_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


class Shell:
    """Runs whisperctl in a folder of its own, against the peer; `before` is the command that starts it, if any."""

    def __init__(self, peer: Peer, folder: Path) -> None:
        self.folder = folder
        self.before: list[str] = []
        self.environ = {"PATH": os.environ["PATH"], "WHISPERD_SOCKET": str(peer.path), "LANG": "C.UTF-8"}

    def start(self, *arguments: str, **kinds: Any) -> subprocess.Popen[bytes]:
        streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [*self.before, sys.executable, "-m", "whisperctl", *arguments]
        return subprocess.Popen(command, cwd=self.folder, env=self.environ, **(streams | kinds))

    def __call__(self, *arguments: str, stdin: bytes | None = None) -> Result:
        return Result(self.start(*arguments), stdin)


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(tmp_path / "s")
    peer.transcribe_at_once("Hello there.", "Good bye.")
    yield peer
    peer.stop()


@pytest.fixture
def ctl(peer: Peer, tmp_path: Path) -> Shell:
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("talk.m4a", "news.wav"):
        (folder / name).write_bytes(b"audio of " + name.encode())
    return Shell(peer, folder)


# --- transcribe ---


def test_in_a_pipe_the_transcript_alone(peer: Peer, ctl: Shell) -> None:
    done = ctl("transcribe", "talk.m4a")
    assert (done.code, done.out, done.err) == (0, "Hello there.\nGood bye.\n", "")
    assert peer.jobs[1]["priority"] == "interactive"
    assert 1 in peer.attached


def test_several_sources_are_headed_and_run_as_background_work(peer: Peer, ctl: Shell) -> None:
    done = ctl("transcribe", "talk.m4a", "missing.wav", "news.wav")
    text = "Hello there.\nGood bye.\n"
    assert done.out == f"== talk.m4a (job 1) ==\n{text}\n== news.wav (job 2) ==\n{text}"
    assert done.err == "whisperctl: there is no file missing.wav\n"
    assert done.code == 2
    assert {job["priority"] for job in peer.jobs.values()} == {"background"}
    lines = ctl("transcribe", "--format", "json", "talk.m4a", "news.wav").out.splitlines()
    assert [(one["source"], one["job"]) for one in map(json.loads, lines)] == [("talk.m4a", 3), ("news.wav", 4)]


def test_options_travel(peer: Peer, ctl: Shell) -> None:
    done = ctl(
        "submit", "--language", "de", "--task", "translate", "--word-timestamps", "--initial-prompt", "Hm.",
        "--beam-size", "3", "--temperature", "0,0.5", "--priority", "interactive", "--option", "patience=2",
        "--option", "suppress-tokens=", "talk.m4a",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    options = peer.jobs[1]["options"]
    wanted = {
        "language": "de", "task": "translate", "word_timestamps": True, "initial_prompt": "Hm.", "beam_size": 3,
        "temperature": [0.0, 0.5], "patience": 2.0, "suppress_tokens": "",
    }  # fmt: skip
    assert {name: options[name] for name in wanted} == wanted
    assert peer.jobs[1]["priority"] == "interactive"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        *((name, "talk.m4a") for name in ("speed", "priority", "on_upload", "client", "key", "timeout_s", "options")),
        ("fresh", "dQw4w9WgXcQ"),
        ("attached", "https://example.org/x"),
    ],
)
def test_what_is_no_option_of_whisper_is_refused(peer: Peer, ctl: Shell, name: str, source: str) -> None:
    refused = ctl("submit", "--option", f"{name}=2", source)
    assert (refused.code, refused.err) == (2, f"whisperctl: options does not know '{name}'\n")
    assert not peer.jobs


def test_failures_of_jobs(peer: Peer, ctl: Shell) -> None:
    peer.on_submit = lambda job: peer.fail(job, "bad_audio", "there is no audio track in it")
    done = ctl("transcribe", "talk.m4a")
    assert (done.code, done.out, done.err) == (1, "", "whisperctl: talk.m4a: there is no audio track in it\n")
    peer.on_submit = lambda job: peer.say(job, "end", state="cancelled", error=None)
    assert ctl("transcribe", "talk.m4a").code == 5
    peer.refuse["submit"] = WhisperdError("queue_full", "1,000 jobs wait; try again later")
    done = ctl("transcribe", "talk.m4a")
    assert (done.code, done.err) == (6, "whisperctl: 1,000 jobs wait; try again later\n")


def test_ctrl_c_cancels(peer: Peer, ctl: Shell) -> None:
    peer.on_submit = lambda job: peer.hear(job, "Hello")
    process = ctl.start("transcribe", "talk.m4a", "news.wav")
    peer.wait_for(lambda: peer.subscribers)
    process.send_signal(signal.SIGINT)
    done = Result(process)
    assert done.code == 130
    assert [job["state"] for job in peer.jobs.values()] == ["cancelled", "cancelled"]
    assert done.err.strip() == "cancelled job 1, 2"


def test_a_restarted_daemon_is_found_again(peer: Peer, ctl: Shell) -> None:
    peer.on_submit = lambda job: None
    process = ctl.start("transcribe", "talk.m4a")
    peer.wait_for(lambda: peer.subscribers)
    peer.stop()
    peer.start()
    peer.wait_for(lambda: peer.seen("submit") == 2)  # held again
    peer.finish(1, "Hello there.")
    done = Result(process)
    assert (done.code, done.out, len(peer.jobs)) == (0, "Hello there.\n", 1)


# --- submit ---


def test_submit_prints_ids_in_the_order_of_the_sources(peer: Peer, ctl: Shell) -> None:
    (ctl.folder / "list").write_text("# recordings\n\nnews.wav\ndQw4w9WgXcQ\r\n")
    done = ctl("submit", "talk.m4a", "--from", "list", "https://example.org/x", "missing")
    assert (done.code, done.out) == (2, "1\n2\n3\n4\n")
    assert [job["source"]["kind"] for job in peer.jobs.values()] == ["fd", "url", "fd", "video"]
    assert peer.submitted == [b"audio of talk.m4a", b"audio of news.wav"]
    assert "whisperctl: there is no file missing" in done.err
    assert not peer.attached


def test_standard_input(peer: Peer, ctl: Shell) -> None:
    assert ctl("submit", "-", stdin=b"from a pipe").out == "1\n"
    assert (peer.submitted, peer.jobs[1]["source"]["name"]) == ([b"from a pipe"], "stdin")
    assert ctl("submit", "--from", "-", stdin=b"talk.m4a\nnews.wav\n").out == "2\n3\n"
    twice = ctl("submit", "--from", "-", "-", stdin=b"")
    assert (twice.code, "only once" in twice.err) == (2, True)


def test_lists_as_other_programs_write_them(peer: Peer, ctl: Shell) -> None:
    (ctl.folder / "nul").write_bytes(b"a\0b.wav\ntalk.m4a\n")
    done = ctl("submit", "--from", "nul")
    assert (done.code, done.out) == (2, "1\n")
    assert done.err == "whisperctl: cannot read a\\u0000b.wav: embedded null byte\n"
    assert ctl("submit", "--from", "nul", "--wait", "-o", "words").code == 2
    assert (ctl.folder / "words/talk.txt").exists()
    (ctl.folder / "marked").write_text("talk.m4a\r\nnews.wav\r\n", "utf-8-sig")
    assert ctl("submit", "--from", "marked").code == 0
    for code in ("utf-16-le", "utf-16-be"):
        (ctl.folder / "wide").write_text("\ufefftalk.m4a\n", code)
        done = ctl("submit", "--from", "wide")
        assert (done.code, done.out) == (2, "")
        assert done.err == "whisperctl: the list wide is UTF-16: save it as UTF-8\n"
    assert len(peer.jobs) == 4


def test_a_closed_standard_input(peer: Peer, ctl: Shell) -> None:
    ctl.before = ["sh", "-c", 'exec "$@" <&-', "sh"]
    done = ctl("submit", "--from", "-")
    assert (done.code, done.out) == (2, "")
    assert done.err == "whisperctl: cannot read the list standard input: Bad file descriptor\n"
    done = ctl("submit", "dQw4w9WgXcQ", "-")  # by then there is a connection, which must not take its place
    assert (done.code, done.out, "Bad file descriptor" in done.err) == (2, "1\n", True)


def test_ids_and_files_that_look_alike(peer: Peer, ctl: Shell) -> None:
    (ctl.folder / "interview01").write_bytes(b"a file")
    done = ctl("submit", "interview01", "./interview01", "--", "-dQw4w9WgXc")
    assert [job["source"] for job in peer.jobs.values()] == [
        {"kind": "video", "id": "interview01"},
        {"kind": "fd", "name": "interview01"},
        {"kind": "video", "id": "-dQw4w9WgXc"},
    ]
    assert "write ./interview01" in done.err


@requires_program("setpriv")
def test_an_id_where_one_may_not_look_for_files(peer: Peer, ctl: Shell) -> None:
    ctl.before = ["sh", "-c", 'chmod 0 . && exec "$@"', "sh", *AS_A_USER]
    done = ctl("submit", "dQw4w9WgXcQ")
    assert (done.code, done.out, done.err) == (0, "1\n", "")


def test_submit_json_and_wait(peer: Peer, ctl: Shell) -> None:
    jobs = [json.loads(line) for line in ctl("submit", "--json", "talk.m4a", "news.wav").out.splitlines()]
    assert [job["id"] for job in jobs] == [1, 2]
    assert ctl("submit", "--wait", "talk.m4a").out == "Hello there.\nGood bye.\n"
    assert ctl("submit", "--format", "srt", "talk.m4a").code == 2
    assert ctl("submit").code == 2


# --- transcripts ---


def test_every_format(peer: Peer, ctl: Shell) -> None:
    job = peer.add_job()
    peer.finish(job, "Hello --> there.", "Good\nbye.")
    assert ctl("result", "1").out == "Hello --> there.\nGood\nbye.\n"
    assert (
        ctl("result", "1", "--format", "tsv").out
        == "start\tend\ttext\n0\t2000\tHello -> there.\n2000\t4000\tGood bye.\n"
    )
    srt = ctl("result", "1", "--format", "srt").out
    assert srt.startswith("1\n00:00:00,000 --> 00:00:02,000\nHello -> there.\n\n2\n")
    vtt = ctl("result", "1", "--format", "vtt").out
    assert vtt.startswith("WEBVTT\n")
    assert "00:00:02.000 --> 00:00:04.000\nGood bye.\n" in vtt
    assert json.loads(ctl("result", "1", "--format", "json").out) == peer.transcripts[job]
    wrapped = json.loads(ctl("result", "1", "--json").out)
    assert (wrapped["job"]["id"], wrapped["transcript"]) == (1, peer.transcripts[job])


def test_results_of_all_kinds_and_the_largest_exit_code(peer: Peer, ctl: Shell) -> None:
    done, failed, waiting = peer.add_job(), peer.add_job(), peer.add_job()
    peer.finish(done, "Hello.")
    peer.fail(failed, "worker_crashed", "it crashed three times")
    assert ctl("result", str(done)).code == 0
    assert (ctl("result", str(failed)).code, ctl("result", str(waiting)).code, ctl("result", "99").code) == (1, 7, 4)
    several = ctl("result", str(failed), str(done), str(waiting), "99")
    assert several.code == 7
    assert several.out == "== talk.m4a (job 1) ==\nHello.\n"
    assert "it crashed three times" in several.err
    assert "no job 99" in several.err
    assert json.loads(ctl("result", "--json", str(failed)).out)["transcript"] is None
    late = ctl("result", "--wait", "--timeout", "0.05", str(waiting))
    assert (late.code, "goes on" in late.err) == (7, True)
    assert ctl("result", "--timeout", "1", str(waiting)).code == 2


def test_result_and_wait_wait(peer: Peer, ctl: Shell) -> None:
    job = peer.add_job()
    processes = [ctl.start("result", "--wait", "1"), ctl.start("wait", "1")]
    peer.wait_for(lambda: peer.subscribers == 2)
    peer.finish(job, "Hello.")
    result, wait = map(Result, processes)
    assert (result.code, result.out) == (0, "Hello.\n")
    assert (wait.code, wait.out) == (0, "1  done  talk.m4a  2 s of audio in 2 s\n")
    assert json.loads(ctl("wait", "--json", "1").out)["state"] == "done"
    assert ctl("wait", "1", "2").code == 4


def test_output_files(peer: Peer, ctl: Shell) -> None:
    assert ctl("transcribe", "talk.m4a", "-o", "talk.txt").out == ""
    assert (ctl.folder / "talk.txt").read_text() == "Hello there.\nGood bye.\n"
    again = ctl("transcribe", "talk.m4a", "-o", "talk.txt")
    assert (again.code, "--force" in again.err, len(peer.jobs)) == (2, True, 1)  # said before any work was done
    assert ctl("transcribe", "talk.m4a", "-o", "talk.txt", "--force", "--format", "srt").code == 0
    assert (ctl.folder / "talk.txt").read_text().startswith("1\n00:00:00,000")
    (ctl.folder / "other").mkdir()
    (ctl.folder / "other/talk.m4a").write_bytes(b"x")
    assert ctl("transcribe", "talk.m4a", "other/talk.m4a", "news.wav", "-o", "words", "--format", "tsv").code == 0
    assert sorted(os.listdir(ctl.folder / "words")) == ["news.tsv", "talk-2.tsv", "talk.tsv"]
    assert ctl("result", "1", "2", "-o", "talk.txt").code == 2
    assert ctl("result", "1", "-o", "nowhere/talk.txt").code == 2
    assert ctl("result", "1", "-o", "words/").code == 0
    assert (ctl.folder / "words/talk.txt").exists()
    assert ctl("result", "1", "-o", "-").out == "Hello there.\nGood bye.\n"
    assert ctl("result", "1", "-o", "/dev/null").code == 0
    assert not [name for name in os.listdir(ctl.folder) if name.endswith(".tmp")]
    full = ctl("result", "1", "-o", "/dev/full")
    assert (full.code, "No space left" in full.err) == (2, True)


@requires_program("setpriv")
@pytest.mark.parametrize(
    "path",
    [
        "closed", "closed/talk.txt", "closed/new/", "closed/in/talk.txt", "fixed", "fixed/talk.txt", "fixed/new/",
        "x" * 252 + ".txt", "x" * 256 + "/", "full/talk.txt/", "link.txt", "talk.m4a/talk.txt",
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_said_before_any_work(peer: Peer, ctl: Shell, path: str) -> None:
    ctl.before = AS_A_USER
    for name, mode in (("closed", 0), ("fixed", 0o555), ("full", 0o755)):
        (ctl.folder / name).mkdir(mode)
    (ctl.folder / "full/talk.txt").write_text("other words")
    (ctl.folder / "link.txt").symlink_to("nowhere")
    for command in (("transcribe", "talk.m4a"), ("result", "1")):
        done = ctl(*command, "-o", path)
        assert (done.code, done.out, path.rstrip("/") in done.err) == (2, "", True)
        assert not done.err.startswith("whisperctl: cannot write:")
    assert not peer.requests


def test_names_with_a_number_are_looked_at_before_any_work(peer: Peer, ctl: Shell) -> None:
    for name in ("other", "words", "words/news.txt"):
        (ctl.folder / name).mkdir()
    (ctl.folder / "other/talk.m4a").write_bytes(b"x")
    (ctl.folder / "words/talk-2.txt").write_text("other words")
    taken = ctl("transcribe", "talk.m4a", "other/talk.m4a", "-o", "words")
    assert (taken.code, "words/talk-2.txt is there already" in taken.err) == (2, True)
    folder = ctl("transcribe", "news.wav", "talk.m4a", "-o", "words", "--force")
    assert (folder.code, "words/news.txt: it is a folder" in folder.err) == (2, True)
    assert not peer.requests


def test_a_name_may_be_as_long_as_names_can_be(peer: Peer, ctl: Shell) -> None:
    name = "ä" * 125 + ".text"
    assert ctl("transcribe", "talk.m4a", "-o", name).code == 0
    assert (ctl.folder / name).read_text() == "Hello there.\nGood bye.\n"
    peer.add_job(source={"kind": "fd", "name": "日" * 85})
    peer.finish(2, "Hello.")
    assert ctl("result", "2", "-o", "words/").code == 0
    assert (ctl.folder / f"words/{'日' * 66}.txt").read_text() == "Hello.\n"


def test_words_that_cannot_be_written_in_the_end_are_still_there(peer: Peer, ctl: Shell) -> None:
    def transcribe(job: int) -> None:
        (ctl.folder / "talk.txt").write_text("other words")  # nobody could know before
        peer.finish(job, "Hello.")

    peer.on_submit = transcribe
    done = ctl("transcribe", "talk.m4a", "-o", "talk.txt")
    assert (done.code, "'whisperctl result 1'" in done.err) == (2, True)
    assert (ctl.folder / "talk.txt").read_text() == "other words"


def test_a_name_writes_no_lines_of_its_own(ctl: Shell) -> None:
    done = ctl("submit", "gone\nwhisperctl: all is well")
    assert (done.code, done.err) == (2, "whisperctl: there is no file gone\\nwhisperctl: all is well\n")


def test_a_failed_job_writes_no_file(peer: Peer, ctl: Shell) -> None:
    peer.on_submit = lambda job: peer.fail(job, "bad_audio", "no audio")
    assert ctl("transcribe", "talk.m4a", "-o", "talk.txt").code == 1
    assert not (ctl.folder / "talk.txt").exists()


def test_truncated_audio_is_told(peer: Peer, ctl: Shell) -> None:
    peer.finish(peer.add_job(), "Hello.", truncated=True)
    done = ctl("result", "1")
    assert (done.code, done.out, "ends early" in done.err) == (0, "Hello.\n", True)


def test_speech_without_words_is_told_to_people_alone(peer: Peer, ctl: Shell) -> None:
    def finish(*gaps: list[float]) -> None:
        coverage = {"speech_s": 90.0, "transcribed_s": 60.0, "gaps": list(gaps)}
        peer.on_submit = lambda job: peer.finish(job, "Hello.", coverage=coverage)

    finish([62.4, 74.1])
    told = "12 s of speech have no words: 1:02 to 1:14\n"
    done = ctl("transcribe", "talk.m4a")
    assert (done.code, done.out, done.err) == (0, "Hello.\n", f"talk.m4a: {told}")
    done = ctl("result", "1", "--format", "json")
    assert (json.loads(done.out)["coverage"]["gaps"], done.err) == ([[62.4, 74.1]], f"job 1: {told}")
    done = ctl("result", "1", "-q")
    assert (done.code, done.out, done.err) == (0, "Hello.\n", "")
    finish(*([60.0 * minute, 60.0 * minute + 2] for minute in range(1, 6)))
    assert ctl("transcribe", "talk.m4a").err == (
        "talk.m4a: 10 s of speech have no words: 1:00 to 1:02, 2:00 to 2:02, 3:00 to 3:02, and 2 stretches more\n"
    )
    finish()
    assert ctl("transcribe", "talk.m4a").err == ""


# --- jobs and the daemon ---


def test_follow(peer: Peer, ctl: Shell) -> None:
    job = peer.add_job()
    process = ctl.start("follow", "1")
    peer.wait_for(lambda: peer.subscribers)
    peer.hear(job, "one")
    peer.say(job, "state", state="queued", discard=True)
    peer.hear(job, "one")  # again: it stands there already
    peer.finish(job, "one", "two")
    done = Result(process)
    assert (done.code, done.out) == (0, "[0:00 - 0:02] one\n[0:02 - 0:04] two\n")
    events = [json.loads(line) for line in ctl("follow", "1", "--json", "--after-seq", "2").out.splitlines()]
    assert [(event["event"], event["seq"]) for event in events] == [("state", 3), ("segment", 4), ("end", 5)]


def test_list(peer: Peer, ctl: Shell) -> None:
    assert (ctl("list").out, ctl("list").err) == ("", "no jobs\n")
    for name in ("a.wav", "b\x1b[31m\u202e.wav"):
        peer.add_job(source={"kind": "fd", "name": name})
    peer.add_job(state="failed", error={"code": "bad_audio", "message": "nothing\nto hear"})
    table = ctl("list")
    assert table.err == ""
    head, third, second, first = table.out.splitlines()
    assert head.split() == ["JOB", "STATE", "PRIORITY", "SUBMITTED", "SOURCE"]
    assert r"bad_audio: nothing\nto hear" in third
    assert r"b\u001b[31m\u202e.wav" in second
    assert "a.wav" in first
    assert ctl("list", "-q").out == "3\n2\n1\n"
    assert ctl("-q", "list", "--state", "failed").out == "3\n"
    assert [json.loads(line)["id"] for line in ctl("list", "--json", "--limit", "2").out.splitlines()] == [3, 2]
    assert "--limit" in ctl("list", "--limit", "2").err
    assert ctl("list", "--state", "gone").code == 2


def test_cancel_forget_retry(peer: Peer, ctl: Shell) -> None:
    peer.add_job()
    done = ctl("cancel", "1", "9")
    assert (done.code, done.err) == (4, "job 1 cancelled\nwhisperctl: there is no job 9\n")
    assert ctl("retry", "1").out == "2\n"
    peer.fail(2, "internal", "oh")
    assert ctl("retry", "--failed").out == "3\n"
    assert ctl("retry").code == 2
    assert json.loads(ctl("forget", "--json", "1").out)["state"] == "cancelled"
    assert 1 not in peer.jobs


def test_health_and_status(peer: Peer, ctl: Shell) -> None:
    done = ctl("health")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("ready · model micro on cpu (float32) · 0 of 1,000 waiting")
    assert json.loads(ctl("health", "--json").out) == peer.health
    peer.health.update(status="degraded", problems=["the model's file is missing: put it there"])
    done = ctl("health")
    assert (done.code, done.out.splitlines()[1]) == (3, "problem: the model's file is missing: put it there")
    peer.add_job(source={"kind": "fd", "name": "waits.wav"})
    for each in ("starting", "degraded", "paused", "stopping", "ready"):
        peer.health.update(status=each)
        status = ctl()
        assert (status.code, status.out.startswith(each), "waits.wav" in status.out) == (0, True, True)
    told = json.loads(ctl("--json").out)
    assert [job["id"] for job in told.pop("jobs")] == [1]
    assert told == peer.health
    behind = ctl("--json", "health")
    assert (behind.code, "whisperctl health --json" in behind.err) == (2, True)
    peer.stop()
    assert ctl().code == 3


def test_the_daemon_is_managed(peer: Peer, ctl: Shell) -> None:
    assert ctl("pause", "--free-gpu").err == "whisperd is paused\n"
    assert peer.requests[-1].params.free_gpu  # type: ignore[union-attr]
    assert ctl("resume").code == 0
    assert json.loads(ctl("pause", "--json").out) == {"status": "paused"}
    done = ctl("resume", "--json")
    assert (json.loads(done.out), done.err) == ({"status": "ready"}, "")
    assert json.loads(ctl("model", "unload", "--json").out)["name"] == "micro"
    peer.refuse["model"] = WhisperdError("forbidden", "only admins may do this")
    done = ctl("model", "load")
    assert (done.code, done.err) == (8, "whisperctl: only admins may do this\n")


def test_stats(peer: Peer, ctl: Shell) -> None:
    assert ctl("stats").code == 0  # a daemon that tells nothing
    peer.stats = {
        "jobs": {"since_start": {"done": 12, "failed": 0}, "total": {"done": 1200}},
        "wait_s": {"interactive": {"p50": 0.1, "p95": 65}, "background": {"p50": None, "p95": None}},
        "model": {"rss_bytes": 812_345_678, "crashes": 1, "device_used_bytes": None},
        "lanes": {
            "copy": {"active": 1, "waiting": 0},
            "fetch": {"failed": 2, "extractors": ["youtube"], "yt_dlp": "2026.07.04", "yt_dlp_age_days": 9,
                      "js_runtime": "deno 2.5", "rests_until": None},
        },
        "software": {"torch": "2.13.0", "cuda": "13.0", "cuda_devices": 0, "ffmpeg": None}, "news": "to this version",
    }  # fmt: skip
    lines = dict(line.split("  ", 1) for line in ctl("stats").out.splitlines())
    assert {title: text.strip() for title, text in lines.items()} == {
        "jobs": "1,200 done", "since start": "12 done", "model process": "812 MB, 1 crash", "copy lane": "1 active",
        "fetch lane": "2 failed", "software": "torch 2.13.0, yt-dlp 2026.07.04 (9 days old), deno 2.5",
        "waited": "interactive: half within 0.1 s, 95 % within 1 min 5 s",
    }  # fmt: skip
    assert json.loads(ctl("stats", "--json").out) == peer.stats


# --- the shell's ways ---


def test_no_daemon(ctl: Shell, tmp_path: Path) -> None:
    done = ctl("--socket", str(tmp_path / "none"), "health")
    assert done.code == 3
    assert f"start it with 'whisperd --socket {tmp_path}/none'" in done.err
    assert ctl("transcribe", "talk.m4a", "--socket", str(tmp_path / "none")).code == 3
    done = ctl("submit", "talk.m4a", "news.wav", "--socket", str(tmp_path / "none"))
    assert (done.code, "1 source not submitted" in done.err) == (3, True)


def test_a_closed_pipe_ends_silently(peer: Peer, ctl: Shell) -> None:
    for _ in range(150):
        peer.add_job(source={"kind": "fd", "name": "x" * 200})
    process = ctl.start("list", "--limit", "150", "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(20) == 141


def test_a_full_disk_behind_stdout(ctl: Shell) -> None:
    with open("/dev/full", "wb") as full:
        process = ctl.start("health", stdout=full)
        _, error = process.communicate(timeout=20)
    assert (process.returncode, b"No space left" in error, b"Traceback" in error) == (1, True, False)


def test_json_is_json_in_every_locale(peer: Peer, ctl: Shell) -> None:
    name = '\U0001f600 \\ä" 日本'
    peer.finish(peer.add_job(source={"kind": "fd", "name": name}), name)
    told = json.loads(ctl("result", "1", "--json").out)
    assert told["job"]["source"]["name"] == name
    ctl.environ |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = ctl("result", "1", "--json")
    assert done.out.isascii()
    assert json.loads(done.out) == told
    assert ctl("result", "1").out == '\\ud83d\\ude00 \\\\u00e4" \\u65e5\\u672c\n'


def test_closed_streams(ctl: Shell) -> None:
    command = f"{sys.executable} -m whisperctl health >&- 2>&-"
    assert subprocess.run(command, shell=True, env=ctl.environ, timeout=20, check=False).returncode == 0


def test_help_and_version(ctl: Shell) -> None:
    assert ctl("--version").out.startswith("whisperctl, version 0.")
    assert "transcribe" in ctl("-h").out
    for name in ("transcribe", "submit", "result", "wait", "list", "follow", "cancel", "forget", "retry", "pause"):
        assert ctl(name, "-h").out.startswith("Usage: whisperctl")
    done = ctl("frobnicate")
    assert (done.code, "No such command" in done.err) == (2, True)
    assert ctl("result", "0").code == 2
    assert ctl("result", "one").code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("result", "99999999999999999999"),
        ("result", "9007199254740992"),
        ("follow", "99999999999999999999"),
        ("submit", "--beam-size", "99999999999999999999", "talk.m4a"),
        ("submit", "--initial-prompt", os.fsdecode(b"\xff"), "talk.m4a"),
        ("transcribe", "--temperature", "nan", "talk.m4a"),
        ("model", "pull", os.fsdecode(b"\xff")),
    ],
)
def test_what_cannot_be_asked_is_wrong_usage(peer: Peer, ctl: Shell, arguments: tuple[str, ...]) -> None:
    done = ctl(*arguments)
    assert (done.code, done.out, "defect" in done.err) == (2, "", False)
    assert done.err.startswith("whisperctl: ")
    assert not peer.jobs


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion(ctl: Shell, name: str) -> None:
    done = ctl("completion", name)
    assert (done.code, "_WHISPERCTL_COMPLETE" in done.out) == (0, True)


def test_completion_answers_the_shell(ctl: Shell) -> None:
    ctl.environ |= {"_WHISPERCTL_COMPLETE": "bash_complete", "COMP_WORDS": "whisperctl tra", "COMP_CWORD": "1"}
    assert ctl().out == "plain,transcribe\n"


@pytest.mark.parametrize(
    "words", ["transcribe ta", "submit talk.m4a ta", "submit --from ta", "result 1 -o ta", "health --socket ta"]
)
def test_completion_leaves_files_to_the_shell(ctl: Shell, words: str) -> None:
    count = str(len(words.split()))
    ctl.environ |= {"_WHISPERCTL_COMPLETE": "bash_complete", "COMP_WORDS": f"whisperctl {words}", "COMP_CWORD": count}
    assert ctl().out == "file,ta\n"


def test_verbose_and_quiet(peer: Peer, ctl: Shell) -> None:
    assert "job 1: talk.m4a, interactive, at" in ctl("transcribe", "talk.m4a", "-v").err
    assert ctl("cancel", "1", "-q").err == ""


def test_every_error_code_has_an_exit_code() -> None:
    assert set(ErrorCode) <= set(EXIT_CODES)


def test_every_exit_code_stands_in_the_docs() -> None:
    text = (Path(__file__).parents[1] / "docs/cli.md").read_text()
    for code, number in EXIT_CODES.items():
        assert any(f"`{code}`" in line and f"| {int(number)} |" in line for line in text.splitlines()), code
