"""The Python client against a daemon's side that does what the test says."""

from __future__ import annotations

import io
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.peer import Peer
from tests.support import requires_root
from whisperctl import (
    BadRequest,
    Client,
    DaemonUnreachable,
    JobCancelled,
    JobFailed,
    JobTimeout,
    NotFound,
    QueueFull,
    SourceUnreadable,
    WhisperdError,
)
from whisperctl.connection import MAX_OPEN, MAX_OPEN_WAITS
from whisperctl.discovery import candidates, connect
from whisperctl.link import next_message
from whisperd.protocol.channel import Channel


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(tmp_path / "s")
    yield peer
    peer.stop()


@pytest.fixture
def client(peer: Peer) -> Iterator[Client]:
    with Client(peer.path, reconnect_s=20) as client:
        yield client


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    path = tmp_path / "talk.m4a"
    path.write_bytes(b"a talk")
    return path


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Start `function` in a thread; what is returned waits for its value, or raises what it raised."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def value() -> Any:
        thread.join(20)
        assert outcome, "the thread did not end"
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    return value


# --- work and words ---


def test_transcribe(peer: Peer, client: Client, talk: Path) -> None:
    peer.transcribe_at_once("Hello there.", "Good bye.")
    transcript = client.transcribe(talk, language="en")
    assert transcript.text == " Hello there. Good bye."
    assert [(s.start, s.end, s.text) for s in transcript.segments] == [(0, 2, " Hello there."), (2, 4, " Good bye.")]
    assert transcript.to_wire() == peer.transcripts[1]
    job = peer.jobs[1]
    assert (job["priority"], job["source"], job["options"]["language"]) == (
        "interactive", {"kind": "fd", "name": "talk.m4a"}, "en",
    )  # fmt: skip
    assert peer.submitted == [b"a talk"]
    assert not peer.attached


def test_transcribe_gives_segments_as_they_come(peer: Peer, client: Client, talk: Path) -> None:
    heard = []
    words = in_thread(lambda: client.transcribe(talk, on_segment=lambda segment: heard.append(segment.text)))
    peer.wait_for(lambda: peer.jobs)
    peer.hear(1, "one")
    peer.hear(1, "two")
    peer.finish(1, "one", "two")
    assert words().text == " one two"
    assert heard == [" one", " two"]


def test_a_transcript_that_was_there_gives_its_segments_too(peer: Peer, client: Client, talk: Path) -> None:
    peer.transcribe_at_once("one", "two")
    heard = []
    client.transcribe(talk, on_segment=lambda segment: heard.append(segment.text))
    assert heard == [" one", " two"]


def test_a_timeout_leaves_the_job_running(peer: Peer, client: Client, talk: Path) -> None:
    with pytest.raises(JobTimeout) as caught:
        client.transcribe(talk, timeout_s=0.05)
    assert caught.value.job_id == 1
    assert peer.jobs[1]["state"] == "queued"
    peer.finish(1, "late")
    assert client.result(1).text == " late"


def test_a_timeout_with_segments_leaves_the_job_running(peer: Peer, client: Client, talk: Path) -> None:
    with pytest.raises(JobTimeout) as caught:
        client.transcribe(talk, timeout_s=0.05, on_segment=print)
    assert caught.value.job_id == 1


@pytest.mark.parametrize("timeout_s", [3e6, 1e12, math.inf])
def test_no_timeout_is_too_long(peer: Peer, client: Client, talk: Path, timeout_s: float) -> None:
    job = client.submit(talk, timeout_s=timeout_s)
    waiting = in_thread(lambda: client.result(job.id, wait=True, timeout_s=timeout_s))
    following = in_thread(lambda: [event.kind for event in client.follow(job.id, timeout_s=timeout_s)])
    peer.wait_for(lambda: peer.seen("result") and peer.subscribers)
    peer.finish(job.id, "heard")
    assert waiting().text == " heard"
    assert following() == ["state", "end"]


def test_a_wait_for_a_message_goes_on_to_its_deadline() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        deadline = time.monotonic() + 0.1
        with pytest.raises(TimeoutError):
            next_message(Channel(ours, max_bytes=1000), deadline, longest_s=0.01)
        assert time.monotonic() >= deadline


def test_a_timeout_while_copying_names_the_key(peer: Peer, client: Client, talk: Path) -> None:
    peer.silent.add("submit")
    with pytest.raises(JobTimeout) as caught:
        client.submit(talk, key="mine", timeout_s=0.05)
    assert (caught.value.job_id, caught.value.key) == (None, "mine")


