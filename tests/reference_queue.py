"""The queue as plain Python, in memory: what the store must show after any sequence of calls.

Written from the protocol's rules, not from the store: no SQL, no transactions, no rows. `tests/test_store_model.py`
holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from whisperd.protocol.jobs import ENDED, JobState, Priority

MAX_DEATHS = 3
MAX_FETCH_FAILURES = 3
PCM_BYTES_A_SECOND = 32_000


class Refused(Exception):
    """The call must fail with this error code and change nothing."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(eq=False, kw_only=True)
class Work:
    """A run. `audio` names the recording once it is here, `address` where it comes from if it is downloaded."""

    id: int
    uid: int
    audio: str | None
    address: str | None
    folder: str | None
    fresh: bool
    state: JobState
    decoded_s: float | None = None
    model: str | None = None  # whose words and answers these are
    said: list[str] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)
    deaths: int = 0
    fetch_failures: int = 0
    keep_audio_until: float | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(eq=False, kw_only=True)
class Order:
    """A job. `story` is its events in words: states (`running!` says that earlier segments are void) and segments.

    `address` is what it asked for, if not a file: its work may have begun otherwise.
    """

    id: int
    uid: int
    work: Work
    priority: Priority
    key: str | None
    address: str | None
    state: JobState
    story: list[str] = field(default_factory=list)
    ended_at: float | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(kw_only=True)
class Key:
    job_id: int
    fingerprint: str
    expires_at: float | None = None


