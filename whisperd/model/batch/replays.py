"""The decoder's step where launching costs more than computing: recorded once a shape, then replayed as a whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from whisperd.model.batch.caches import Cache
from whisperd.model.batch.decoder import Decoder, Routing
from whisperd.model.batch.kernels import Kernels
from whisperd.model.memory import is_out_of_memory

log = logging.getLogger("whisperd.model")

# What is rounded up needs fewer recordings: rows too many say nothing to anybody, positions too many are masked.
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48)
_POSITIONS = 64
_MOST_KEPT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recording:
    """A step on tensors of its own, to be filled before it is replayed."""

    place: Tensor
    routing: Routing | None
    replay: Callable[[], Tensor]


class Replays:
    """Steps as `Decoder.step` does: launched one by one when a shape is new, recorded the second time, then replayed.

    A recording reads and writes where the caches lay, so none outlives them.
    """

    def __init__(self, decoder: Decoder, kernels: Kernels) -> None:
        self._decoder, self._kernels = decoder, kernels
        self._seen = set[Hashable]()
        self._kept: dict[Hashable, _Recording] = {}
        self._tensors: Hashable = None
        self._given_up = False

    def step(
        self, tokens: Sequence[int], positions: Sequence[int], rows: Cache, windows: Cache, routing: Routing | None
    ) -> Tensor:
        """As `Decoder.step`, but what it returns is overwritten by the next call."""
        if self._given_up:
            return self._decoder.step(tokens, positions, rows, windows, routing)
        if self._tensors != (rows.generation, windows.generation):
            self._seen.clear()
            self._kept.clear()
            self._tensors = (rows.generation, windows.generation)
        count = len(tokens)
        # Whose rows do not stand in the order of the windows are too few to round up: beams.
        padding = [0] * (0 if routing else _rounded(count, most=min(rows.slots, windows.slots)) - count)
        length = min(rows.length, -(-(max(positions) + 1) // _POSITIONS) * _POSITIONS)
        place = self._kernels.send([[*tokens, *padding], [*positions, *padding]])
        key = (place.shape[1], length, None if routing is None else routing.rows.shape)
        recording = self._kept.pop(key, None)
        if recording is None and key in self._seen:
            recording = self._record(place, rows, windows, routing, length)
        if recording is None:
            self._seen.add(key)
            return self._decoder.step_at(place, rows, windows, routing, length=length, masked=True)[:count]
        self._kept[key] = recording  # the last one of all, so that the first is the longest unused
        if len(self._kept) > _MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        recording.place.copy_(place)
        if routing is not None and recording.routing is not None:
            recording.routing.rows.copy_(routing.rows)
            recording.routing.places.copy_(routing.places)
        return recording.replay()[:count]

    def _record(
        self, place: Tensor, rows: Cache, windows: Cache, routing: Routing | None, length: int
    ) -> _Recording | None:
        place = place.clone()
        if routing is not None:
            routing = Routing(rows=routing.rows.clone(), places=routing.places.clone())
        try:
            replay = self._kernels.record(
                lambda: self._decoder.step_at(place, rows, windows, routing, length=length, masked=True)
            )
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            log.warning("model: steps are not recorded error=%s", error)
            self._given_up = True
            return None
        return _Recording(place=place, routing=routing, replay=replay)


def _rounded(count: int, *, most: int) -> int:
    return next((rows for rows in _ROWS if count <= rows <= most), count)
