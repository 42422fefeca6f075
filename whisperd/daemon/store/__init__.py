"""The durable queue: every change of jobs and runs, each one function over the rows, run in the store thread.

Knows no sockets and no helpers. A call checks the rows as they are when it runs, so two that cross are settled by the
order of their transactions. Where a call comes too late (the job has ended meanwhile) it changes nothing and says so by
an empty `Change`.
"""

from whisperd.daemon.store.accepting import check_retry, key_conflict
from whisperd.daemon.store.fetching import Fetching
from whisperd.daemon.store.forgetting import DAY_S, Forgetting
from whisperd.daemon.store.moving import Retention
from whisperd.daemon.store.reading import Answer, Known, LookedUp, not_found
from whisperd.daemon.store.running import Running

__all__ = ["DAY_S", "Answer", "Known", "LookedUp", "Retention", "Store", "check_retry", "key_conflict", "not_found"]


class Store(Fetching, Running, Forgetting):
    """The operations. Every method takes the connection and runs inside the caller's transaction."""