def test_failures_are_results_that_raise_when_asked_for_words(peer: Peer, client: Client, talk: Path) -> None:
    job = client.submit(talk)
    peer.fail(job.id, "bad_audio", "there is no audio in it")
    result = client.result(job.id, wait=True)
    assert (str(result.job.state), result.transcript) == ("failed", None)
    with pytest.raises(JobFailed, match="no audio") as caught:
        assert result.text
    assert (caught.value.code, caught.value.job.id) == ("bad_audio", job.id)
    with pytest.raises(JobCancelled):
        client.result(client.cancel(client.submit(talk, fresh=True).id).id).require()
    with pytest.raises(JobTimeout):
        client.result(client.submit(talk, key="other").id).require()


def test_refusals_have_classes(peer: Peer, client: Client, talk: Path) -> None:
    with pytest.raises(NotFound):
        client.result(99)
    with pytest.raises(BadRequest, match="does not know 'speed'"):
        client.submit(talk, speed=2)
    with pytest.raises(BadRequest, match="does not know 'key'"):
        client.submit(talk, options={"key": "mine"}, language="de")
    with pytest.raises(BadRequest, match="'gone'"):
        client.jobs(state="gone")
    peer.refuse["submit"] = WhisperdError("queue_full", "full")
    with pytest.raises(QueueFull) as caught:
        client.submit(talk)
    assert caught.value.code == "queue_full"
    peer.refuse["submit"] = WhisperdError("from_the_future", "what is this")
    with pytest.raises(WhisperdError) as new:
        client.submit(talk)
    assert new.value.code == "from_the_future"


def test_the_other_operations(peer: Peer, client: Client, talk: Path) -> None:
    for _ in range(3):
        client.submit(talk)
    assert [job.id for job in client.jobs()] == [3, 2, 1]
    assert [job.id for job in client.jobs(limit=2)] == [3, 2]
    assert [job.id for job in client.jobs(before=3, limit=1)] == [2]
    assert client.jobs(state="done") == []
    assert client.job(2).state == "queued"
    assert client.cancel(2).state == "cancelled"
    assert client.retry(2).id == 4
    assert client.forget(2).id == 2
    assert client.submit_video("dQw4w9WgXcQ").source == {"kind": "video", "id": "dQw4w9WgXcQ"}
    assert client.submit_url("https://example.org/a").source == {"kind": "url", "url": "https://example.org/a"}
    assert client.health()["status"] == "ready"
    assert (client.pause(), client.resume()) == ("paused", "ready")
    assert client.model("load")["name"] == "micro"
    assert client.stats() == {}


def test_jobs_go_through_all_pages(peer: Peer, client: Client) -> None:
    for _ in range(450):
        peer.add_job()
    assert [job.id for job in client.jobs(limit=1000)] == list(range(450, 0, -1))
    assert len(client.jobs(limit=201)) == 201


# --- sources ---


def test_every_kind_of_source(peer: Peer, client: Client, talk: Path) -> None:
    with talk.open("rb") as file:
        file.read(3)  # a file is handed over from its first byte
        client.submit(file)
        client.submit(file.fileno())
        assert file.read() == b"alk"  # still open, still where it was
    client.submit(str(talk))
    client.submit(io.BytesIO(b"a talk"), name="in-memory.wav")
    reader, writer = os.pipe()
    os.write(writer, b"a talk")
    os.close(writer)
    client.submit(reader)
    os.close(reader)
    assert peer.submitted == [b"a talk"] * 5
    assert [job["source"]["name"] for job in peer.jobs.values()] == ["talk.m4a", "", "talk.m4a", "in-memory.wav", ""]


def test_a_long_stream_goes_through_a_file(peer: Peer, client: Client) -> None:
    data = os.urandom(1000) * 20_000  # 20 MB: more than is kept in memory
    client.submit(io.BytesIO(data))
    assert peer.submitted == [data]


def test_what_cannot_be_read_is_said_and_nothing_is_sent(peer: Peer, client: Client, tmp_path: Path) -> None:
    with (tmp_path / "closed.wav").open("wb+") as closed:
        closed.write(b"x")
    with pytest.raises(SourceUnreadable, match="there is no file"):
        client.submit(tmp_path / "missing.wav")
    with pytest.raises(SourceUnreadable, match="folder"):
        client.submit(tmp_path)
    with pytest.raises(SourceUnreadable, match="binary mode"):
        client.submit(io.StringIO("text"))
    with pytest.raises(SourceUnreadable):
        client.submit(987)
    with pytest.raises(SourceUnreadable):
        client.submit(10**20)
    for name in ("a\0b.wav", "\ud800.wav"):
        with pytest.raises(SourceUnreadable):
            client.submit(name)
    with pytest.raises(SourceUnreadable, match="closed file"):
        client.submit(closed)
    _, terminal = os.openpty()
    with pytest.raises(SourceUnreadable, match="terminal"):
        client.submit(terminal)
    assert not peer.requests