class Reference:
    """Jobs, runs and keys by id. Retention is in seconds."""

    def __init__(self, *, jobs_s: float, keys_s: float, failed_audio_s: float, size_bytes: int) -> None:
        self._jobs_s, self._keys_s, self._failed_audio_s = jobs_s, keys_s, failed_audio_s
        self._size_bytes = size_bytes
        self.now = 1000.0
        self.jobs: dict[int, Order] = {}
        self.runs: dict[int, Work] = {}
        self.keys: dict[tuple[int, str], Key] = {}
        self.last_job = self.last_run = 0

    # --- what is seen ---

    def holders(self, work: Work) -> list[Order]:
        """Return the live jobs of a run."""
        return [job for job in self.jobs.values() if job.work is work and not job.ended]

    def folders(self) -> list[str]:
        """Return every folder that must be there."""
        return sorted(work.folder for work in self.runs.values() if work.folder is not None)

    def spool_bytes(self, uid: int) -> int:
        """Return what a user's audio takes."""
        kept = [w for w in self.runs.values() if w.uid == uid and (not w.ended or w.keep_audio_until is not None)]
        decoded = sum(int((work.decoded_s or 0) * PCM_BYTES_A_SECOND) for work in kept)
        return decoded + sum(self._size_bytes for work in kept if work.audio is not None)

    # --- what users do ---

    def submit(
        self,
        uid: int,
        priority: Priority,
        *,
        audio: str | None = None,
        address: str | None = None,
        folder: str | None = None,
        key: str | None = None,
        fresh: bool = False,
    ) -> Order:
        """A recording that is in `folder`, or an address."""
        fingerprint = audio or f"at {address}"
        if key is not None and (known := self._known(uid, key)) is not None:
            if known.fingerprint != fingerprint:
                raise Refused("key_conflict")
            return self.jobs[known.job_id]
        work = None if fresh else self._same_work(uid, audio, address)
        if work is None:
            work = self._add_work(uid, audio, address, folder, fresh)
        job = self._add_job(uid, work, priority, key, address)
        if key is not None:
            self.keys[uid, key] = Key(job_id=job.id, fingerprint=fingerprint)
        return job

    def cancel(self, job_id: int, uid: int) -> None:
        job = self._own(job_id, uid)
        if not job.ended:
            self._end(job, JobState.CANCELLED)
            if not self.holders(job.work):
                self._end_work(job.work, JobState.CANCELLED)

    def retry(self, job_id: int, uid: int) -> Order:
        job = self._own(job_id, uid)
        if job.state not in (JobState.FAILED, JobState.CANCELLED):
            raise Refused("bad_request")
        old, address = job.work, job.address
        work = self._same_work(uid, old.audio, address)
        if work is None and old.state not in (JobState.FAILED, JobState.CANCELLED):
            work = old
        if work is None or (old.fresh and work.id < old.id):
            if address is not None:
                work = self._add_work(uid, None, address, None, old.fresh)
            else:
                giver = self._keeper(old)
                work = self._add_work(uid, old.audio, None, giver.folder, old.fresh)
                work.decoded_s = giver.decoded_s
                giver.folder = giver.keep_audio_until = None
        return self._add_job(uid, work, job.priority, None, address)

    def forget(self, job_id: int, uid: int) -> None:
        job = self._own(job_id, uid)
        if not job.ended:
            raise Refused("bad_request")
        self._drop_key(job, None)
        self._remove(job)

    # --- what the daemon does ---

    def fetch_started(self, work: Work, folder: str) -> None:
        if work.state is JobState.PENDING:
            work.folder = folder
            self._move_work(work, JobState.FETCHING)

    def fetched(self, work: Work, audio: str) -> None:
        if work.state is not JobState.FETCHING:
            return
        known = None if work.fresh else self._same_work(work.uid, audio, None)
        if known is None:
            work.audio = audio
            self._move_work(work, JobState.QUEUED)
            return
        for job in self.holders(work):
            self._move(job, JobState.QUEUED)
            job.work = known
            self._catch_up(job)
        for job in self.jobs.values():
            if job.work is work:
                job.work = known
        known.address = known.address or work.address
        del self.runs[work.id]

    def fetch_failed(self, work: Work, *, counts: bool) -> None:
        if work.state is not JobState.FETCHING:
            return
        if counts and work.fetch_failures == MAX_FETCH_FAILURES:
            self._end_work(work, JobState.FAILED, "fetch_failed")
            return
        work.fetch_failures += counts
        self._unfetch(work)

    def decoded(self, work: Work, seconds: float) -> None:
        if not work.ended:
            work.decoded_s, work.deaths = seconds, 0

    def start(self, work: Work, model: str) -> None:
        self._move_work(work, JobState.RUNNING)
        if work.model != model:
            for job in self.holders(work):
                job.story[-1] += "!" if work.said else ""
            work.model, work.said, work.answers = model, [], []

    def say(self, work: Work, texts: Iterable[str], answers: Iterable[bytes]) -> None:
        if work.state is JobState.RUNNING:
            work.answers += answers
            for text in texts:
                work.said.append(text)
                for job in self.holders(work):
                    job.story.append(text)

    def finish(self, work: Work) -> None:
        if work.state is JobState.RUNNING:
            work.folder = None
            self._end_work(work, JobState.DONE)

    def fail(self, work: Work, code: str) -> None:
        if not work.ended:
            self._end_work(work, JobState.FAILED, code)

    def void_journal(self, work: Work) -> None:
        if work.state is JobState.RUNNING:
            self._unstart(work)
            work.model = None

    def count_death(self, work: Work) -> None:
        if not work.ended:
            work.deaths += 1
            if work.deaths == MAX_DEATHS:
                self._end_work(work, JobState.FAILED, "worker_crashed")

    def put_back(self, work: Work, *, died: bool) -> None:
        if died:
            self.count_death(work)
        if work.ended:
            return
        if work.state is JobState.RUNNING:
            self._unstart(work)
        elif work.state is JobState.FETCHING:
            self._unfetch(work)

    def restart(self) -> None:
        for work in list(self.runs.values()):
            if work.state is JobState.RUNNING:
                self._unstart(work)
            elif work.state is JobState.FETCHING:
                self._unfetch(work)

    def housekeep(self) -> None:
        for job in list(self.jobs.values()):
            if job.ended_at is not None and job.ended_at < self.now - self._jobs_s:
                self._drop_key(job, None if job.state is JobState.FAILED else self.now + self._keys_s)
                self._remove(job)
        for name, key in list(self.keys.items()):
            if key.expires_at is not None and key.expires_at <= self.now:
                del self.keys[name]
        for work in self.runs.values():
            if work.keep_audio_until is not None and work.keep_audio_until <= self.now:
                work.folder = work.keep_audio_until = None

    # --- pieces ---

    def _own(self, job_id: int, uid: int) -> Order:
        job = self.jobs.get(job_id)
        if job is None or job.uid != uid:
            raise Refused("not_found")
        return job

    def _known(self, uid: int, name: str) -> Key | None:
        key = self.keys.get((uid, name))
        if key is None or (key.expires_at is not None and key.expires_at <= self.now):
            return None
        if key.expires_at is not None:
            raise Refused("not_found")
        return None if self.jobs[key.job_id].state is JobState.FAILED else key

    def _same_work(self, uid: int, audio: str | None, address: str | None) -> Work | None:
        """Return the newest run that does, or did, this work."""
        same = [
            work
            for work in self.runs.values()
            if work.uid == uid
            and work.state not in (JobState.FAILED, JobState.CANCELLED)
            and (work.audio == audio if address is None else work.address == address)
        ]
        return max(same, key=lambda work: work.id, default=None)

    def _keeper(self, old: Work) -> Work:
        """Return the newest run that keeps the audio of an ended one."""
        kept = [
            work
            for work in self.runs.values()
            if work.uid == old.uid and work.audio == old.audio and work.keep_audio_until is not None
        ]
        if not kept:
            raise Refused("not_found")
        return max(kept, key=lambda work: work.id)

    def _add_work(self, uid: int, audio: str | None, address: str | None, folder: str | None, fresh: bool) -> Work:
        self.last_run += 1
        state = JobState.QUEUED if address is None else JobState.PENDING
        work = Work(id=self.last_run, uid=uid, audio=audio, address=address, folder=folder, fresh=fresh, state=state)
        self.runs[work.id] = work
        return work

    def _add_job(self, uid: int, work: Work, priority: Priority, key: str | None, address: str | None) -> Order:
        self.last_job += 1
        state = JobState.QUEUED if address is None else JobState.PENDING
        job = Order(
            id=self.last_job,
            uid=uid,
            work=work,
            priority=priority,
            key=key,
            address=address,
            state=state,
            story=[str(state)],
        )
        self.jobs[job.id] = job
        self._catch_up(job)
        return job

    def _catch_up(self, job: Order) -> None:
        """A job that joins is brought to where its run is, by moves that are allowed, and told what was said."""
        state = job.work.state
        if job.state is JobState.PENDING and state in (JobState.FETCHING, JobState.QUEUED, JobState.RUNNING):
            self._move(job, JobState.FETCHING if state is JobState.FETCHING else JobState.QUEUED)
        if state is JobState.RUNNING:
            self._move(job, JobState.RUNNING)
        job.story += job.work.said
        if state is JobState.DONE:
            self._end(job, JobState.DONE)

    def _move(self, job: Order, state: JobState) -> None:
        job.state = state
        job.story.append(str(state))

    def _move_work(self, work: Work, state: JobState) -> None:
        work.state = state
        for job in self.holders(work):
            self._move(job, state)

    def _unstart(self, work: Work) -> None:
        self._move_work(work, JobState.QUEUED)

    def _unfetch(self, work: Work) -> None:
        work.folder = None
        self._move_work(work, JobState.PENDING)

    def _end(self, job: Order, state: JobState, error: str | None = None) -> None:
        self._move(job, state)
        job.ended_at, job.error = self.now, error

    def _end_work(self, work: Work, state: JobState, error: str | None = None) -> None:
        for job in self.holders(work):
            self._end(job, state, error)
        work.state, work.answers = state, []
        if work.audio is None:  # a download that was not complete
            work.folder = None
        elif state is not JobState.DONE:
            work.keep_audio_until = self.now + self._failed_audio_s

    def _drop_key(self, job: Order, expires_at: float | None) -> None:
        key = self.keys.get((job.uid, job.key or ""))
        if key is not None and key.job_id == job.id:
            if expires_at is None:
                del self.keys[job.uid, job.key or ""]
            else:
                key.expires_at = expires_at

    def _remove(self, job: Order) -> None:
        del self.jobs[job.id]
        if not any(other.work is job.work for other in self.jobs.values()):
            del self.runs[job.work.id]
