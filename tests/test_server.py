"""The server with real sockets: who is there, what hurts only its own connection, and every limit."""

from __future__ import annotations

import grp
import logging
import os
import resource
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support import RawClient, requires_root, wait_until
from whisperd.daemon.config import Config, ConfigError, load_config
from whisperd.daemon.loop import Loop
from whisperd.daemon.wire.listener import Listener, SocketTakenError, open_listener
from whisperd.daemon.wire.server import Peer, Server
from whisperd.protocol.channel import peer_credentials
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.frames import Raw, encode_body, encode_frame
from whisperd.protocol.messages import Request
from whisperd.protocol.paths import Paths


@dataclass
class Served:
    """A server whose loop runs in a thread. Requests and peers are kept for the test to look at."""

    loop: Loop
    config: Config
    server: Server = field(init=False)
    requests: list[tuple[Peer, Request]] = field(default_factory=list)
    closed: list[Peer] = field(default_factory=list)
    clients: list[RawClient] = field(default_factory=list)

    def dispatch(self, peer: Peer, request: Request, descriptors: list[int]) -> None:
        """`result` waits for ever, `stats` has a bug, anything else is answered with who asked."""
        self.requests.append((peer, request))
        if request.op == "result":
            return
        if request.op == "stats":
            raise KeyError("a bug")
        who = {"uid": peer.uid, "gid": peer.gid, "pid": peer.pid}
        peer.reply(request.id, who | {"op": request.op, "descriptors": len(descriptors)})

    def client(self) -> RawClient:
        client = RawClient(self.config.socket)
        self.clients.append(client)
        return client

    def do(self, fn: Callable[[], Any]) -> Any:
        """Run a function in the loop's thread and return its result."""
        done = threading.Event()
        result: list[Any] = []

        def run() -> None:
            result.append(fn())
            done.set()

        self.loop.call_soon_threadsafe(run)
        assert done.wait(30), "the loop stands still"
        return result[0]

    def peer(self, request_id: int) -> Peer:
        """Wait for a request of this id and return who sent it."""
        return wait_until(lambda: next((peer for peer, request in self.requests if request.id == request_id), None))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: a socket's path may have 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="wd-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def settings(folder: Path, **values: Any) -> Config:
    paths = Paths(socket=folder / "s", state_dir=folder, cache_dir=folder, config_file=folder / "none")
    return load_config(values, {}, paths)


@contextmanager
def served(folder: Path, *, listener: Listener | None = None, **values: Any) -> Iterator[Served]:
    unlimited = values.pop("unlimited", lambda uid: False)
    it = Served(Loop(), settings(folder, **values))
    it.server = Server(it.loop, it.config, it.dispatch, it.closed.append, listener=listener, unlimited=unlimited)
    thread = threading.Thread(target=it.loop.run)
    thread.start()
    try:
        yield it
    finally:
        for client in it.clients:
            client.close()
        it.loop.call_soon_threadsafe(it.server.stop_accepting)
        it.loop.call_soon_threadsafe(lambda: it.server.close_all(5, it.loop.stop))
        thread.join(30)
        assert not thread.is_alive(), "the loop did not stop"
        it.loop.close()


@pytest.fixture
def serve(folder: Path) -> Iterator[Served]:
    with served(folder) as it:
        yield it


def ended(client: RawClient) -> bool:
    """True when the server has closed this connection and said no more."""
    try:
        client.receive(10)
    except (EOFError, ConnectionResetError):
        return True
    return False


# --- requests ---


def test_the_kernel_says_who_asks(serve: Served) -> None:
    answer = serve.client().call("hello")
    assert (answer["uid"], answer["gid"], answer["pid"]) == (os.getuid(), os.getgid(), os.getpid())


def test_a_uid_beyond_two_thousand_million_is_no_negative_one() -> None:
    class StandIn:
        def getsockopt(self, level: int, option: int, size: int) -> bytes:
            assert (level, option) == (socket.SOL_SOCKET, socket.SO_PEERCRED)
            return struct.pack("=iII", 7, 3_000_000_000, 4_000_000_000)[:size]

    assert peer_credentials(cast(socket.socket, StandIn())) == (7, 3_000_000_000, 4_000_000_000)


