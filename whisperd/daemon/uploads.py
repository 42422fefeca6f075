"""Uploads under way: the chunks of a connection are counted, held back while nobody takes them, and answered.

Flow control goes both ways. A chunk is answered once a receiver has written it, so a client that waits for its answers
sends no faster than the disk takes. One that does not wait is not read on: with `MAX_UNANSWERED` chunks on their way,
and with one already while its turn has not come, so that many waiting uploads hold little memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from whisperd.daemon.loop import Loop, Timer
from whisperd.daemon.wire.server import Fail, Peer, Reply
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.fields import bad_request
from whisperd.protocol.messages import MAX_UNANSWERED_CHUNKS, Chunk

# No setting: the protocol promises 16 at most, and in line more than one would serve nobody.
_MAX_UNANSWERED_IN_LINE = 1


class Upload:
    """The bytes of one upload, from its submit to its end. Its clock stands until `begin`.

    `check(chunk, received_bytes)` raises what ends the upload as a whole (too many bytes, say), `send(data, last)`
    hands bytes to the receiver, `failed(error)` is called when the upload is to be given up. While `crowded()`, at
    least `bytes_per_s` must come, on average of `timeout_s`: else a few who send a byte now and then would keep all
    receivers.
    """

    def __init__(
        self,
        loop: Loop,
        peer: Peer,
        request_id: int,
        *,
        timeout_s: float,
        bytes_per_s: float,
        crowded: Callable[[], bool],
        check: Callable[[Chunk, int], None],
        send: Callable[[bytes, bool], None],
        failed: Callable[[WhisperdError], None],
    ) -> None:
        self.request_id = request_id
        self.received_bytes = 0
        self.complete = False
        self.error: WhisperdError | None = None  # why it was given up
        self._loop, self._peer, self._timeout_s = loop, peer, timeout_s
        self._bytes_per_s, self._crowded = bytes_per_s, crowded
        self._check, self._send, self._failed = check, send, failed
        self._started = False
        self._held: deque[Chunk] = deque()
        self._unanswered: deque[tuple[Reply, Fail]] = deque()
        self._silence: Timer | None = None
        self._pace: Timer | None = None
        self._received_before = 0  # when its pace was last looked at
        self._look_is_due = False

    def begin(self) -> None:
        """It is its connection's upload from now on: keep the clock over its silence."""
        self._settle()

    def take(self, chunk: Chunk, reply: Reply, fail: Fail) -> None:
        """Take the next chunk. Raises `bad_request` for one that is wrong by itself; what ends it all is told there."""
        if self.error is not None:
            raise self.error
        if self.complete:
            raise bad_request("chunk: the last one has come already: wait for the answer of the submit")
        if not chunk.data and not chunk.last:
            raise bad_request("chunk: data must not be empty, except in the last one")
        received_bytes = self.received_bytes + len(chunk.data)
        self._unanswered.append((reply, fail))
        try:
            self._check(chunk, received_bytes)
        except WhisperdError as error:
            self.give_up(error)
            return
        self.received_bytes, self.complete = received_bytes, chunk.last
        if self._started:
            self._send(chunk.data, chunk.last)
        else:
            self._held.append(chunk)
        self._settle()

    def start(self) -> None:
        """A receiver is there: hand it what was held back."""
        self._started = True
        while self._held:
            chunk = self._held.popleft()
            self._send(chunk.data, chunk.last)
        self._watch_pace()
        self._settle()

    def written(self, received_bytes: int) -> None:
        """A chunk, the oldest that waits for its answer, is in the file, which has so many bytes by now."""
        if self._unanswered:
            reply, _ = self._unanswered.popleft()
            reply({"received": received_bytes})
        self._settle()
        if self._look_is_due:
            self._look_at_pace()

    def give_up(self, error: WhisperdError) -> None:
        """End it: answer what waits, hear nothing more. Once is enough."""
        if self.error is None:
            self.error = error
            self.end(error)
            self._failed(error)

    def end(self, error: WhisperdError | None = None) -> None:
        """It is over, or (`error`) has failed."""
        self.complete = True
        if self._pace is not None:
            self._pace.cancel()
        self._held.clear()
        unanswered, self._unanswered = self._unanswered, deque()
        for _, fail in unanswered:
            fail(error or WhisperdError(ErrorCode.INTERNAL, "the upload has ended"))
        self._settle()

    def _settle(self) -> None:
        """Bring the reading of the client and the clock over its silence in line with whose turn it is."""
        limit = MAX_UNANSWERED_CHUNKS if self._started else _MAX_UNANSWERED_IN_LINE
        self._peer.hold(not self.complete and len(self._unanswered) >= limit)
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
        if not self.complete and not self._unanswered:
            self._silence = self._loop.call_later(self._timeout_s, self._silent)

    def _watch_pace(self) -> None:
        """Look at what has come by then, after `timeout_s`."""
        self._received_before, self._look_is_due = self.received_bytes, False
        self._pace = self._loop.call_later(self._timeout_s, self._look_at_pace)

    def _look_at_pace(self) -> None:
        if self.complete:
            return
        # With chunks that have no answer yet, it is the disk that is slow: look when they are written.
        self._look_is_due = bool(self._unanswered)
        if self._look_is_due:
            return
        too_slow = self.received_bytes - self._received_before < self._bytes_per_s * self._timeout_s
        if too_slow and self._crowded():
            self.give_up(
                WhisperdError(
                    ErrorCode.TIMED_OUT,
                    f"less than {self._bytes_per_s:g} bytes a second came while others waited (setting "
                    "upload_bytes_per_s), so the upload was discarded: submit again when it can go faster",
                )
            )
        else:
            self._watch_pace()

    def _silent(self) -> None:
        message = f"no chunk came for {self._timeout_s:g} s (setting upload_timeout_s), so the upload was discarded"
        self.give_up(WhisperdError(ErrorCode.TIMED_OUT, f"{message}: submit again"))


class Uploads:
    """The uploads by their connections: each may have one."""

    def __init__(self) -> None:
        self._by_peer: dict[int, Upload] = {}

    def add(self, peer: Peer, upload: Upload) -> None:
        """Take an upload up, and begin it. Raises `bad_request` where its connection has one already."""
        if peer.id in self._by_peer:
            raise bad_request("source: this connection uploads already: open another one, or wait until that is done")
        self._by_peer[peer.id] = upload
        upload.begin()

    def take(self, peer: Peer, chunk: Chunk, reply: Reply, fail: Fail) -> None:
        """Give a chunk to its upload. Raises `bad_request`."""
        upload = self._by_peer.get(peer.id)
        if upload is None or upload.request_id != chunk.upload:
            raise bad_request(
                f"chunk: no upload {chunk.upload} is open on this connection: it is the id of a submit of kind "
                "'upload' that has not been answered"
            )
        upload.take(chunk, reply, fail)

    def remove(self, peer: Peer, upload: Upload, error: WhisperdError | None = None) -> None:
        """Forget an upload that has ended; `error` is the answer to chunks that have none. Another one stays."""
        if self._by_peer.get(peer.id) is upload:
            del self._by_peer[peer.id]
            upload.end(error)

    def client_left(self, peer: Peer) -> None:
        """A connection is gone, and what it uploaded with it, unless all of it has come."""
        upload = self._by_peer.get(peer.id)
        if upload is not None and not upload.complete:
            upload.give_up(WhisperdError(ErrorCode.CANCELLED, "the client left before its recording was uploaded"))
