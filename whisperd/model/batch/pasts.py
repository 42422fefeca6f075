"""What the next tokens depend on of those before: on the device, where they are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What the timestamps so far allow next, `(rows,)` each: they come in pairs (except before the end).

    They never go back either. `latest` and `lowest` are distances from the first timestamp.
    """

    latest: Tensor  # the last timestamp; -1: none yet
    no_time: Tensor  # behind a pair
    no_text: Tensor  # behind a single one

    @property
    def lowest(self) -> Tensor:
        """The lowest timestamp allowed. The end of a segment may not be its beginning."""
        return self.latest + 1 - self.no_text.long()


class Pasts:
    """The last token of each row and its timestamps, in the slots of the rows' cache.

    No text is here: that is put together on the host, which may learn of a token when the next one is chosen already.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        # The last token, whether it was the second timestamp of a pair, and the latest timestamp.
        self._numbers = torch.zeros(3, slots, dtype=torch.int64, device=device)

    @property
    def slots(self) -> int:
        return self._numbers.shape[1]

    def resize(self, slots: int, *, used: int) -> None:
        """Have so many slots; the first `used` keep what they hold."""
        old = self._numbers
        self._numbers = torch.zeros(3, slots, dtype=torch.int64, device=old.device)
        self._numbers[:, :used] = old[:, :used]

    def tokens(self, rows: int) -> Tensor:
        """Return the last token of each of the first rows."""
        return self._numbers[0, :rows]

    def times(self, rows: slice, time_begin: int) -> Times:
        """Return what is allowed next; not for rows that have said nothing yet."""
        last, pair, latest = self._numbers[:, rows]
        no_time = pair.bool()
        return Times(latest=latest, no_time=no_time, no_text=(last >= time_begin) & ~no_time)

    def begin(self, rows: slice, time_begin: int) -> None:
        """Have rows that have said nothing yet."""
        new = self._numbers[:, rows]
        new[0] = time_begin  # upstream counts what was before the first token as a timestamp
        new[1] = 0
        new[2] = -1

    def follow(self, rows: slice | Tensor, tokens: Tensor, time_begin: int) -> None:
        """Have rows say one token more."""
        last, _, latest = self._numbers[:, rows]
        is_time = tokens >= time_begin
        pair = is_time & (last >= time_begin)
        latest = torch.where(is_time, tokens - time_begin, latest)
        self._numbers[:, rows] = torch.stack([tokens, pair.long(), latest])

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy each (source, target) pair of slots; no target is a source too."""
        if len(pairs) == 1:
            ((source, target),) = pairs
            self._numbers[:, target] = self._numbers[:, source]
        elif pairs:
            sources, targets = torch.tensor(pairs, device=self._numbers.device).T
            self._numbers[:, targets] = self._numbers[:, sources]