def test_descriptors_arrive_and_none_is_left_open(serve: Served) -> None:
    client = serve.client()
    client.call("hello")
    before = len(os.listdir("/proc/self/fd"))
    with open("/dev/null") as file:
        assert client.call("hello", descriptors=[file.fileno()])["descriptors"] == 1
        assert client.call("hello", descriptors=[file.fileno()] * 200)["descriptors"] > 1
        other = serve.client()
        other.send_bytes(b"\0\0\0\5half", [file.fileno()] * 3)
        other.close()
        wait_until(lambda: serve.server.count == 1)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_pipelined_requests_are_all_answered_in_order(serve: Served) -> None:
    client = serve.client()
    count = 3000
    client.send_bytes(b"".join(encode_frame({"id": number, "op": "hello"}) for number in range(count)))
    assert [client.receive()["id"] for _ in range(count)] == list(range(count))


def test_a_waiting_request_holds_up_no_later_one(serve: Served) -> None:
    client = serve.client()
    waiting = client.send("result", job=1, wait_s=None)
    assert client.call("health")["op"] == "health"
    peer = serve.peer(waiting)
    serve.do(lambda: peer.reply(waiting, {"late": True}))
    assert client.reply(waiting)["result"] == {"late": True}


def test_open_requests_are_limited_and_the_connection_goes_on(folder: Path) -> None:
    with served(folder, open_requests=4) as serve:
        client = serve.client()
        numbers = [client.send("result", job=1, wait_s=None) for _ in range(6)]
        peer = serve.peer(numbers[3])
        assert serve.client().call("health")["op"] == "health"
        assert len(serve.requests) == 5, "four of the one, one of the other"
        for number in numbers:
            serve.peer(number)
            serve.do(lambda number=number: peer.reply(number, {}))
            assert client.reply(number)["ok"]


def test_a_client_that_leaves_with_all_its_requests_open_is_noticed(folder: Path) -> None:
    with served(folder, open_requests=2) as serve:
        client = serve.client()
        for _ in range(5):
            last = client.send("result", job=1, wait_s=None)
        serve.peer(last - 3)
        client.close()
        wait_until(lambda: serve.closed)
        assert serve.server.count == 0


def test_after_its_end_of_file_a_client_still_gets_what_was_queued(serve: Served) -> None:
    client = serve.client()
    waiting = client.send("result", job=1, wait_s=None)
    number = client.send("hello")
    client.socket.shutdown(socket.SHUT_WR)
    assert client.reply(number)["ok"]
    assert ended(client)
    (peer,) = wait_until(lambda: serve.closed)
    assert peer.closed
    serve.do(lambda: peer.reply(waiting, {}))
    serve.do(lambda: peer.push(waiting, {"event": "end"}))


# --- what is wrong hurts its own connection only ---


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\xff" * 10_000_000, "too_large"),
        (struct.pack(">I", 3) + b"\xc1\xc1\xc1", "bad_frame"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "too_large"),
    ],
)
def test_bytes_that_are_no_frame_are_answered_and_their_connection_closed(
    serve: Served, data: bytes, code: str
) -> None:
    other = serve.client()
    other.call("hello")
    client = serve.client()
    client.send_bytes(data)  # whole: the reason can be read even by who sends much before it reads
    answer = client.receive()
    assert (answer["id"], answer["error"]["code"]) == (0, code)
    assert ended(client)
    assert other.call("hello")["op"] == "hello"
    wait_until(lambda: serve.closed)


def test_a_frame_that_does_not_get_finished_is_given_up(folder: Path) -> None:
    with served(folder, frame_timeout_s=0.2) as serve:
        idle = serve.client()
        client = serve.client()
        client.send_bytes(encode_frame({"id": 1, "op": "hello"})[:-1])
        answer = client.receive()
        assert (answer["id"], answer["error"]["code"]) == (0, "bad_frame")
        assert ended(client)
        assert idle.call("hello"), "silence between frames is no offence"


def test_a_frame_that_we_do_not_read_is_not_late(folder: Path) -> None:
    with served(folder, frame_timeout_s=0.2, open_requests=1) as serve:
        client = serve.client()
        first = client.send("result", job=1, wait_s=None)
        frame = encode_frame({"id": 50, "op": "hello"})
        peer = serve.peer(first)
        client.send_bytes(frame[:-1])
        passed = threading.Event()
        serve.do(lambda: serve.loop.call_later(0.5, passed.set))
        assert passed.wait(30)
        assert not peer.closed
        serve.do(lambda: peer.reply(first, {}))
        client.send_bytes(frame[-1:])
        assert client.reply(50)["ok"]


def test_a_client_that_reads_nothing_is_closed(folder: Path) -> None:
    with served(folder, send_timeout_s=0.3) as serve:
        client = serve.client()
        number = client.send("result", job=1, wait_s=None)
        peer = serve.peer(number)
        serve.do(lambda: peer.reply(number, {"x": b"x" * 5_000_000}))
        wait_until(lambda: serve.closed == [peer])
        wait_until(lambda: serve.server.count == 0)


