"""Submits of kind `upload`: the key first, admission, then the bytes as they come, one commit and the answer."""

from __future__ import annotations

import sqlite3
from typing import Any

from whisperd.daemon.admission import Place
from whisperd.daemon.lanes.copying import Copy
from whisperd.daemon.operations.accepting import accept, early_fingerprints, outlives_client, refuse_when_useless
from whisperd.daemon.operations.call import Call
from whisperd.daemon.store import Answer, key_conflict
from whisperd.daemon.uploads import Upload
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.fields import bad_request
from whisperd.protocol.helper_messages import Copied
from whisperd.protocol.messages import Chunk, Submit, UploadSource


def submit_upload(call: Call, params: Submit) -> None:
    """Handle one submit whose bytes come as chunks under its id.

    Raises what can be refused at once. A known key is answered at once too: its bytes are there already.
    """
    call.house.refuse_when_stopping()
    assert isinstance(params.source, UploadSource)
    size_bytes, most = params.source.size_bytes, call.house.config.max_source_bytes
    if size_bytes is not None and size_bytes > most:
        raise _too_large(most)
    _UploadSubmission(call, params, size_bytes).begin()


def _too_large(most: int) -> WhisperdError:
    message = f"at most {most} bytes are taken (setting max_source_bytes): cut the recording into parts"
    return WhisperdError(ErrorCode.TOO_LARGE, message)


class _UploadSubmission:
    """One upload between its checks and its answer."""

    def __init__(self, call: Call, params: Submit, size_bytes: int | None) -> None:
        self._call, self._params, self._size_bytes = call.followed_by(self._over), params, size_bytes
        self._house, self._peer = call.house, call.peer
        self._stored_bytes = 0
        self._place: Place | None = None  # from its admission on, as is its copy
        self._copy: Copy | None = None
        self._ended = False
        self._upload = Upload(
            self._house.loop,
            call.peer,
            call.id,
            timeout_s=self._house.config.upload_timeout_s,
            bytes_per_s=self._house.config.upload_bytes_per_s,
            crowded=lambda: self._house.receiving.crowded,
            check=self._check,
            send=self._send,
            failed=self._given_up,
        )

    def begin(self) -> None:
        """Take it up as its connection's upload, or raise `bad_request`; then go on."""
        self._house.uploads.add(self._peer, self._upload)
        self._house.admission.take_up(self._peer.uid)
        self._look_up()

    def _look_up(self) -> None:
        """Look the key up. Chunks that come meanwhile are held back."""
        key, uid, store = self._params.key, self._peer.uid, self._house.ledger.store

        def look(db: sqlite3.Connection, now: float) -> tuple[Any, Answer | None, int]:
            row, stored_bytes = store.look_up(db, uid, key, now)
            job_id = None if row is None else row["job_id"]
            known = None if job_id is None else store.answer(db, job_id, uid=None, with_transcript=False)
            return row, known, stored_bytes

        def then(found: tuple[Any, Answer | None, int]) -> None:
            row, known, self._stored_bytes = found
            if self._upload.error is not None:
                return  # silent, or gone, in the meantime: it has been answered
            if known is not None:
                self._answer_known(row["fingerprint"], known)
            else:
                self._admit()

        self._house.ledger.read(look, then, self._end, by=self._peer)

    def _answer_known(self, fingerprint: bytes, known: Answer) -> None:
        key, size_bytes = self._params.key, self._size_bytes
        assert key is not None
        early = early_fingerprints(known.run.size_bytes if size_bytes is None else size_bytes, self._params.options)
        if not fingerprint.startswith(early):
            self._end(key_conflict(key))
            return
        if self._params.attached:
            self._house.hold(known.job.id, self._peer)
        unwanted = bad_request(f"chunk: no bytes are wanted: the submit's key is that of job {known.job.id}")
        self._house.uploads.remove(self._peer, self._upload, unwanted)
        self._call.reply({"job": self._call.show(known.job, known.run), "reused": True})

    def _admit(self) -> None:
        house, size_bytes = self._house, self._size_bytes or self._upload.received_bytes
        uid, priority, key = self._peer.uid, self._params.priority, self._params.key
        try:
            house.refuse_when_stopping()
            refuse_when_useless(self._peer, self._params)
        except WhisperdError as error:
            self._end(error)
            return
        try:
            place = house.admission.enter(uid, priority, size_bytes=size_bytes, stored_bytes=self._stored_bytes)
        except WhisperdError as error:
            if not house.under_way.maybe_wait(uid, key, self._look_up):
                self._end(error)
            return
        self._place = place
        house.under_way.began(uid, key)
        self._copy = Copy(
            uid=uid,
            priority=priority,
            descriptor=None,
            folder=house.ledger.spool.new_folder(),
            client=self._peer.id,
            started=self._upload.start,
            progressed=lambda progress: self._upload.written(int(progress.done)),
            copied=self._copied,
            refused=self._end,
        )
        self._maybe_outlive_client()
        house.receiving.add(self._copy)

    # --- the bytes ---

    def _check(self, chunk: Chunk, received_bytes: int) -> None:
        """Raise what ends the upload as a whole."""
        house, size_bytes = self._house, self._size_bytes
        if size_bytes is not None and (received_bytes > size_bytes or (chunk.last and received_bytes < size_bytes)):
            raise bad_request(
                f"chunk: {received_bytes} bytes came where size_bytes promised {size_bytes}: submit again with the "
                "true size, or with null"
            )
        if received_bytes > house.config.max_source_bytes:
            raise _too_large(house.config.max_source_bytes)
        if size_bytes is None and self._place is not None:
            house.admission.grow(self._place, received_bytes)

    def _send(self, data: bytes, last: bool) -> None:
        assert self._copy is not None
        self._maybe_outlive_client()
        self._house.receiving.feed(self._copy, data, last=last)

    def _maybe_outlive_client(self) -> None:
        """Once all of it has come, it is like a copy: its client may go and ask again by key."""
        if self._copy is not None and self._upload.complete and outlives_client(self._params):
            self._copy.client = None

    # --- the end ---

    def _over(self) -> None:
        admission, uid, key = self._house.admission, self._peer.uid, self._params.key
        if self._place is not None:
            admission.leave(self._place)
            self._house.under_way.ended(uid, key)  # who waits finds the place free
        else:  # its client may have gone, and hundreds of others like it
            self._house.under_way.stop_waiting(uid, key, self._look_up)
        admission.answered(uid)

    def _given_up(self, error: WhisperdError) -> None:
        if self._copy is None:
            self._end(error)
        else:
            self._house.receiving.give_up(self._copy, error)

    def _end(self, error: WhisperdError) -> None:
        """Refuse it, once: by the lane, or where it never came to the lane."""
        if not self._ended:
            self._ended = True
            self._upload.give_up(error)
            self._house.uploads.remove(self._peer, self._upload)
            self._call.fail(error)

    def _copied(self, copied: Copied) -> None:
        assert self._copy is not None
        self._house.uploads.remove(self._peer, self._upload)
        early = early_fingerprints(copied.size_bytes, self._params.options)[0]
        accept(self._call, self._params, early=early, folder=self._copy.folder, copied=copied)
