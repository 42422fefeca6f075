"""Who follows a job hears where it is: `progress` events, which carry no number and may be left out.

What moves one run is told at once (`tell`). What moves the queue moves everybody who waits, so it is told in rounds
(`look`): all that happened since the last one counts as one, each follower is told only what he has not heard, a few in
a turn of the loop, and after a round there is a rest that grows with what it cost. While nothing moves, or nobody
follows, there is no timer.
"""

from __future__ import annotations

from collections import deque

from whisperd.daemon.loop import Loop
from whisperd.daemon.state.board import Board
from whisperd.daemon.watchers import Subscription, Watchers
from whisperd.protocol.jobs import WAITING

# A place in a queue is for people to see: more often than this it is no news.
_REST_S = 0.5
# An event takes the loop 0.08 ms, its way to the socket included: all rounds together get a twentieth of its time.
_MOST_PER_S = 500
_A_TURN = 20


class Teller:
    """Tells the followers of jobs, by `watchers`, what the `board` knows."""

    def __init__(self, loop: Loop, board: Board, watchers: Watchers) -> None:
        self._loop, self._board, self._watchers = loop, board, watchers
        self._told_moves = board.moves  # of the last round: what was told, or is being told
        self._under_way = False  # a round, or the wait for one
        self._missed = False  # somebody may not have heard
        self._count = 0  # events of this round
        self._rests_until = loop.time()
        # A connection's followers are told one in a turn: what it has not taken yet would leave out the next.
        self._left: deque[deque[Subscription]] = deque()

    def tell(self, run_id: int) -> None:
        """Push where a run is to those who follow its jobs."""
        live = self._board.runs.get(run_id)
        if live is None:
            return
        for job in self._board.jobs_of(run_id):
            if self._watchers.watched(job.id):
                self._watchers.publish_progress(job.id, self._board.progress(live))

    def look(self) -> None:
        """After whatever may have moved the queue: have those told who follow a waiting job."""
        if self._missed or self._board.moves != self._told_moves:
            self._arrange()

    def came(self) -> None:
        """Somebody has begun to follow a job."""
        self._missed = True
        self._arrange()

    def _arrange(self) -> None:
        if not self._under_way and self._watchers.anybody_follows:
            self._under_way = True
            self._loop.call_at(max(self._loop.time(), self._rests_until), self._begin)

    def _begin(self) -> None:
        self._told_moves, self._missed, self._count = self._board.moves, False, 0
        of_peers: dict[int, deque[Subscription]] = {}
        for subscription in self._watchers.followers():
            if self._waits(subscription):
                of_peers.setdefault(subscription.peer.id, deque()).append(subscription)
        self._left.extend(of_peers.values())
        # Not yet: what was pushed in the turn before is sent first.
        self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        for _ in range(min(_A_TURN, len(self._left))):
            of_peer = self._left.popleft()
            if not self._tell_one(of_peer.popleft()):  # he does not keep up: he hears of it in the next round
                self._missed = True
            elif of_peer:
                self._left.append(of_peer)
        if self._left:
            self._loop.call_soon(self._go_on)
            return
        self._under_way = False
        self._rests_until = self._loop.time() + max(_REST_S, self._count / _MOST_PER_S)
        self.look()

    def _waits(self, subscription: Subscription) -> bool:
        job = self._board.jobs.get(subscription.job_id or 0)
        return job is not None and job.state in WAITING

    def _tell_one(self, subscription: Subscription) -> bool:
        """Tell a follower what he has not heard; return False when he has not taken what came before."""
        if subscription.peer.closed or not self._waits(subscription):
            return True
        job = self._board.jobs[subscription.job_id or 0]
        payload = self._board.progress(self._board.runs[job.run_id])
        if subscription.told == payload:
            return True
        self._count += 1
        return subscription.push_progress(job.id, payload)