def test_a_slow_reader_is_not_closed_while_it_reads(folder: Path) -> None:
    with served(folder, send_timeout_s=1) as serve:
        client = serve.client()
        number = client.send("result", job=1, wait_s=None)
        peer = serve.peer(number)
        size = 3_000_000
        serve.do(lambda: peer.reply(number, {"x": b"x" * size}))
        received = 0
        while received < size:
            pause = threading.Event()
            serve.loop.call_soon_threadsafe(lambda pause=pause: serve.loop.call_later(0.1, pause.set))
            assert pause.wait(30)
            data = client.socket.recv(200_000)
            assert data, "closed although it reads"
            received += len(data)
        assert not peer.closed


def test_events_that_pile_up_end_the_subscriber_and_nobody_else(folder: Path) -> None:
    with served(folder, max_output_bytes=100_000) as serve:
        slow, quick = serve.client(), serve.client()
        peers = []
        for client in (slow, quick):
            client.call("subscribe")
            peers.append(serve.requests[-1][0])
        for seq in range(2000):
            event = {"event": "segment", "seq": seq, "segment": Raw(encode_body({"text": "x" * 1000}))}
            serve.do(lambda event=event: [peer.push(1, event) for peer in peers])
            assert quick.receive()["seq"] == seq
            if serve.closed:
                break
        assert serve.closed == peers[:1]
        assert quick.call("hello")


def test_a_large_reply_to_one_lets_the_others_have_their_turn(serve: Served) -> None:
    slow, quick = serve.client(), serve.client()
    number = slow.send("result", job=1, wait_s=None)
    peer = serve.peer(number)
    transcript = Raw(encode_body({"text": "x" * 60_000_000}))
    serve.do(lambda: peer.reply(number, {"job": {"id": 1}, "transcript": transcript}))
    pending = []
    reader = threading.Thread(target=lambda: slow.reply(number, 60))
    reader.start()
    while reader.is_alive():
        quick.call("health")
        pending.append(peer.pending_output)
    assert sum(0 < left < len(transcript) for left in pending) > 3, "answers came between the slices"


def test_a_long_list_is_sent_piece_by_piece(serve: Served) -> None:
    client = serve.client()
    client.call("subscribe")
    peer = serve.requests[-1][0]
    left = 50

    def more(done: Callable[[], None]) -> None:
        nonlocal left
        left -= 1
        peer.push(1, {"event": "segment", "left": left, "segment": "x" * 200_000})
        if left:
            peer.in_turn(more)
        done()

    serve.do(lambda: peer.in_turn(more))
    assert [client.receive()["left"] for _ in range(50)] == list(range(49, -1, -1))


def test_few_requests_of_a_connection_wait_for_their_turn(serve: Served) -> None:
    """The others wait as bytes: each that waits is kept with all that its answer needs."""
    client, other = serve.client(), serve.client()
    peer = serve.peer(client.send("result", job=1, wait_s=None))
    begun: list[Callable[[], None]] = []
    serve.do(lambda: [peer.in_turn(begun.append) for _ in range(20)])
    number = client.send("hello")
    other.call("hello")
    assert [request.op for who, request in serve.requests if who is peer] == ["result"]
    for place in range(20):
        wait_until(lambda place=place: len(begun) > place)  # type: ignore[misc]
        serve.do(begun[place])
    assert client.reply(number)["ok"]


def test_an_error_in_a_handler_is_that_requests_answer(serve: Served) -> None:
    client = serve.client()
    for _ in range(2):
        with pytest.raises(WhisperdError) as caught:
            client.call("stats")
        assert caught.value.code == "internal"


# --- numbers ---


def test_500_idle_connections_are_nothing_to_it(serve: Served) -> None:
    clients = [serve.client() for _ in range(500)]
    wait_until(lambda: serve.server.count == 500)
    turns = serve.loop.turns
    assert clients[250].call("health")["op"] == "health"
    assert serve.loop.turns - turns < 20, "idle ones cost no turns"
    for client in clients[:499]:
        client.close()
    wait_until(lambda: serve.server.count == 1)
    wait_until(lambda: len(serve.closed) == 499)
    assert clients[499].call("health")["op"] == "health"


