"""Who waits for what: open `result` and `subscribe` requests, and the holders of attached jobs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from whisperd.daemon.loop import Timer
from whisperd.daemon.store.rows import Event
from whisperd.daemon.wire.server import Peer
from whisperd.protocol.errors import ErrorCode, WhisperdError

_Key = tuple[int, int]  # a peer's id, and its request's


@dataclass(eq=False, slots=True, kw_only=True)
class Subscription:
    """An open `subscribe`. `job_id` None: state and end of all the user's jobs, from now on.

    Events up to `after_seq` are known there: a client may name a number that its job has not come to yet.
    """

    peer: Peer
    request_id: int
    uid: int
    job_id: int | None
    after_seq: int = 0
    told: Mapping[str, Any] | None = None  # the progress that was pushed last, since the last move

    def push(self, event: Event) -> None:
        """Push a numbered event; the end of its job, which ends the subscription, is pushed in any case."""
        if event.seq <= self.after_seq and event.kind != "end":
            return
        if event.kind == "state":
            self.told = None
        wire = {"id": self.request_id, "event": event.kind, "job": event.job_id, "seq": event.seq, **event.payload}
        self.peer.push(self.request_id, wire)

    def push_progress(self, job_id: int, payload: Mapping[str, Any]) -> bool:
        """Push progress, which carries no number; return False when it was left out, as the reader is behind."""
        wire = {"id": self.request_id, "event": "progress", "job": job_id, **payload}
        pushed = self.peer.push(self.request_id, wire, skippable=True)
        if pushed:
            self.told = payload
        return pushed


@dataclass(eq=False, slots=True)
class Wait:
    """An open `result` that waits: `answer` is called when its job ends or its time is over, whatever comes first."""

    peer: Peer
    answer: Callable[[], None]
    timer: Timer | None

    def end(self) -> None:
        """Wait no more. A time that may be decades away must not keep a client in memory who has gone."""
        if self.timer is not None:
            self.timer.cancel()


@dataclass(eq=False, slots=True)
class _Mine:
    """What one peer has open: its requests that wait or follow, with their jobs, and the jobs it holds."""

    admitted: set[int] = field(default_factory=set)
    subscriptions: dict[_Key, int | None] = field(default_factory=dict)
    waits: dict[_Key, int] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)


class Watchers:
    """Waits and subscriptions by job, holders by job; `forget_peer` ends all that a gone peer had.

    Each is also found by its peer, as many may go at once. A user who is not `unlimited` has at most `most_per_user`
    waits and subscriptions.
    """

    def __init__(self, *, most_per_user: int, unlimited: Callable[[int], bool]) -> None:
        self._most_per_user, self._unlimited = most_per_user, unlimited
        self._subscriptions: defaultdict[int, dict[_Key, Subscription]] = defaultdict(dict)
        self._of_users: defaultdict[int, dict[_Key, Subscription]] = defaultdict(dict)  # by uid
        self._waits: defaultdict[int, dict[_Key, Wait]] = defaultdict(dict)
        self._holders: defaultdict[int, Counter[int]] = defaultdict(
            Counter
        )  # by job: peers, and how often each holds it
        self._per_user: Counter[int] = Counter()
        self._of_peers: defaultdict[int, _Mine] = defaultdict(_Mine)

    def admit(self, peer: Peer, request_id: int) -> None:
        """Take up a request that waits or follows; `release` it, unless it or its peer ends here first.

        Raises `quota_exceeded`.
        """
        if self._per_user[peer.uid] >= self._most_per_user and not self._unlimited(peer.uid):
            raise WhisperdError(
                ErrorCode.QUOTA_EXCEEDED,
                f"{self._most_per_user} of your requests wait for jobs or follow them already (setting "
                "watches_per_user): end some, or follow all your jobs with one subscription",
            )
        self._per_user[peer.uid] += 1
        self._of_peers[peer.id].admitted.add(request_id)

    def release(self, peer: Peer, request_id: int) -> None:
        """An admitted request waits or follows no more."""
        mine = self._of_peers.get(peer.id)
        if mine is not None and request_id in mine.admitted:
            mine.admitted.discard(request_id)
            self._per_user[peer.uid] -= 1
            if not self._per_user[peer.uid]:
                del self._per_user[peer.uid]

    # -- subscriptions -----------------------------------------------------------------------------------------

    def subscribe(self, subscription: Subscription) -> None:
        """Push what happens from now on."""
        peer, job_id = subscription.peer, subscription.job_id
        key = (peer.id, subscription.request_id)
        place = self._of_users[peer.uid] if job_id is None else self._subscriptions[job_id]
        place[key] = subscription
        self._of_peers[peer.id].subscriptions[key] = job_id

    def _unsubscribe(self, key: _Key, subscription: Subscription) -> None:
        peer, job_id = subscription.peer, subscription.job_id
        by_key = self._of_users if job_id is None else self._subscriptions
        name = peer.uid if job_id is None else job_id
        by_key[name].pop(key, None)
        if not by_key[name]:
            del by_key[name]
        self._of_peers[peer.id].subscriptions.pop(key, None)
        self.release(peer, subscription.request_id)

    def watched(self, job_id: int) -> bool:
        """True when somebody follows a job."""
        return job_id in self._subscriptions

    @property
    def anybody_follows(self) -> bool:
        """True when any job is followed by itself."""
        return bool(self._subscriptions)

    def followers(self) -> Iterator[Subscription]:
        """Yield who follows one job, whichever."""
        for subscriptions in self._subscriptions.values():
            yield from subscriptions.values()

    def publish(self, events: Iterable[Event]) -> None:
        """Push committed events; ends waits and subscriptions of jobs that ended."""
        for event in events:
            for subscription in self._subscriptions.get(event.job_id, {}).values():
                subscription.push(event)
            if event.kind != "segment":
                for subscription in self._of_users.get(event.uid, {}).values():
                    subscription.push(event)
            if event.kind == "end":
                for key, subscription in list(self._subscriptions.get(event.job_id, {}).items()):
                    self._unsubscribe(key, subscription)
                    subscription.peer.finish(subscription.request_id)
                for key, wait in list(self._waits.get(event.job_id, {}).items()):
                    self._unwait(event.job_id, key)
                    wait.answer()
                for peer_id in self._holders.pop(event.job_id, ()):
                    self._of_peers[peer_id].held.discard(event.job_id)

    def publish_progress(self, job_id: int, payload: Mapping[str, Any]) -> None:
        """Push progress of a job to those who follow it."""
        for subscription in self._subscriptions.get(job_id, {}).values():
            subscription.push_progress(job_id, payload)

    # -- waits -------------------------------------------------------------------------------------------------

    def wait(self, job_id: int, request_id: int, wait: Wait) -> None:
        """Answer once when the job ends, unless `unwait` or the peer's end comes first."""
        key = (wait.peer.id, request_id)
        self._waits[job_id][key] = wait
        self._of_peers[wait.peer.id].waits[key] = job_id

    def unwait(self, job_id: int, peer: Peer, request_id: int) -> None:
        """Give up a wait."""
        self._unwait(job_id, (peer.id, request_id))

    def _unwait(self, job_id: int, key: _Key) -> None:
        waits = self._waits.get(job_id, {})
        if (wait := waits.pop(key, None)) is not None:
            wait.end()
            self._of_peers[key[0]].waits.pop(key, None)
            self.release(wait.peer, key[1])
        if not waits:
            self._waits.pop(job_id, None)

    # -- holders of attached jobs --------------------------------------------------------------------------------

    def hold(self, job_id: int, peer: Peer) -> None:
        """Note that a job lives as long as this peer does, unless the peer lets go as often as it holds."""
        self._holders[job_id][peer.id] += 1
        self._of_peers[peer.id].held.add(job_id)

    def let_go(self, job_id: int, peer: Peer) -> bool:
        """Take one `hold` back; return True when the job has lost its last holder by it."""
        mine = self._of_peers.get(peer.id, _Mine())
        if job_id not in mine.held:  # it has ended, or its peer has
            return False
        self._holders[job_id][peer.id] -= 1
        if self._holders[job_id][peer.id]:
            return False
        mine.held.discard(job_id)
        return self._orphans(job_id, peer)

    def _orphans(self, job_id: int, former: Peer) -> bool:
        """Forget a holder; return True when it was the job's last."""
        del self._holders[job_id][former.id]
        if self._holders[job_id]:
            return False
        del self._holders[job_id]
        return True

    def held(self, job_id: int) -> bool:
        """True when an attached job has a holder left."""
        return bool(self._holders.get(job_id))

    # -- peers ---------------------------------------------------------------------------------------------------

    def forget_peer(self, peer: Peer) -> list[int]:
        """Drop all that a gone peer had; return the jobs that have lost their last holder by it."""
        mine = self._of_peers.get(peer.id, _Mine())
        for key, followed in list(mine.subscriptions.items()):
            place = self._of_users[peer.uid] if followed is None else self._subscriptions[followed]
            self._unsubscribe(key, place[key])
        for key, job_id in list(mine.waits.items()):
            self._unwait(job_id, key)
        for request_id in list(mine.admitted):
            self.release(peer, request_id)
        orphaned = [job_id for job_id in mine.held if self._orphans(job_id, peer)]
        self._of_peers.pop(peer.id, None)
        return orphaned