def test_names_that_are_no_text_arrive_as_text(peer: Peer, client: Client, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    Path(os.fsdecode(path)).write_bytes(b"x")
    client.submit(os.fsdecode(path))
    assert peer.jobs[1]["source"]["name"] == "caf\ufffd.wav"
    client.submit(io.BytesIO(b"x"), name="ä" * 300)
    assert peer.jobs[2]["source"]["name"] == "ä" * 127  # 255 bytes hold no half letter
    client.submit(io.BytesIO(b"x"), name="\ud800.wav")
    assert peer.jobs[3]["source"]["name"] == "\ufffd.wav"


def test_no_descriptor_is_left_open(peer: Peer, client: Client, talk: Path) -> None:
    client.health()
    before = files_held()
    with talk.open("rb"):
        assert files_held() == sorted([*before, str(talk)]), "a file left open would be seen"
    for _ in range(5):
        client.submit(talk)
        client.submit(io.BytesIO(b"x"))
        with pytest.raises(BadRequest):
            client.submit(talk, speed=2)
    assert files_held() == before


def files_held() -> list[str]:
    """Which files this process holds; not its sockets, of which threads of an earlier test may still close some."""
    held = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            held.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(path for path in held if path.startswith("/") and not path.startswith("/proc/"))


# --- threads ---


def test_waiting_threads_hold_up_nobody(peer: Peer, client: Client) -> None:
    jobs = [peer.add_job() for _ in range(MAX_OPEN_WAITS)]
    waiting = [in_thread(partial(client.result, job, wait=True)) for job in jobs]
    peer.wait_for(lambda: peer.seen("result") == len(jobs))
    late = in_thread(lambda: client.result(jobs[0], wait=True))
    assert client.health()["status"] == "ready"
    client.cancel(jobs[1])
    for job in [jobs[0], *jobs[2:]]:
        peer.finish(job, f"job {job}")
    assert late().text == f" job {jobs[0]}"
    for job, result in zip(jobs, waiting, strict=True):
        assert result().job.id == job
    assert peer.connections == 1


def test_never_more_than_the_daemon_reads(peer: Peer, client: Client) -> None:
    peer.silent.add("health")
    threads = [in_thread(client.health) for _ in range(MAX_OPEN + 5)]
    peer.wait_for(lambda: peer.seen("health") == MAX_OPEN)
    assert peer.seen("health") == MAX_OPEN
    client.close()
    for health in threads:
        with pytest.raises((DaemonUnreachable, RuntimeError)):
            health()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"initial_prompt": "x" * 70_000}, "at most 65536"),
        ({"initial_prompt": "\udcff"}, "initial_prompt"),
        ({"temperature": math.nan}, "temperature: .* not finite"),
        ({"suppress_tokens": [1] * 1025}, "suppress_tokens: 1025"),
        ({"beam_size": 10**20}, "beam_size"),
        ({"beam_size": np.int64(5)}, "beam_size: .*numpy.int64"),
    ],
)
def test_what_cannot_be_sent_harms_nobody_who_shares_the_client(
    peer: Peer, client: Client, talk: Path, options: dict[str, Any], words: str
) -> None:
    job = client.submit(talk, attached=True)
    holders = set(peer.attached[job.id])
    waiting = in_thread(lambda: client.result(job.id, wait=True))
    peer.wait_for(lambda: peer.seen("result"))
    for _ in range(MAX_OPEN + 1):  # none of them keeps a place
        with pytest.raises(BadRequest, match=words):
            client.submit(talk, **options)
    assert client.health()["status"] == "ready"
    assert (peer.connections, peer.attached[job.id], len(peer.jobs)) == (1, holders, 1)
    peer.finish(job.id, "heard")
    assert waiting().text == " heard"


def test_a_number_that_no_frame_carries_is_a_bad_request(peer: Peer, client: Client) -> None:
    questions: list[Callable[[int], Any]] = [client.job, client.cancel, client.retry, client.forget]
    for ask in [*questions, lambda job_id: list(client.follow(job_id))]:
        for job_id in (2**53, 10**20):
            with pytest.raises(BadRequest, match="job"):
                ask(job_id)
    peer.wait_for(lambda: peer.connections == 1)  # the one that all but `follow` share