@pytest.mark.parametrize(
    ("limits", "code"),
    [({"max_connections": 2}, "unavailable"), ({"connections_per_user": 2}, "quota_exceeded")],
)
def test_too_many_connections_are_told_why(folder: Path, limits: dict[str, int], code: str) -> None:
    with served(folder, **limits) as serve:
        first, second = serve.client(), serve.client()
        assert first.call("hello")
        assert second.call("hello")
        third = serve.client()
        number = third.send("hello")  # it may ask before it reads, as every client does
        answer = third.receive()
        assert (answer["id"], answer["error"]["code"]) == (0, code)
        assert ended(third)
        assert number not in [request.id for peer, request in serve.requests if peer.id == 3]
        first.close()
        wait_until(lambda: serve.server.count == 1)
        assert serve.client().call("hello")
        assert len(serve.closed) == 1, "who was refused was never there"


def test_who_is_unlimited_is_not_counted_per_user(folder: Path) -> None:
    with served(folder, connections_per_user=1, unlimited=lambda uid: True) as serve:
        assert [serve.client().call("hello")["op"] for _ in range(5)] == ["hello"] * 5


@requires_root
def test_a_crowd_of_one_user_lets_others_have_their_turn(folder: Path) -> None:
    with served(folder, turn_requests_per_user=40) as serve:
        folder.chmod(0o755)
        (folder / "s").chmod(0o666)
        crowd = [serve.client() for _ in range(50)]
        os.seteuid(20_001)
        try:
            other = serve.client()
        finally:
            os.seteuid(0)
        for client in (*crowd, other):
            client.call("hello")
        before = len(serve.requests)

        def while_the_loop_stands_still() -> None:
            for client in crowd:
                for _ in range(40):
                    client.send("hello")
            other.send("hello")

        serve.do(while_the_loop_stands_still)
        wait_until(lambda: len(serve.requests) == before + 2001)
        order = [peer for peer, _ in serve.requests[before:]]
        assert [peer.uid for peer in order].index(20_001) <= 40 + 16
        # Within a user they take turns as well, two rounds at the most; one by one, the last begins at 1,960.
        firsts = [order.index(peer) for peer in {peer.id: peer for peer in order}.values() if peer.uid == 0]
        assert max(firsts) <= 2 * 50 * 16


def test_a_connection_has_so_many_requests_a_turn(folder: Path) -> None:
    with served(folder, turn_requests=5) as serve:
        clients = [serve.client(), serve.client()]
        for client in clients:
            client.call("hello")

        def while_the_loop_stands_still() -> None:
            for client in clients:
                for _ in range(10):
                    client.send("hello")

        serve.do(while_the_loop_stands_still)
        wait_until(lambda: len(serve.requests) == 2 + 20)
        order = [peer.id for peer, _ in serve.requests[2:]]
        assert [len(list(turn)) for _, turn in groupby(order)] == [5, 5, 5, 5]


def test_so_many_connections_may_wait_to_be_accepted(folder: Path) -> None:
    with served(folder, listen_backlog=5) as serve, ExitStack() as stack:

        def connect_while_nobody_accepts() -> int:
            for count in range(100):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                if sock.connect_ex(str(folder / "s")):
                    return count
            return 100

        assert serve.do(connect_while_nobody_accepts) == 5 + 1, "Linux has always let one more wait"


