"""Whose fault it was that the model's process died: runs that were present are tried alone, one after the other.

Knows no processes and no rows but those it is shown. A death in company accuses nobody, it only makes suspects of all
who were present. A suspect runs alone until the model has answered it so often that it has got past where the process
died; then it makes room for the next one, and in the end all run beside each other again. Whoever was present at
several deaths must get further each time: so one that kills late is found too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from whisperd.daemon.store.rows import RunRow

_STRICTER = 4


class Trials:
    """Remembers who got through since the last death; what is in the rows outlives the daemon, this does not.

    `answers` is how often the model must answer a run alone that was present at one death.
    """

    def __init__(self, answers: int) -> None:
        self._answers = answers
        self._passed: set[int] = set()
        self._heard: Counter[int] = Counter()
        self.accused: int | None = None  # died alone; whether that counts, the sample says

    def is_suspect(self, run: RunRow) -> bool:
        """True for a run that must be alone."""
        return run.suspicion > 0 and run.id not in self._passed

    def answered(self, run: RunRow) -> bool:
        """Count an answer of the model for a run; True when that was what it took to get through."""
        if not self.is_suspect(run):
            return False
        self._heard[run.id] += 1
        if self._heard[run.id] < self._answers * _STRICTER ** (run.suspicion - 1):
            return False
        self._passed.add(run.id)
        return True

    def died(self, present: Collection[int]) -> bool:
        """The process died with these runs in it. True when there is one to accuse."""
        for run_id in present:
            self.forget(run_id)
        if present:  # else it died while it loaded, or of the sample: what was before that stands
            self.accused = next(iter(present)) if len(present) == 1 else None
        return self.accused is not None

    def forget(self, run_id: int) -> None:
        """The run has ended, or begins its trial anew."""
        self._passed.discard(run_id)
        del self._heard[run_id]
