"""Submits of kind `upload`: a receiver gets the bytes as they come."""

from __future__ import annotations

from whisperd.daemon.keys import early_fingerprints
from whisperd.daemon.lanes.copying import Copy
from whisperd.daemon.operations.call import Call
from whisperd.daemon.operations.submitting import Submission
from whisperd.daemon.store import Known
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


class _UploadSubmission(Submission):
    """A submit with its `Upload`, which ends with it at the latest."""

    def __init__(self, call: Call, params: Submit, announced_bytes: int | None) -> None:
        super().__init__(call, params)
        self._announced_bytes = announced_bytes
        self._copy: Copy | None = None  # from its admission on
        self._upload = Upload(
            self._house.loop,
            call.peer,
            call.id,
            timeout_s=self._house.config.upload_timeout_s,
            bytes_per_s=self._house.config.upload_bytes_per_s,
            crowded=lambda: self._house.receiving.crowded,
            check=self._check,
            send=self._send,
            failed=self._failed,
        )

    def begin(self) -> None:
        """Make it its connection's upload, or raise `bad_request`. Chunks are held back until it has a receiver."""
        self._house.uploads.add(self._peer, self._upload)
        super().begin()

    @property
    def _size_bytes(self) -> int:
        return self._announced_bytes or self._upload.received_bytes

    def _is_same(self, known: Known) -> bool:
        size_bytes = known.run.size_bytes if self._announced_bytes is None else self._announced_bytes
        return known.fingerprint.startswith(early_fingerprints(size_bytes, self._params.options))

    def _known(self, known: Known) -> None:
        self._end_upload(bad_request(f"chunk: no bytes are wanted: the submit's key is that of job {known.job.id}"))
        super()._known(known)

    def _entered(self) -> None:
        copy = self._copy = Copy(
            uid=self._peer.uid,
            priority=self._params.priority,
            descriptor=None,
            folder=self._house.ledger.spool.new_folder(),
            client=self._peer.id,
            started=self._upload.start,
            progressed=lambda progress: self._upload.written(int(progress.done)),
            copied=lambda copied: self._copied(copy.folder, copied),
            refused=self._give_up,
        )
        self._maybe_outlive_client(copy)
        self._house.receiving.add(copy)

    # --- the bytes ---

    def _check(self, chunk: Chunk, received_bytes: int) -> None:
        """Raise what ends the upload as a whole."""
        size_bytes, most = self._announced_bytes, self._house.config.max_source_bytes
        if size_bytes is not None and (received_bytes > size_bytes or (chunk.last and received_bytes < size_bytes)):
            raise bad_request(
                f"chunk: {received_bytes} bytes came where size_bytes promised {size_bytes}: submit again with the "
                "true size, or with null"
            )
        if received_bytes > most:
            raise _too_large(most)
        if self._place is not None:
            self._grow(received_bytes)

    def _send(self, data: bytes, last: bool) -> None:
        assert self._copy is not None, "it was started"
        self._maybe_outlive_client(self._copy)
        self._house.receiving.feed(self._copy, data, last=last)

    def _maybe_outlive_client(self, copy: Copy) -> None:
        """Once all of it has come, it is like a copy: its client may go and ask again by key."""
        if self._upload.complete and self._outlives_client:
            copy.client = None

    # --- the end ---

    def _failed(self, error: WhisperdError) -> None:
        """Its client is silent, gone or wrong."""
        if self._copy is None:
            self._give_up(error)
        else:
            self._house.receiving.give_up(self._copy, error)

    def _copied(self, folder: str, copied: Copied) -> None:
        self._end_upload()
        super()._copied(folder, copied)

    def _give_up(self, error: WhisperdError) -> None:
        self._end_upload(error)
        super()._give_up(error)

    def _end_upload(self, error: WhisperdError | None = None) -> None:
        """No bytes are wanted any more, its connection may have another upload; `error` answers chunks that wait."""
        self._house.uploads.remove(self._peer, self._upload, error)