@requires_root
def test_a_few_users_cannot_take_all_connections(folder: Path) -> None:
    with served(folder, max_connections=16, admin_connections=5, unlimited=lambda uid: uid == 0) as serve:
        folder.chmod(0o755)
        (folder / "s").chmod(0o666)

        def connect(uid: int) -> str | None:
            os.seteuid(uid)
            try:
                client = serve.client()
            finally:
                os.seteuid(0)
            client.send("hello")
            reply = client.receive()
            return None if reply["ok"] else reply["error"]["code"]

        taken = Counter[int]()
        for uid in (20_001, 20_002, 20_003):
            while (code := connect(uid)) is None:
                taken[uid] += 1
            assert code == "quota_exceeded"
        assert list(taken.values()) == [9, 4, 2], "half of what was left, each"
        assert connect(20_004) is None
        assert connect(20_005) == "unavailable"
        assert [connect(0) for _ in range(6)] == [None] * 5 + ["unavailable"]


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """No number is free for a new descriptor in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_descriptors_it_waits_instead_of_spinning(serve: Served, caplog: pytest.LogCaptureFixture) -> None:
    old = serve.client()
    old.call("hello")
    waiting = [socket.socket(socket.AF_UNIX) for _ in range(5)]
    with caplog.at_level(logging.ERROR), no_descriptors_left():
        for sock in waiting:
            sock.connect(str(serve.config.socket))
        wait_until(lambda: "cannot accept" in caplog.text)
        turns = serve.loop.turns
        assert old.call("hello")
        assert serve.loop.turns - turns < 20
    for sock in waiting:
        client = RawClient(sock)
        serve.clients.append(client)
        assert client.call("hello")


def test_descriptors_that_did_not_arrive_whole_end_their_connection(serve: Served) -> None:
    client, other = serve.client(), serve.client()
    client.call("hello")
    other.call("hello")
    count = len(serve.requests)
    with open("/dev/null") as file, no_descriptors_left():
        client.send("hello", descriptors=[file.fileno()] * 3)
        assert ended(client)
    assert len(serve.requests) == count
    assert other.call("hello")


def test_it_ends_with_what_is_queued_sent(folder: Path) -> None:
    with served(folder) as serve:
        client = serve.client()
        number = client.send("result", job=1, wait_s=None)
        peer = serve.peer(number)
        done = threading.Event()
        serve.do(lambda: peer.reply(number, {"x": b"x" * 2_000_000}))
        serve.do(lambda: serve.server.close_all(30, done.set))
        assert len(client.reply(number)["result"]["x"]) == 2_000_000
        assert done.wait(30)
        assert ended(client)
        wait_until(lambda: serve.closed == [peer])


def test_it_ends_in_time_even_if_a_client_does_not_read(folder: Path) -> None:
    with served(folder) as serve:
        client = serve.client()
        number = client.send("result", job=1, wait_s=None)
        peer = serve.peer(number)
        done = threading.Event()
        serve.do(lambda: peer.reply(number, {"x": b"x" * 5_000_000}))
        serve.do(lambda: serve.server.close_all(0.2, done.set))
        assert done.wait(30)
        assert serve.server.count == 0


# --- the listening socket ---


def test_the_socket_has_its_mode_and_its_folder_lets_people_through(folder: Path) -> None:
    old = os.umask(0o077)
    try:
        with served(folder, socket=folder / "new" / "s", socket_mode="0622") as serve:
            assert stat.S_IMODE(serve.config.socket.stat().st_mode) == 0o622
            assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o755
            assert os.umask(0o077) == 0o077, "the umask is as it was"
    finally:
        os.umask(old)
    assert not (folder / "new" / "s").exists()


@requires_root
def test_the_socket_has_its_group(folder: Path) -> None:
    group = grp.getgrall()[-1]
    with served(folder, socket_group=group.gr_name) as serve:
        assert serve.config.socket.stat().st_gid == group.gr_gid


def test_a_dead_daemons_socket_is_replaced_and_a_living_ones_is_not(folder: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(folder / "s"))
    dead.close()
    with served(folder) as serve:
        inode = serve.config.socket.stat().st_ino
        with pytest.raises(SocketTakenError):
            open_listener(settings(folder))
        assert serve.config.socket.stat().st_ino == inode
        assert serve.client().call("hello")


def test_a_living_socket_with_a_full_backlog_is_not_replaced(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(folder / "s"))
        busy.listen(0)
        waiting.connect(str(folder / "s"))
        with pytest.raises(SocketTakenError):
            open_listener(settings(folder))
    (folder / "s").unlink()


def test_what_is_no_socket_is_never_removed(folder: Path) -> None:
    (folder / "s").write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        open_listener(settings(folder))
    assert (folder / "s").read_text() == "precious"


def test_a_path_that_is_too_long_is_a_clear_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--socket"):
        open_listener(settings(folder, socket=folder / ("x" * 120)))


def test_another_daemons_socket_is_not_removed_at_the_end(folder: Path) -> None:
    first = open_listener(settings(folder))
    (folder / "s").unlink()
    second = open_listener(settings(folder))
    first.close()
    assert (folder / "s").exists()
    second.close()
    assert not (folder / "s").exists()


_INHERIT = """
import os, socket, sys
from pathlib import Path
path = Path(sys.argv[1])
sock = socket.socket(socket.AF_UNIX)
sock.bind(str(path)); sock.listen()
os.dup2(sock.fileno(), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
from tests.test_server import settings
from whisperd.daemon.wire.listener import open_listener
listener = open_listener(settings(path.parent))
assert listener.socket.fileno() == 3 and "LISTEN_FDS" not in os.environ and not os.get_inheritable(3)
client = socket.socket(socket.AF_UNIX)
client.connect(str(path))
listener.refuse_waiting({"id": 0, "ok": False, "error": {"code": "unavailable", "message": "no"}})
assert b"unavailable" in client.recv(1000) and client.recv(1) == b""
listener.close()
assert path.exists()
"""


def test_an_inherited_socket_is_used_and_left_alone(folder: Path) -> None:
    command = [sys.executable, "-c", _INHERIT, str(folder / "s")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], timeout=60)
    (folder / "s").unlink()
