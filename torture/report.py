"""What was tried and what went wrong, counted, and how that is printed."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import Counter


class Report:
    """Counts and violations of one subject. May be used by threads."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.counts: Counter[str] = Counter()
        self.facts: dict[str, str] = {}  # figures that are no counts
        self.violations: list[str] = []
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self.took_s = 0.0

    def count(self, what: str, number: int = 1) -> None:
        """Note that something was tried, or happened as it may."""
        with self._lock:
            self.counts[what] += number

    def violate(self, what: str) -> None:
        """Note that a promise was broken."""
        with self._lock:
            self.violations.append(what)

    def require(self, holds: bool, what: str) -> None:
        """Note a broken promise unless it holds."""
        if not holds:
            self.violate(what)

    def end(self) -> None:
        """Take the time."""
        self.took_s = time.monotonic() - self._started

    def __str__(self) -> str:
        lines = [f"{self.subject}: {len(self.violations)} promises broken, {self.took_s:.0f} s"]
        lines += [f"  {number:>9,}  {what}" for what, number in sorted(self.counts.items())]
        lines += [f"  {fact:>9}  {what}" for what, fact in self.facts.items()]
        lines += [f"  BROKEN: {violation}" for violation in self.violations[:50]]
        return "\n".join(lines)


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that `share` of all are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def describe_machine() -> str:
    """Return where and when, for a table."""
    load = os.getloadavg()[0]
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {platform.release()}, load {load:.1f} at the start"