def test_interrupting_a_wait_leaves_the_client_usable(peer: Peer, client: Client) -> None:
    job = peer.add_job()
    with pytest.raises(JobTimeout):
        client.result(job, wait=True, timeout_s=0.01)
    peer.finish(job, "done")
    assert client.result(job).text == " done"


# --- a daemon that goes away ---


def test_a_lost_submit_is_sent_again_under_its_key(peer: Peer, client: Client, talk: Path) -> None:
    peer.drop["submit"] = 2
    job = client.submit(talk)
    submits: list[Any] = [request.params for request in peer.requests if request.op == "submit"]
    assert len({submit.key for submit in submits}) == 1
    assert (len(submits), job.id, len(peer.jobs)) == (3, 1, 1)


def test_a_wait_survives_a_restart(peer: Peer, client: Client) -> None:
    job = peer.add_job()
    result = in_thread(lambda: client.result(job, wait=True))
    peer.wait_for(lambda: peer.seen("result"))
    peer.stop()
    peer.start()
    peer.finish(job, "after all")
    assert result().text == " after all"


def test_follow_resumes_without_gap_or_repeat(peer: Peer, client: Client) -> None:
    job = peer.add_job()
    events = client.follow(job)
    peer.hear(job, "one", "two")
    assert next(events).kind == "state"
    assert [next(events).segment.text for _ in range(2)] == [" one", " two"]  # type: ignore[union-attr]
    peer.stop()
    peer.hear(job, "three")
    peer.start()
    peer.finish(job, "one", "two", "three")
    rest = list(events)
    assert [event.kind for event in rest] == ["segment", "end"]
    assert [event.seq for event in rest] == [4, 5]
    assert [event.seq for event in client.follow(job)] == [1, 2, 3, 4, 5]
    assert [event.seq for event in client.follow(job, after_seq=4)] == [5]
    assert [event.kind for event in client.follow(job, after_seq=5)] == ["end"]  # it always ends with the end


def test_leaving_follow_ends_the_subscription(peer: Peer, client: Client) -> None:
    job = peer.add_job()
    peer.hear(job, "one")
    events = client.follow(job)
    next(events)
    assert peer.connections == 1
    events.close()  # type: ignore[attr-defined]
    peer.wait_for(lambda: peer.connections == 0)


def test_an_attached_job_is_held_again_after_a_restart_though_nobody_asks(
    peer: Peer, client: Client, talk: Path
) -> None:
    job = client.submit(talk, attached=True)
    peer.wait_for(lambda: peer.attached[job.id])
    peer.stop()
    peer.wait_for(lambda: not peer.attached[job.id])
    talk.unlink()  # the client has it open
    peer.start()
    peer.wait_for(lambda: peer.attached[job.id])
    assert peer.submitted == [b"a talk"] * 2
    peer.finish(job.id, "held")
    assert client.result(job.id).text == " held"
    assert len(peer.jobs) == 1


def test_an_attached_job_is_held_as_it_was_asked_for(peer: Peer, client: Client, talk: Path) -> None:
    temperatures = [0.0, 0.5]
    job = client.submit(talk, attached=True, temperature=temperatures)
    temperatures.append(math.nan)  # the caller's next one may be anything
    peer.stop()
    peer.wait_for(lambda: not peer.attached[job.id])
    peer.start()
    peer.wait_for(lambda: peer.attached[job.id])
    assert client.health()["status"] == "ready"
    sent: list[Any] = [request.params for request in peer.requests if request.op == "submit"]
    assert [params.options["temperature"] for params in sent] == [[0.0, 0.5]] * 2


def test_short_requests_do_not_wait_until_many_jobs_are_held_again(peer: Peer, client: Client, talk: Path) -> None:
    for _ in range(MAX_OPEN_WAITS + 1):
        client.submit(talk, attached=True)
    peer.silent.add("submit")  # each is compared, which takes long
    peer.hang_up()
    peer.wait_for(lambda: peer.seen("submit") == 2 * MAX_OPEN_WAITS + 1)
    assert in_thread(client.health)()["status"] == "ready"
    assert in_thread(partial(client.cancel, 1))().state == "cancelled"


def test_retry_is_not_done_twice(peer: Peer, client: Client) -> None:
    peer.add_job(state="failed")
    peer.drop["retry"] = 1
    with pytest.raises(DaemonUnreachable, match="list"):
        client.retry(1)
    assert peer.seen("retry") == 1


def test_stopping_is_waited_out(peer: Peer, client: Client, talk: Path) -> None:
    told: list[str] = []
    client = Client(peer.path, notify=told.append)
    peer.refuse["submit"] = WhisperdError("stopping", "whisperd is stopping")
    job = in_thread(lambda: client.submit(talk))
    peer.wait_for(lambda: peer.seen("submit") >= 2)
    peer.refuse.clear()
    assert job().id == 1
    assert told[0].startswith("whisperd has gone away")
    assert told[-1] == ""
    client.close()


