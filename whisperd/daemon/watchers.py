"""Who waits for what: open `result` and `subscribe` requests, and the holders of attached jobs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from whisperd.daemon.loop import Timer
from whisperd.daemon.server import Peer
from whisperd.daemon.store.rows import Event


@dataclass(eq=False, slots=True, kw_only=True)
class Subscription:
    """An open `subscribe`. `job_id` None: state and end of all the user's jobs, from now on."""

    peer: Peer
    request_id: int
    uid: int
    job_id: int | None

    def push(self, event: Event) -> None:
        """Push a numbered event; the end of its job ends the subscription."""
        wire = {"id": self.request_id, "event": event.kind, "job": event.job_id, "seq": event.seq, **event.payload}
        self.peer.push(self.request_id, wire)

    def push_progress(self, job_id: int, payload: dict[str, Any]) -> None:
        """Push progress, which carries no number and is left out when the reader is behind."""
        wire = {"id": self.request_id, "event": "progress", "job": job_id, **payload}
        self.peer.push(self.request_id, wire, skippable=True)


@dataclass(eq=False, slots=True)
class Wait:
    """An open `result` that waits: `answer` is called when its job ends or its time is over, whatever comes first."""

    answer: Callable[[], None]
    timer: Timer | None

    def end(self) -> None:
        """Wait no more. A time that may be decades away must not keep a client in memory who has gone."""
        if self.timer is not None:
            self.timer.cancel()


class Watchers:
    """Waits and subscriptions by job, holders by job; `forget_peer` ends all that a gone peer had."""

    def __init__(self) -> None:
        self._subscriptions: defaultdict[int, list[Subscription]] = defaultdict(list)
        self._of_users: list[Subscription] = []
        self._waits: defaultdict[int, dict[tuple[int, int], Wait]] = defaultdict(dict)
        self._holders: defaultdict[int, set[int]] = defaultdict(set)

    # -- subscriptions -----------------------------------------------------------------------------------------

    def subscribe(self, subscription: Subscription) -> None:
        """Push what happens from now on."""
        if subscription.job_id is None:
            self._of_users.append(subscription)
        else:
            self._subscriptions[subscription.job_id].append(subscription)

    def watched(self, job_id: int) -> bool:
        """True when somebody follows a job."""
        return job_id in self._subscriptions

    def publish(self, events: Iterable[Event]) -> None:
        """Push committed events; ends waits and subscriptions of jobs that ended."""
        for event in events:
            for subscription in self._subscriptions.get(event.job_id, ()):
                subscription.push(event)
            if event.kind != "segment":
                for subscription in self._of_users:
                    if subscription.uid == event.uid:
                        subscription.push(event)
            if event.kind == "end":
                for subscription in self._subscriptions.pop(event.job_id, ()):
                    subscription.peer.finish(subscription.request_id)
                for wait in self._waits.pop(event.job_id, {}).values():
                    wait.end()
                    wait.answer()
                self._holders.pop(event.job_id, None)

    def publish_progress(self, job_id: int, payload: dict[str, Any]) -> None:
        """Push progress of a job to those who follow it."""
        for subscription in self._subscriptions.get(job_id, ()):
            subscription.push_progress(job_id, payload)

    # -- waits -------------------------------------------------------------------------------------------------

    def wait(self, job_id: int, peer: Peer, request_id: int, wait: Wait) -> None:
        """Answer once when the job ends, unless `unwait` or the peer's end comes first."""
        self._waits[job_id][peer.id, request_id] = wait

    def unwait(self, job_id: int, peer: Peer, request_id: int) -> None:
        """Give up a wait."""
        waits = self._waits.get(job_id, {})
        if (wait := waits.pop((peer.id, request_id), None)) is not None:
            wait.end()
        if not waits:
            self._waits.pop(job_id, None)

    # -- holders of attached jobs --------------------------------------------------------------------------------

    def hold(self, job_id: int, peer: Peer) -> None:
        """Note that a job lives as long as this peer does."""
        self._holders[job_id].add(peer.id)

    def held(self, job_id: int) -> bool:
        """True when an attached job has a holder left."""
        return bool(self._holders.get(job_id))

    def forget_peer(self, peer: Peer) -> list[int]:
        """Drop all that a gone peer had; return the jobs that have lost their last holder by it."""
        self._of_users = [subscription for subscription in self._of_users if subscription.peer is not peer]
        for job_id, subscriptions in list(self._subscriptions.items()):
            subscriptions[:] = [subscription for subscription in subscriptions if subscription.peer is not peer]
            if not subscriptions:
                del self._subscriptions[job_id]
        for job_id in list(self._waits):
            for peer_id, request_id in list(self._waits[job_id]):
                if peer_id == peer.id:
                    self.unwait(job_id, peer, request_id)
        orphaned = []
        for job_id, holders in list(self._holders.items()):
            if peer.id in holders:
                holders.discard(peer.id)
                if not holders:
                    del self._holders[job_id]
                    orphaned.append(job_id)
        return orphaned
