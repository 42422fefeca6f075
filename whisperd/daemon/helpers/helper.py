"""The daemon's side of one helper: start it, feed it, hear whether it lives, see it end.

One `Helper` is one process, from its start to its end. What to do about an end is for the lanes; where the process
runs, and whose it is, knows its body (body.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import whisperd
from whisperd.daemon.helpers.body import Body, ChildProcess, UnitInstance
from whisperd.daemon.loop import READ, WRITE, Loop, Timer
from whisperd.daemon.wire.descriptors import close_apart
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.frames import MAX_REPLY_BYTES, FrameReader, encode_frame, parse_body
from whisperd.protocol.helper_messages import Configure, HelperHello, HelperMessage, from_wire, to_wire

log = logging.getLogger("whisperd.helper")

_BYTES_A_TURN = 256 * 1024
# What a process that has ended may have left in its socket; the kernel's buffer is smaller.
_MAX_LAST_BYTES = 4 * 1024 * 1024
_END_GRACE_S = 5.0
# A process that is killed may take seconds to give tens of gigabytes back.
_REAP_S = 15.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitReason:
    """How a helper ended. `ready`: it had said hello, so it was not the start that failed.

    `returncode` is None after a signal, and when it could not be started at all; `reason` is for logs and people.
    """

    returncode: int | None
    signal: int | None
    reason: str
    ready: bool


@dataclass(slots=True)
class _Outgoing:
    data: memoryview
    descriptors: list[int]  # they travel with the first byte, then they are closed here


class Helper:
    """A running helper: a child process running `module`, or an instance behind systemd's socket at `address`.

    `on_message(helper, message)` gets every message but `HelperHello`; none comes after `kill` or `close`.
    `on_exit(helper, reason)` is called exactly once, when the process has ended and is reaped, or could not be started;
    never from inside a call of this class. `on_stuck(helper)` is called when it was killed and has not ended `_REAP_S`
    later, as the kernel waits for a driver or a disk: `on_exit` may still come, or not before the machine is restarted.
    `body` is where it runs, for tests. Raises `OSError` when no descriptor is left for its socket.
    """

    def __init__(
        self,
        loop: Loop,
        *,
        role: str,
        module: str,
        settings: Mapping[str, Any],
        nice: int,
        log_level: str,
        env: Mapping[str, str],
        on_message: Callable[[Helper, HelperMessage], None],
        on_exit: Callable[[Helper, ExitReason], None],
        heartbeat_timeout_s: float,
        address: Path | None = None,
        on_stuck: Callable[[Helper], None] = lambda helper: None,
        body: Body | None = None,
    ) -> None:
        self.role = role
        self.ready = False
        self._loop = loop
        self._settings = dict(settings)
        self._on_message = on_message
        self._on_exit = on_exit
        self._on_stuck = on_stuck
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._reader = FrameReader(max_bytes=MAX_REPLY_BYTES)
        self._outbox: deque[_Outgoing] = deque()
        self._reason: str | None = None  # why we ended it; None while it shall live
        self._ending = False
        self._timer: Timer | None = None
        self._heard_at = loop.time()
        if body is None and address is not None:
            body = UnitInstance(address)
        self._body: Body = body or ChildProcess(module, nice=nice, log_level=log_level, env=env)
        self._socket = self._body.socket
        self._start()

    def _start(self) -> None:
        try:
            self._socket.setblocking(False)
            self._body.start()
        except OSError as error:
            self._reason = f"could not be started: {error}"
            log.error("helper not started role=%s error=%s", self.role, error)
            self._end_soon()
            return
        if self.pid:
            log.info("helper started role=%s pid=%d", self.role, self.pid)
        if self._body.end_fd >= 0:
            self._loop.register(self._body.end_fd, READ, lambda events: self._ended())
        self._loop.register(self._socket, READ, self._on_ready)
        self._timer = self._loop.call_later(self._heartbeat_timeout_s, self._check_heartbeat)

    # --- what others may ask ---

    @property
    def alive(self) -> bool:
        """True until it has ended or been told to."""
        return self._reason is None

    @property
    def pid(self) -> int:
        """Its process, 0 while that is not known."""
        return self._body.pid

    def rss_bytes(self) -> int:
        """Return the process's resident memory, 0 when it is gone."""
        return process_rss_bytes(self.pid)

    def send(self, message: HelperMessage, descriptors: Sequence[int] = ()) -> None:
        """Queue a message; before the hello it waits. The descriptors are duplicated: the caller keeps its own.

        A helper that is ending takes nothing. Raises `OSError` when a descriptor cannot be duplicated.
        """
        if self.alive:
            copies = _duplicated(descriptors)
            self._outbox.append(_Outgoing(memoryview(encode_frame(to_wire(message))), copies))
            self._flush()

    def kill(self, reason: str) -> None:
        """End it at once. `on_exit` tells the reason, the first if there are several."""
        if not self._ending:
            if self._reason is None:
                self._reason = reason
                log.warning("helper killed role=%s pid=%d reason=%r", self.role, self.pid, reason)
            self._body.kill()
            self._hang_up()
            if not self._ending:
                self._set_timer(_REAP_S, self._still_there)

    def _still_there(self) -> None:
        self._timer = None
        log.error("helper does not end role=%s pid=%d reason=%r", self.role, self.pid, self._reason)
        self._on_stuck(self)

    def close(self, grace_s: float = _END_GRACE_S) -> None:
        """Let it end: it sees the end of file. One that still runs after `grace_s` is killed."""
        if self.alive:
            self._reason = "closed"
            self._hang_up()
            if not self._ending:
                self._timer = self._loop.call_later(grace_s, lambda: self.kill("closed"))

    # --- bytes ---

    def _on_ready(self, events: int) -> None:
        if events & READ:
            self._receive()
        if events & WRITE and self.alive:
            self._flush()

    def _receive(self) -> int:
        """Read once and hand on what is complete; return how many bytes came. Ends the helper on what is no message."""
        try:
            data = self._socket.recv(_BYTES_A_TURN)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            data = b""
        if not data:
            self._loop.unregister(self._socket)
            if self._body.end_fd < 0:
                self._end_soon()
                return 0
            # It is about to end, mostly: the pidfd will tell. If it only closed its socket, it is of no use.
            self._set_timer(_END_GRACE_S, lambda: self.kill("closed its socket"))
            return 0
        self._heard_at = self._loop.time()
        self._reader.feed(data)
        try:
            while self.alive and (frame := self._reader.pop()) is not None:
                self._take(from_wire(parse_body(frame[0], trusted=True)))
        except WhisperdError as error:
            self.kill(f"sent what is no message: {error}")
        return len(data)

    def _take(self, message: HelperMessage) -> None:
        if self.ready and not isinstance(message, HelperHello):
            try:
                self._on_message(self, message)
            except Exception:
                log.exception("message failed role=%s type=%s", self.role, type(message).__name__)
        elif self.ready or not isinstance(message, HelperHello):
            self.kill(f"sent {type(message).__name__} out of turn")
        elif message.version != whisperd.__version__ or message.role != self.role:
            self.kill(
                f"is {message.role} of whisperd {message.version}, where {self.role} of {whisperd.__version__} was "
                "started: the files on disk were replaced; restart whisperd"
            )
        else:
            self.ready = True
            if not self.pid:
                self._body.pid = message.pid
                log.info("helper started role=%s pid=%d by=systemd", self.role, self.pid)
            configure = Configure(settings=self._settings)
            self._outbox.appendleft(_Outgoing(memoryview(encode_frame(to_wire(configure))), []))
            self._flush()

    def _flush(self) -> None:
        left = _BYTES_A_TURN
        while self.ready and self._outbox and left > 0:
            first = self._outbox[0]
            try:
                if first.descriptors:
                    sent = socket.send_fds(self._socket, [first.data[:left]], first.descriptors)
                    close_apart(first.descriptors)
                    first.descriptors = []
                else:
                    sent = self._socket.send(first.data[:left])
            except (BlockingIOError, InterruptedError):
                break
            except OSError:  # it is gone: the pidfd tells
                self._drop_outbox()
                break
            left -= sent
            first.data = first.data[sent:]
            if not first.data:
                self._outbox.popleft()
        with contextlib.suppress(KeyError):  # its end has been read already
            self._loop.modify(self._socket, READ | (WRITE if self.ready and self._outbox else 0))

    # --- life and death ---

    def _check_heartbeat(self) -> None:
        self._timer = None
        if self._loop.time() >= self._heard_at + self._heartbeat_timeout_s:
            # If it was we who stood still (a stopped process), what it said meanwhile waits to be read.
            self._receive()
        due = self._heard_at + self._heartbeat_timeout_s
        if not self.alive or self._timer is not None:
            return
        if self._loop.time() >= due:
            self.kill("silent")
        else:
            self._set_timer(due - self._loop.time(), self._check_heartbeat)

    def _set_timer(self, delay_s: float, fn: Callable[[], object]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, fn)

    def _hang_up(self) -> None:
        """Close our end of the socket: nothing more is said or heard. A body that only that ends has ended by it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._drop_outbox()
        self._loop.unregister(self._socket)
        self._socket.close()
        if self._body.end_fd < 0:
            self._end_soon()

    def _drop_outbox(self) -> None:
        for outgoing in self._outbox:
            close_apart(outgoing.descriptors)
        self._outbox.clear()

    def _end_soon(self) -> None:
        if not self._ending:
            self._ending = True
            self._loop.call_soon(self._ended)

    def _ended(self) -> None:
        """It has ended, or never began: hear its last words, reap it, tell."""
        self._ending = True
        if self._body.end_fd >= 0:
            self._loop.unregister(self._body.end_fd)
            read = 0
            while self.alive and read < _MAX_LAST_BYTES and (count := self._receive()):
                read += count
        ready = self.ready
        code = self._body.reap()
        number = -code if code is not None and code < 0 else None
        reason = self._reason or _how_it_ended(code, number)
        self._reason = reason
        self._hang_up()
        log.info("helper ended role=%s pid=%d reason=%r", self.role, self.pid, reason)
        returncode = None if number else code
        self._on_exit(self, ExitReason(returncode=returncode, signal=number, reason=reason, ready=ready))


def _how_it_ended(code: int | None, number: int | None) -> str:
    if code is None:
        return "its unit ended; the unit's own log says more"
    return f"killed by {_signal_name(number)}" if number else f"ended with exit code {code}"


def process_rss_bytes(pid: int) -> int:
    """Return a process's resident memory, 0 when there is no such process (proc(5), statm)."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def _duplicated(descriptors: Sequence[int]) -> list[int]:
    copies: list[int] = []
    try:
        for fd in descriptors:
            copies.append(os.dup(fd))
    except OSError:
        close_apart(copies)
        raise
    return copies


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
