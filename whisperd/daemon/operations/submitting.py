"""The way of every submit: its key is looked up, it takes a place, its audio comes, one commit, one answer.

How the audio comes is its heirs': `submitting_file` (a descriptor), `submitting_upload` (chunks), `submitting_fetch` (a
download, which is the job's own first step).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from whisperd.daemon.admission import Place
from whisperd.daemon.keys import early_fingerprints, fingerprint_of, share_key
from whisperd.daemon.operations.call import Call
from whisperd.daemon.store import Known, LookedUp, key_conflict
from whisperd.daemon.store.rows import Change, JobRow, NewJob, RunRow, about
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import Copied
from whisperd.protocol.messages import Submit, source_to_wire


class Submission(ABC):
    """A submit between its checks and its answer: `_answer` or `_give_up`, behind which `_over` gives all back.

    Its place is its own from its admission until then, and so is a folder of the spool that no job has taken.
    """

    def __init__(self, call: Call, params: Submit) -> None:
        self._call, self._params = call.followed_by(self._over), params
        self._house, self._peer = call.house, call.peer
        # With the mode that is meant where none is asked for: what is done, kept and shared.
        self._options = {**params.options, "mode": params.options["mode"] or call.house.config.mode}
        self._place: Place | None = None
        self._folder: str | None = None
        self._answered = False

    def begin(self) -> None:
        """Count it until it is answered, and go on."""
        self._house.admission.take_up(self._peer.uid)
        self._look_up()

    # --- what differs ---

    @abstractmethod
    def _is_same(self, known: Known) -> bool:
        """True unless the key's job is seen to have another source or other options."""

    def _known(self, known: Known) -> None:
        """The key has a job. Raises `WhisperdError`."""
        self._answer(known.job, known.run, reused=True)

    @property
    def _size_bytes(self) -> int:
        """How much audio is to come to the spool before it is a job."""
        return 0

    @abstractmethod
    def _entered(self) -> None:
        """It has its place: have its audio come, then `_copied`, or `_commit` at once."""

    # --- the way ---

    def _look_up(self) -> None:
        """Look the key up before anything else: a retry of an accepted submit is never refused for want of room."""
        store, uid, key = self._house.ledger.store, self._peer.uid, self._params.key
        if key is None and self._house.is_admin(uid):  # nothing to look up, and no bound for what he has
            self._found(LookedUp(known=None, stored_bytes=0))
            return
        self._house.ledger.read(
            lambda db, now: store.look_up(db, uid, key, now), self._found, self._give_up, by=self._peer
        )

    def _found(self, found: LookedUp) -> None:
        if self._answered:  # an upload that fell silent meanwhile, or whose client has gone
            return
        try:
            if found.known is None:
                self._enter(found.stored_bytes)
            elif self._is_same(found.known):
                self._known(found.known)
            else:
                raise key_conflict(str(self._params.key))
        except WhisperdError as error:
            self._give_up(error)

    def _enter(self, stored_bytes: int) -> None:
        """Take a place, or wait for an earlier submit of the same key: it may become this one's job."""
        house, uid, key = self._house, self._peer.uid, self._params.key
        self._refuse_when_useless()
        try:
            self._place = house.admission.enter(
                uid, self._params.priority, size_bytes=self._size_bytes, stored_bytes=stored_bytes
            )
        except WhisperdError:
            if house.under_way.maybe_wait(uid, key, self._look_up):
                return
            raise
        house.under_way.began(uid, key)
        self._entered()

    def _refuse_when_useless(self) -> None:
        """Raise `stopping`, or `cancelled` where nobody could learn of the job any more, or hold it."""
        self._house.refuse_when_stopping()
        if self._peer.closed and not self._outlives_client:
            raise WhisperdError(ErrorCode.CANCELLED, "the client left before its submit was taken")

    @property
    def _outlives_client(self) -> bool:
        """True when a client that is gone can ask again by key and find its job: without one it never learns its id."""
        return self._params.key is not None and not self._params.attached

    def _grow(self, to_bytes: int) -> None:
        """Count what has come of its audio. Raises `storage_full`, `quota_exceeded`."""
        assert self._place is not None, "it was admitted"
        self._house.admission.grow(self._place, to_bytes)

    def _copied(self, folder: str, copied: Copied) -> None:
        """Its audio lies in a folder of the spool, durable."""
        house, self._folder = self._house, folder
        try:
            self._grow(copied.size_bytes)
        except WhisperdError as error:
            self._give_up(error)
            return
        early = early_fingerprints(copied.size_bytes, self._params.options)[0]
        self._commit(
            fingerprint_of(early, copied.sha256),
            share_key(house.config, self._peer.uid, copied.sha256, self._options, house.model.identity),
            sha256=copied.sha256,
            size_bytes=copied.size_bytes,
        )

    def _commit(
        self,
        fingerprint: bytes,
        share_key: bytes,
        *,
        source_key: bytes | None = None,
        sha256: str = "",
        size_bytes: int = 0,
    ) -> None:
        params, store = self._params, self._house.ledger.store
        new = NewJob(
            uid=self._peer.uid,
            priority=params.priority,
            attached=params.attached,
            key=params.key,
            source=source_to_wire(params.source),
            options=self._options,
            fresh=params.fresh,
            fingerprint=fingerprint,
            share_key=share_key,
            source_key=source_key,
            folder=self._folder,
            sha256=sha256,
            size_bytes=size_bytes,
        )

        def accepted(change: Change) -> None:
            job, run = about(change)
            self._answer(job, run, reused=change.reused)

        self._house.ledger.commit(
            lambda db, now: store.accept(db, new, now), accepted, self._give_up, by=self._peer, new_work=True
        )

    # --- the end ---

    def _answer(self, job: JobRow, run: RunRow, *, reused: bool) -> None:
        self._house.metrics.cache_hits += reused
        if self._params.attached:
            self._house.hold(job.id, self._peer)
        self._call.reply({"job": self._call.show(job, run), "reused": reused})

    def _give_up(self, error: WhisperdError) -> None:
        if not self._answered:
            if self._folder is not None:
                self._house.ledger.spool.remove(self._folder)
            self._call.fail(error)

    def _over(self) -> None:
        """It is answered, and its job, if there is one, on the board. In this order: who waits finds the place free."""
        house, uid, key = self._house, self._peer.uid, self._params.key
        self._answered = True
        if self._place is None:
            house.under_way.stop_waiting(uid, key, self._look_up)
        else:
            house.admission.leave(self._place)
            house.under_way.ended(uid, key)
        house.admission.answered(uid)