def test_the_last_word_of_a_daemon_that_cannot_start(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()

    def answer() -> None:
        sock, _ = listener.accept()
        error = {"code": "unavailable", "message": "the configuration is wrong: see line 3"}
        Channel(sock, max_bytes=1000).send({"id": 0, "ok": False, "error": error})
        sock.shutdown(socket.SHUT_WR)

    answered = in_thread(answer)
    with Client(tmp_path / "s") as client, pytest.raises(WhisperdError, match="line 3") as caught:
        client.health()
    assert caught.value.code == "unavailable"
    answered()
    listener.close()


def test_a_daemon_that_never_comes_back_is_given_up(peer: Peer) -> None:
    with Client(peer.path, reconnect_s=0.2) as client:
        client.health()
        peer.stop()
        with pytest.raises(DaemonUnreachable):
            client.stats()
        with pytest.raises(DaemonUnreachable):
            client.health()
        peer.start()
        assert client.health()["status"] == "ready"


def test_a_daemon_that_hangs_is_told_of(peer: Peer) -> None:
    peer.silent.add("stats")
    with Client(peer.path, timeout_s=0.05) as client, pytest.raises(DaemonUnreachable, match="did not answer"):
        client.stats()


def test_garbage_from_the_other_side_is_a_lost_connection(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()

    def answer() -> None:
        for _ in range(2):
            sock, _ = listener.accept()
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            sock.close()
        listener.close()

    answered = in_thread(answer)
    with Client(tmp_path / "s") as client, pytest.raises(DaemonUnreachable):
        client.health()
    answered()


# --- forks and ends ---


def test_a_forked_child_is_told_to_make_its_own(peer: Peer) -> None:
    # A process of its own: pytest's threads and a fork do not mix.
    script = """
import os, sys
from whisperctl import Client
client = Client(sys.argv[1])
client.health()
child = os.fork()
if child == 0:
    try:
        client.health()
    except RuntimeError as error:
        os._exit(7 if "after a fork" in str(error) else 1)
    os._exit(2)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
assert client.health()["status"] == "ready"
keep = os.fork()
if keep == 0:
    sys.stdin.read()  # outlives the parent's connection: it must not hold it open
    os._exit(0)
client.close()
sys.stdout.write("closed"); sys.stdout.flush()
os.waitpid(keep, 0)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(peer.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.read(6) == b"closed"
    peer.wait_for(lambda: peer.connections == 0)
    process.communicate(b"")
    assert process.returncode == 0


def test_a_closed_client_says_so(peer: Peer) -> None:
    client = Client(peer.path)
    client.health()
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.health()
    peer.wait_for(lambda: peer.connections == 0)


# --- finding the daemon ---


def test_the_socket_is_looked_for_where_the_contract_says(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    own, system = tmp_path / "whisperd/whisperd.sock", Path("/run/whisperd/whisperd.sock")
    assert candidates(None, environ) == [str(own), str(system)]
    assert candidates(None, environ | {"WHISPERD_SOCKET": "/x"}) == ["/x"]
    assert candidates("/y", environ | {"WHISPERD_SOCKET": "/x"}) == ["/y"]
    assert candidates(None, {}) == [str(system)]


def test_a_stale_socket_is_passed_over(peer: Peer, tmp_path: Path) -> None:
    stale, missing = tmp_path / "stale", str(tmp_path / "missing")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    sock, path = connect([missing, str(stale), str(peer.path)])
    sock.close()
    assert path == str(peer.path)
    with pytest.raises(DaemonUnreachable, match=r"left over.*start it with"):
        connect([str(stale)])
    with pytest.raises(DaemonUnreachable, match=r"not running.*start it with"):
        connect([missing])
    with pytest.raises(DaemonUnreachable, match=r"missing or .*stale"):
        connect([missing, str(stale)])


@requires_root
def test_a_closed_socket_names_its_group(peer: Peer) -> None:
    peer.path.chmod(0o660)
    os.chown(peer.path, 0, 4)
    script = f"""
import grp, os  # all that is imported later, too: nobody may not be allowed to read Python's own folder
from whisperctl import Client, DaemonUnreachable
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    Client({str(peer.path)!r}).health()
except DaemonUnreachable as error:
    print(error)
"""
    for folder in (peer.path.parent, *peer.path.parent.parents[:-2]):
        folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "belongs to the group 'adm'" in done.stdout
    assert "usermod -aG adm" in done.stdout
