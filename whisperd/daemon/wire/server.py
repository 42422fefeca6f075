"""The server: accepts clients, asks the kernel who they are, and counts them.

What one connection does is `link`'s, what its bytes mean `connection`'s, what the requests do the dispatcher's.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Callable
from weakref import WeakValueDictionary

from whisperd.daemon.config import Config
from whisperd.daemon.loop import READ, Loop, Timer
from whisperd.daemon.wire.link import Fail, Link, Peer, Reply
from whisperd.daemon.wire.listener import Listener, open_listener
from whisperd.daemon.wire.user_budget import UserBudget
from whisperd.protocol.channel import peer_credentials
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.messages import Request

__all__ = ["Fail", "Peer", "Reply", "Server"]

log = logging.getLogger("whisperd.server")

_ACCEPTS_A_TURN = 64
_REARM_S = 1.0


class Server:
    """The clients of one listening socket.

    `dispatch(peer, request, descriptors)` gets each good request: descriptors that it takes out of the list are its
    own, the rest is closed when it returns; a `WhisperdError` that it raises is the answer. `closed(peer)` is called
    once for each peer that could send requests. `unlimited(uid)` says whose connections are not counted per user.

    Raises what `open_listener` raises, unless an open `listener` is handed over.
    """

    def __init__(
        self,
        loop: Loop,
        config: Config,
        dispatch: Callable[[Peer, Request, list[int]], None],
        closed: Callable[[Peer], None],
        *,
        listener: Listener | None = None,
        unlimited: Callable[[int], bool] = lambda uid: False,
    ) -> None:
        self.loop = loop
        self.config = config
        self._dispatch = dispatch
        self._peer_closed = closed
        self._unlimited = unlimited
        self._listener: Listener | None = listener or open_listener(config)
        self._rearm: Timer | None = None
        self._links: set[Link] = set()
        self._refused: set[Link] = set()
        self._per_user: Counter[int] = Counter()
        # Weak: what he has asked for keeps his budget, also where he has closed all his connections and comes anew.
        self._budgets: WeakValueDictionary[int, UserBudget] = WeakValueDictionary()
        self._last_id = 0
        self._all_closed: Callable[[], object] | None = None
        self._listen()

    @property
    def count(self) -> int:
        """Connections now."""
        return len(self._links)

    def stop_accepting(self) -> None:
        """Let go of the listening socket: an inherited one stays systemd's, our own path is removed."""
        if self._rearm is not None:
            self._rearm.cancel()
        if self._listener is not None:
            self.loop.unregister(self._listener.socket)
            self._listener.close()
            self._listener = None

    def close_all(self, grace_s: float, done: Callable[[], object] | None = None) -> None:
        """Take no more requests, send what is queued within `grace_s`, close; then call `done`."""
        self._all_closed = done
        for link in [*self._links, *self._refused]:
            link.end()
        self.loop.call_later(grace_s, self._close_rest)
        self._maybe_all_closed()

    def _close_rest(self) -> None:
        for link in [*self._links, *self._refused]:
            link.abort("stopping")

    def _maybe_all_closed(self) -> None:
        if self._all_closed is not None and not self._links and not self._refused:
            done, self._all_closed = self._all_closed, None
            self.loop.call_soon(done)

    # --- accepting ---

    def _listen(self) -> None:
        self._rearm = None
        if self._listener is not None:
            self.loop.register(self._listener.socket, READ, self._accept)

    def _accept(self, events: int) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            if self._listener is None:
                return
            try:
                sock, _ = self._listener.socket.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as error:
                # Mostly EMFILE. Still readable, so waiting for it would spin: look again later.
                log.error("cannot accept error=%s connections=%d retry_s=%g", error.strerror, self.count, _REARM_S)
                self.loop.unregister(self._listener.socket)
                self._rearm = self.loop.call_later(_REARM_S, self._listen)
                return
            self._add(sock)

    def _add(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        try:
            credentials = peer_credentials(sock)
        except OSError as error:
            log.warning("a client without credentials is refused error=%s", error)
            sock.close()
            return
        uid = credentials[1]
        self._last_id += 1
        refusal = self._refusal(uid)
        if refusal is not None and len(self._refused) >= self.config.refused_connections:
            sock.close()
            return
        budget = self._budgets.get(uid) or self._new_budget()
        self._budgets[uid] = budget
        link = Link(
            self.loop,
            self.config,
            sock,
            self._last_id,
            credentials,
            budget=budget,
            dispatch=self._dispatch,
            gone=self._gone,
            closed=self._forget,
        )
        if refusal is None:
            self._links.add(link)
            self._per_user[uid] += 1
        else:
            log.warning("connection refused uid=%d code=%s connections=%d", uid, refusal.code, self.count)
            self._refused.add(link)
            link.refuse(refusal)

    def _new_budget(self) -> UserBudget:
        return UserBudget(
            output_bytes=self.config.output_bytes_per_user,
            store_calls=self.config.store_calls_per_user,
            requests=self.config.turn_requests_per_user,
            reads=self.config.turn_reads_per_user,
            soon=self.loop.call_soon,
            turn=lambda: self.loop.turns,
        )

    def _refusal(self, uid: int) -> WhisperdError | None:
        unlimited, left = self._unlimited(uid), self.config.max_connections - len(self._links)
        # An administrator must be able to look at a daemon that others have filled.
        if left <= (-self.config.admin_connections if unlimited else 0):
            return WhisperdError(
                ErrorCode.UNAVAILABLE,
                f"whisperd has {self.config.max_connections} connections already (max_connections): try again later",
            )
        if unlimited:
            return None
        if self._per_user[uid] > left:
            return WhisperdError(
                ErrorCode.QUOTA_EXCEEDED,
                f"your programs hold {self._per_user[uid]} connections, more than are left for others "
                "(max_connections): close some",
            )
        if self._per_user[uid] >= self.config.connections_per_user:
            return WhisperdError(
                ErrorCode.QUOTA_EXCEEDED,
                f"your programs hold {self.config.connections_per_user} connections already (connections_per_user): "
                "close some",
            )
        return None

    def _gone(self, link: Link) -> None:
        if link in self._links:
            # In a turn of its own: a handler that pushes to a list of peers must not see the list change.
            self.loop.call_soon(lambda: self._peer_closed(link.peer))

    def _forget(self, link: Link) -> None:
        self._refused.discard(link)
        if link in self._links:
            self._links.remove(link)
            self._per_user[link.peer.uid] -= 1
            if not self._per_user[link.peer.uid]:
                del self._per_user[link.peer.uid]
        self._maybe_all_closed()
